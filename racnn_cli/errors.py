"""What can go wrong, as exceptions, and a few words that every message shares.

RacnnError           the root: a message, what to try, an exit code
├── RecipeError      a recipe, a key, a value or an option
├── DataError        images, labels, splits, annotation files, built-in data sets
├── BackboneError    an unknown model, weights that are missing, damaged or do not fit
│   └── SizeRefused  a model that does not take the input size
├── RunError         a run folder or training: missing, damaged, in use, changed data, diverged, out of memory
├── ExportError      writing, checking or reading an exported file
└── Interrupted      training stopped on a signal, after everything was saved
"""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Iterable
from pathlib import Path


class RacnnError(Exception):
    """An error that a user can understand and fix.

    Args:
        message: what is wrong: it names the file or the key, the value found and the values allowed.
        hint: what to do next, as one sentence or one command; may be empty.
        failure: True when the request was right and its execution failed (exit code 1); False when the request itself
            was wrong (exit code 2).
    """

    def __init__(self, message: str, hint: str = "", *, failure: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = 1 if failure else 2

    def __str__(self) -> str:
        return f"{self.message}\ntry: {self.hint}" if self.hint else self.message


class RecipeError(RacnnError):
    """A recipe, one of its keys or values, or a command-line option."""


class DataError(RacnnError):
    """Images, labels, splits, annotation files or built-in data sets."""


class BackboneError(RacnnError):
    """An unknown model, or weights that are missing, damaged or do not fit."""


class SizeRefused(BackboneError):
    """A model that does not take the input size it is asked to take."""


class RunError(RacnnError):
    """A run folder that is missing, damaged or in use, or training that failed."""


class ExportError(RacnnError):
    """Writing, checking or reading an exported file."""


class Interrupted(RacnnError):
    """Training stopped on a signal, after everything was saved; exits with 128 + the signal's number.

    Args:
        command: what continues the run.
        number: the signal's.
    """

    def __init__(self, command: str, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name}; everything up to this step is saved", f"`{command}` continues", failure=True
        )
        self.exit_code = 128 + number


def describe_missing(path: Path) -> str:
    """What is wrong with a path where a file is needed."""
    return f"{path} is not a regular file" if os.path.lexists(path) else f"{path} does not exist"


def escape_control(text: str) -> str:
    """The text with every unprintable character but the line break spelt out, so that it cannot control a terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a device; each library says so in its own way."""
    text = str(error).lower()
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return known or any(
        phrase in text for phrase in ("can't allocate memory", "out of memory", "bad allocation", "bad_alloc")
    )


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """`; did you mean …?` for a name that is not among the known ones; empty when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""
