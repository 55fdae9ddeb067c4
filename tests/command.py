"""The result of a command, shared by the tests that run commands."""

from __future__ import annotations

from typing import NamedTuple


class CommandResult(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str
