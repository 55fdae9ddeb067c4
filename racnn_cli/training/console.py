"""What a person sees while a network trains: a moving bar on a terminal, one plain line an epoch everywhere."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from racnn_cli.errors import escape_control
from racnn_cli.events import EpochEvent


class Console:
    """Messages and progress; silent where it must be (other processes, tests)."""

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
        """One line for a person; what looks like markup in it is printed as it is."""
        self.out.print(escape(escape_control(text)), soft_wrap=True)

    def title(self, text: str) -> None:
        self.out.print(f"[bold]{escape(text)}[/bold]")

    def begin(self, name: str, epochs: int, steps: int, done: int) -> None:
        """A stage starts: a bar over all of its steps."""
        self.bar.start()
        self.task = self.bar.add_task(escape(name), total=epochs * steps, completed=done, figures="")

    def step(self, epoch: int, epochs: int, figures: dict[str, float], rate: float) -> None:
        shown = "  ".join(f"{escape(key)} {value:.3f}" for key, value in figures.items())
        self.bar.update(
            self.task, advance=1, figures=f"epoch {epoch + 1}/{epochs}  {shown}  {rate:.0f} img/s"
        )

    def epoch(self, event: EpochEvent) -> None:
        """The line that stays."""
        self.say("  " + describe(event))

    def end(self) -> None:
        self.bar.stop()
        for task in list(self.bar.task_ids):
            self.bar.remove_task(task)


def describe(event: EpochEvent) -> str:
    """An epoch's event of the log as one line."""
    val = event.val
    parts = [f"epoch {event.epoch}/{event.epochs}"]
    parts += [f"{name} {value:.3f}" for name, value in event.train_loss.items()]
    parts.append("val top-1 " + " ".join(f"{scale.top1:.3f}" for scale in val.scales))
    if val.average is not None:
        parts.append(f"average {val.average.top1:.3f}")
        parts.append(f"rank {val.rank:.3f}")
        parts.append("side " + " ".join(f"{boxes.side_mean:.2f}±{boxes.side_std:.2f}" for boxes in val.boxes))
        bounds = max(max(boxes.at_floor, boxes.at_ceiling) for boxes in val.boxes)
        if bounds > 0.005:
            parts.append(f"at a bound {bounds:.0%}")
    parts.append(f"{event.images_per_second:.0f} img/s")
    return "  ".join(parts)
