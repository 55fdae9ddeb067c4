"""Fixtures for all tests."""

from __future__ import annotations

import gc
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


SLOW_FILES = (
    "training/test_distributed",
    "training/test_resume",
    "hostile/test_files",
    "test_docs",
    "faults/",
    "bench/",
    "backbones/test_contract",
    "export/",
    "core/test_model",
)
"""Slowest first: with `-n auto`, where a process runs whole files, none of them must be left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slowest files."""

    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((number for number, name in enumerate(SLOW_FILES) if f"tests/{name}" in path), len(SLOW_FILES))

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out what the imports made: tracing a network then takes up to 20 % less."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Undo it, because libraries report what was not collected at the end as leaks."""
    gc.unfreeze()
