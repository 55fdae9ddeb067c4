"""What a command said: shared by the tests that type commands."""

from __future__ import annotations

from typing import NamedTuple


class Said(NamedTuple):
    """Exit code of a command, and what it wrote."""

    code: int
    out: str
    err: str
