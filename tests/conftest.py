"""Fixtures for all tests."""

from __future__ import annotations

import os

# Small tensors gain nothing from threads, and on a shared machine threads slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Callable

import pytest
import torch
from command import CommandResult

from racnn_cli.cli import main

torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new, empty current folder, so that each test has its own runs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def racnn(monkeypatch, capsys) -> Callable[..., CommandResult]:
    """Run the command `racnn` with arguments, in this process."""

    def call(*arguments: object) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["racnn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        code = exit_info.value.code
        return CommandResult(code if isinstance(code, int) else int(bool(code)), out, err)

    return call
