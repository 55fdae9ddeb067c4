"""Training progress on stderr: a progress bar on a terminal, and one plain line per epoch everywhere."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from racnn_cli.errors import escape_control
from racnn_cli.events import EpochEvent


class Console:
    """Messages and progress.

    Args:
        quiet: print nothing, as in all processes but the first.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.out = RichConsole(stderr=True, quiet=quiet, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.out,
            transient=True,
            disable=quiet or not self.out.is_terminal,
        )

    def say(self, text: str) -> None:
        """Print one line; markup and control characters in it are printed as text."""
        self.out.print(escape(escape_control(text)), soft_wrap=True)

    def title(self, text: str) -> None:
        self.out.print(f"[bold]{escape(text)}[/bold]")

    def begin(self, name: str, epochs: int, steps: int, done: int) -> None:
        """Show a bar over all steps of a stage, `done` of which have been made."""
        self.bar.start()
        self.task = self.bar.add_task(escape(name), total=epochs * steps, completed=done, figures="")

    def step(self, epoch: int, epochs: int, figures: dict[str, float], rate: float) -> None:
        """Advance the bar by one step; `rate` in images per second."""
        text = "  ".join(f"{escape(name)} {value:.3f}" for name, value in figures.items())
        self.bar.update(self.task, advance=1, figures=f"epoch {epoch + 1}/{epochs}  {text}  {rate:.0f} img/s")

    def epoch(self, event: EpochEvent) -> None:
        """Print the line of an epoch."""
        self.say("  " + describe(event))

    def end(self) -> None:
        """Remove the bar."""
        self.bar.stop()
        for task in list(self.bar.task_ids):
            self.bar.remove_task(task)


def describe(event: EpochEvent) -> str:
    """Format an epoch's event as one line."""
    val = event.val
    parts = [f"epoch {event.epoch}/{event.epochs}"]
    parts += [f"{name} {value:.3f}" for name, value in event.train_loss.items()]
    parts.append("val top-1 " + " ".join(f"{answer.top1:.3f}" for answer in val.scales))
    if val.average is not None:
        parts.append(f"average {val.average.top1:.3f}")
        parts.append(f"rank {val.rank:.3f}")
        parts.append("side " + " ".join(f"{boxes.side_mean:.2f}±{boxes.side_std:.2f}" for boxes in val.boxes))
        at_bound = max(max(boxes.at_floor, boxes.at_ceiling) for boxes in val.boxes)
        if at_bound > 0.005:
            parts.append(f"at a bound {at_bound:.0%}")
    parts.append(f"{event.images_per_second:.0f} img/s")
    return "  ".join(parts)
