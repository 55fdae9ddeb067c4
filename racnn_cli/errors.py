"""The one exception of the toolkit: what went wrong, and what to do about it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class RacnnError(Exception):
    """A fault that a user can understand and mend.

    Args:
        message: what is wrong: it names the file or the key, the value found and the values allowed.
        hint: what to do next, as one sentence or one command; empty if there is nothing to add.
        failure: True when the request was right and its execution failed (exit code 1); False when the
            request itself was wrong (exit code 2).
    """

    def __init__(self, message: str, hint: str = "", *, failure: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = 1 if failure else 2

    def __str__(self) -> str:
        return f"{self.message}\ntry: {self.hint}" if self.hint else self.message


def absent(path: Path) -> str:
    """What is wrong with a path where a file is needed."""
    return f"{path} is no regular file" if os.path.lexists(path) else f"{path} does not exist"


def visible(text: str) -> str:
    """A text that does nothing to a terminal but break lines: what cannot be printed is spelt out."""
    return "".join(
        sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode()
        for sign in text
    )


def out_of_memory(fault: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a device; each library says so in its own way."""
    text = str(fault).lower()
    known = isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError"  # torch's
    return known or any(
        said in text for said in ("can't allocate memory", "out of memory", "bad allocation", "bad_alloc")
    )


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """`; did you mean …?` for a name that is not among the known ones; empty when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""
