"""Training progress on stderr: a progress bar on a terminal, and plain lines everywhere."""

from __future__ import annotations

import time

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from racnn_cli.errors import escape_control
from racnn_cli.events import EpochEvent
from racnn_cli.training.checkpoint import Progress

INTERVAL = 30.0  # seconds between progress lines where there is no bar


class Console:
    """Messages and progress.

    Args:
        quiet: print nothing, as in all processes but the first.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.out = RichConsole(stderr=True, quiet=quiet, highlight=False, emoji=False)
        self.moving = self.out.is_terminal and not quiet
        self.bar = ProgressBar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self.out,
            transient=True,
            disable=not self.moving,
        )
        self._said_at = time.monotonic()
        self._name, self._steps, self._step, self._epoch = "", 0, 0, ""

    def say(self, text: str) -> None:
        """Print one line; markup and control characters in it are printed as text."""
        self._said_at = time.monotonic()
        self.out.print(escape(escape_control(text)), soft_wrap=True)

    def title(self, text: str) -> None:
        """Print one line in bold."""
        self.out.print(f"[bold]{escape(text)}[/bold]")

    def begin(self, name: str, *, epochs: int, steps: int, done: int) -> None:
        """Start a phase of `epochs` times `steps` steps, `done` of which have been run."""
        self._name, self._steps, self._step = name, steps, done
        self._said_at = time.monotonic()
        self.bar.start()
        self.task = self.bar.add_task(escape(name), total=epochs * steps, completed=done, figures="")

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Start an epoch, counted from 0."""
        self._epoch = f"epoch {epoch + 1}/{epochs}"
        self._began, self._images = time.monotonic(), 0

    def step(self, losses: dict[str, float], *, images: int) -> None:
        """Count a step and this process's images."""
        self._step += 1
        self._images += images
        rate = self._images / max(time.monotonic() - self._began, 1e-9)
        figures = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        text = f"{self._epoch}  {figures}  {rate:.0f} img/s"
        self.bar.update(self.task, advance=1, figures=escape(text))
        self.still_busy(f"step {(self._step - 1) % max(self._steps, 1) + 1} of {self._steps}, {text}")

    def still_busy(self, text: str) -> None:
        """Print a line if there is no bar and the last line is older than `INTERVAL`."""
        if not self.moving and time.monotonic() - self._said_at >= INTERVAL:
            self.say(f"  {self._name}: {text}")

    def epoch(self, event: EpochEvent) -> None:
        """Print the line of an epoch."""
        self.say("  " + describe(event))

    def end(self) -> None:
        """End a phase: remove its bar."""
        self.bar.stop()
        for task in list(self.bar.task_ids):
            self.bar.remove_task(task)


def describe(event: EpochEvent) -> str:
    """Format an epoch's event as one line."""
    val = event.val
    parts = [f"epoch {event.epoch}/{event.epochs}"]
    parts += [f"{name} {value:.3f}" for name, value in event.train_loss.items()]
    parts.append("val top-1 " + " ".join(f"{answer.top1:.3f}" for answer in val.scales))
    if val.average is None and val.scales[0].mean_class is not None:  # with several scales the line is long already
        parts.append(f"mean class {val.scales[0].mean_class:.3f}")
    if val.average is not None:
        parts.append(f"average {val.average.top1:.3f}")
        parts.append(f"rank {val.rank:.3f}")
        parts.append("side " + " ".join(f"{boxes.side_mean:.2f}±{boxes.side_std:.2f}" for boxes in val.boxes))
        at_bound = max(max(boxes.at_floor, boxes.at_ceiling) for boxes in val.boxes)
        if at_bound > 0.005:
            parts.append(f"at a bound {at_bound:.0%}")
    parts.append(f"{event.images_per_second:.0f} img/s")
    return "  ".join(parts)


def describe_position(progress: Progress) -> str:
    """Describe where a run stands: stage, round, epoch and step."""
    if not progress.stage:
        return f"after {progress.done[-1]}" if progress.done else "from the start"
    parts = [f"in {progress.stage}"]
    if progress.stage == "alternate":
        phase = {"cnn": "CNN phase", "apn": "APN phase", "judge": "end of the round", "fusion": "fusion head"}
        parts.append(f"round {progress.round + (progress.phase in ('cnn', 'apn', 'judge'))}, {phase[progress.phase]}")
    parts.append(f"after epoch {progress.epoch}, step {progress.step} of the next one")
    return ", ".join(parts)
