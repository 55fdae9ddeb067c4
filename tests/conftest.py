"""What all tests share."""

from __future__ import annotations

import os

# Small tensors gain nothing from threads, and shared machines lose by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Callable

import pytest
import torch
from command import Said

from racnn_cli.cli import main

torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new, empty working folder, so that runs/ is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def racnn(monkeypatch, capsys) -> Callable[..., Said]:
    """The command `racnn` with words as typed, in this process."""

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["racnn", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        code = end.value.code
        return Said(code if isinstance(code, int) else int(bool(code)), out, err)

    return call
