"""What several benches share: progress messages, tables, and statistics over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from racnn_cli.bench.records import ArmResult
from racnn_cli.events import ChoiceEvent, Compute

ABOVE = 1e-6  # margin of "above 0": less than one image adds to any accuracy
SPREAD_NOTE = "mean ± standard deviation over the seeds"
Pair = Callable[[Mapping[str, ArmResult]], tuple[float, float]]
"""Maps the arms of a seed to the two values that are compared."""

BOX_HEADINGS = {"hit_rate": "hit", "iou_mean": "IoU", "coverage_mean": "coverage", "side_mean": "side"}


def report(text: str) -> None:
    """Print a progress message on stderr."""
    Console(stderr=True, highlight=False, emoji=False).print(escape(text), soft_wrap=True)


def new_table(title: str, *, text: Sequence[str], numbers: Sequence[str], notes: Sequence[str]) -> Table:
    """Create a table without rows: text columns on the left, number columns on the right, notes below."""
    table = Table(title=title, title_justify="left", caption="\n".join(notes), caption_justify="left")
    for column in text:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return `mean`, sample standard `deviation` (None for a single value) and `n`, the number of values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "n": len(values)}


def spread_tree(trees: Sequence[Any]) -> Any:
    """Merge nested dicts and lists of the same shape into one whose leaves are spreads."""
    if isinstance(trees[0], Mapping):
        return {key: spread_tree([tree[key] for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], list):
        return [spread_tree(items) for items in zip(*trees, strict=True)]
    return spread(trees)


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the `mean` and its 95 % t `interval` (None for a single value)."""
    from scipy import stats  # slow to import

    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return {"mean": mean, "interval": None}
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return {"mean": mean, "interval": [mean - half, mean + half]}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return the `mean` of the differences and its 95 % t `interval`."""
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def format_spread(value: Mapping[str, Any] | None) -> str:
    """Format a spread as `mean ±deviation`; None becomes an empty cell."""
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["deviation"] is None else f" ±{value['deviation']:.3f}")


def format_paired(value: Mapping[str, Any], sign: str = "+") -> str:
    """Format a mean difference, or with an empty `sign` a mean ratio, and its interval."""
    text = f"{value['mean']:{sign}.3f}"
    if value["interval"] is not None:
        low, high = value["interval"]
        text += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return text


def describe_kept(name: str, runs: Sequence[Sequence[ChoiceEvent]]) -> str:
    """Compare the round that was kept, or with one scale the epoch, with the last one: mean validation top-1.

    Args:
        name: of the network.
        runs: the choices of each run, at least one.
    """
    every = [choice for choices in runs for choice in choices if not choice.phase]
    unit = "round" if any(choice.unit == "round" for choice in every) else "epoch"
    pairs = [(choice.kept_val.top1, choice.last_val.top1) for choice in every if choice.unit == unit]
    if not pairs:
        return f"{name}: not known which epoch was kept"
    kept, last = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return f"{name}: the {unit} that was kept has {kept:.3f} on validation images, the last one {last:.3f}"


def describe_compute(name: str, costs: Sequence[Compute]) -> str:
    """State the mean compute of a prediction and of training."""
    prediction = statistics.fmean(cost.prediction for cost in costs) / 1e6
    training = statistics.fmean(cost.training for cost in costs) / 1e12
    return f"{name}: {prediction:,.1f} MFLOPs per prediction, {training:,.3g} TFLOPs of training"


def final(arm: str, other: str) -> Pair:
    """Compare the final top-1 of two arms."""
    return lambda arms: (arms[arm].final, arms[other].final)


@dataclass(frozen=True)
class Claim:
    """A comparison of two results of every seed.

    Attributes:
        text: what is compared.
        target: the value that should be reached, as text.
        pair: the two values.
        margin: a seed passes if the first value is at least the second plus this; None: seeds are not counted.
        ratio: report the mean ratio instead of the mean difference.
    """

    text: str
    target: str
    pair: Pair
    margin: float | None = None
    ratio: bool = False

    def measure(self, seeds: Sequence[Mapping[str, ArmResult]]) -> dict[str, Any]:
        """Return `claim`, `wanted`, `count` (seeds that pass and all seeds, or None), `kind`, `mean` and `interval`."""
        pairs, count = [self.pair(arms) for arms in seeds], None
        if self.margin is not None:
            count = [sum(a - b - self.margin > -1e-9 for a, b in pairs), len(pairs)]
        kind, values = "difference", [a - b for a, b in pairs]
        if self.ratio:
            kind, values = "ratio", [a / max(b, 1e-9) for a, b in pairs]
        return {"claim": self.text, "wanted": self.target, "count": count, "kind": kind} | mean_interval(values)
