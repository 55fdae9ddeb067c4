"""SIGINT and SIGTERM while training: remembered, so that training stops between two steps with everything saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(Exception):
    """A signal arrived while nothing was being trained, so that no step has to be finished first."""


class Interrupts:
    """The number of the first signal, 0 before one arrives; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # A scheduler may signal a launcher and its processes, and the launcher signals them again.
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within it signals are remembered. Outside of the main thread they are left to whoever handles them."""
        try:
            before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
