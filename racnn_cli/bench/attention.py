"""`racnn bench attention`: does attention learn where to look, and what is that worth?

Trains the arms below, once a seed (see `arms.py` for the folders), and holds them against each other on the test
split; the boxes are measured after every stage and phase, on data whose true boxes are known.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from racnn_cli.bench import Figures, Options
from racnn_cli.bench.arms import LEARNED, Arm, SeedExperiment
from racnn_cli.bench.page import page
from racnn_cli.bench.seeds import paired

FIXED = {
    # The boxes are given: nothing trains an APN, and they are drawn as they are.
    "pretrain_apn.epochs": 0,
    "alternate.apn_epochs": 0,
    "alternate.jitter": 0.0,
    "alternate.tighten": 0.0,
}
GIVEN = "learned, true boxes at test"
TRUE = Arm("true boxes", "CNNs trained and tested with true boxes", FIXED, guide="true")
TAUGHT = Arm("boxes taught", "the recipe, but the APNs learn true boxes, which the test lacks", taught=True)
RANDOM = Arm("random boxes", "the same with boxes of the same size anywhere", FIXED, guide="random")
PLAIN = Arm("plain", "one scale at the first view's size, as many epochs as scale 1", plain="first view")
EQUAL = Arm("plain, equal compute", "one scale that costs what all scales cost", plain="equal compute")
ARMS = (LEARNED, TAUGHT, TRUE, RANDOM, PLAIN, EQUAL)
"""In the order of training: the others start from what the first one leaves, or count its rounds."""

BOX = {"hit_rate": "hit", "iou_mean": "IoU", "coverage_mean": "coverage", "side_mean": "side"}


def run(options: Options) -> Figures:
    """Train what is not trained yet, and put arms and seeds side by side.

    Raises:
        RacnnError: a test split without true boxes, a folder with a run of another recipe, or training fails.
    """
    found: list[dict[str, Any]] = []
    seed = None
    for number in options.seeds:
        seed = SeedExperiment(options, number)
        arms = {arm.name: seed.figures(arm) for arm in ARMS}
        learned = arms[LEARNED.name]
        arms[GIVEN] = learned.pop("true_boxes")
        found.append({"seed": number, "folder": str(seed.folder), "arms": arms})
    assert seed is not None
    figures = summary(seed.recipe.name, found)
    figures.values["data"] = seed.recipe.data.path
    figures.values["multiply_adds"] = {
        "all scales": seed.compute.scales,
        PLAIN.name: found[0]["arms"][PLAIN.name]["multiply_adds"],
        EQUAL.name: found[0]["arms"][EQUAL.name]["multiply_adds"],
    }
    figures.tables[0].caption = "\n".join([str(figures.tables[0].caption), costs(figures.values)])
    return Figures(figures.tables, figures.values, page(figures))


def summary(name: str, found: Sequence[Mapping[str, Any]]) -> Figures:
    """The tables of `run`.

    Args:
        name: of the recipe.
        found: one entry a seed: `seed`, `folder`, and `arms`, name to what `SeedExperiment.figures` gives.
    """
    lines = list(found[0]["arms"][LEARNED.name]["top1"])
    order = [LEARNED.name, GIVEN, TAUGHT.name, TRUE.name, RANDOM.name, PLAIN.name, EQUAL.name]
    values: dict[str, Any] = {
        "recipe": name,
        "images": found[0]["arms"][LEARNED.name]["images"],
        "runs": [dict(entry) for entry in found],
        "arms": {
            arm: {
                line: spread([entry["arms"][arm]["top1"][line] for entry in found])
                for line in lines
                if line in found[0]["arms"][arm]["top1"]
            }
            for arm in order
        },
        "moments": over_seeds([entry["arms"][LEARNED.name]["moments"] for entry in found]),
        "claims": [claim.measure(found) for claim in CLAIMS],
    }
    table = table_of(f"Recipe {name}: top-1 on {values['images']} test images", ["arm"], lines)
    for arm in order:
        table.add_row(arm, *(shown(values["arms"][arm].get(line)) for line in lines))
    abouts = [f"{arm.name}: {arm.about}" for arm in ARMS] + [f"{GIVEN}: the learned weights, true boxes"]
    table.caption = "\n".join(["mean ± standard deviation over the seeds", *abouts])
    return Figures([table, _moments(values["moments"]), _claims(values["claims"])], values)


def costs(values: Mapping[str, Any]) -> str:
    """What the arms cost, in one line."""
    counts = values["multiply_adds"]
    size = values["runs"][0]["arms"][EQUAL.name]["size"]
    each = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items())
    return f"million multiply-adds an image, counted: {each} (at {size} px)"


def spread(column: Sequence[float]) -> dict[str, Any]:
    """`mean` and `deviation` (None for one value) over the seeds, and `n`, their number."""
    deviation = statistics.stdev(column) if len(column) > 1 else None
    return {"mean": statistics.fmean(column), "deviation": deviation, "n": len(column)}


def over_seeds(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every moment's figures as spreads over the seeds that came to it.

    Args:
        runs: a seed's moments, as `arms.moments` gives them.

    Returns:
        in the order of the longest run: `moment`; `epochs` of that run; `val` and `test`, each with `top1`
        (line to spread) and, with boxes, `rank` and `boxes` (a list of figure to spread).
    """
    longest, found = max(runs, key=len), []
    for entry in longest:
        same = [one for moments in runs for one in moments if one["moment"] == entry["moment"]]
        splits = {
            split: _merge([one[split] for one in same if split in one])
            for split in ("val", "test")
            if split in entry
        }
        found.append({"moment": entry["moment"], "epochs": entry["epochs"], **splits})
    return found


def _merge(trees: Sequence[Any]) -> Any:
    """Trees of the same shape to one of spreads."""
    if isinstance(trees[0], Mapping):
        return {key: _merge([tree[key] for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], list):
        return [_merge(branch) for branch in zip(*trees, strict=True)]
    return spread(trees)


@dataclass(frozen=True)
class Claim:
    """What should hold.

    Attributes:
        text: in words.
        wanted: the mark.
        sides: a seed's arms to the two figures that are compared.
        least: a seed counts where the first is at least the second plus this (`more`: above it); None: not
            counted.
        ratio: the mean is that of the quotient.
    """

    text: str
    wanted: str
    sides: Callable[[Mapping[str, Any]], tuple[float, float]]
    least: float | None = None
    more: bool = False
    ratio: bool = False

    def measure(self, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`claim`, `wanted`, `count` (seeds, of all; None if not counted), `kind`, `mean`, `interval` (95 %, t)."""
        pairs = [self.sides(entry["arms"]) for entry in found]
        if self.ratio:
            compared = paired([a / max(b, 1e-9) for a, b in pairs], [0.0] * len(pairs))
        else:
            compared = paired([a for a, _ in pairs], [b for _, b in pairs])
        count = None
        if self.least is not None:
            gaps = [a - b - self.least for a, b in pairs]
            count = [sum(gap > 1e-9 if self.more else gap > -1e-9 for gap in gaps), len(gaps)]
        kind = "ratio" if self.ratio else "difference"
        return {"claim": self.text, "wanted": self.wanted, "count": count, "kind": kind, **compared}


def answer(arms: Mapping[str, Any], arm: str) -> float:
    """Top-1 of an arm's final answer."""
    top1 = arms[arm]["top1"]
    return top1.get("fused", top1["scale 1"])


def _box(key: str) -> Callable[[Mapping[str, Any]], tuple[float, float]]:
    def sides(arms: Mapping[str, Any]) -> tuple[float, float]:
        learned = arms[LEARNED.name]
        start = next(entry for entry in learned["moments"] if entry["moment"] == "pretrain-apn")
        return learned["boxes"][-1][key], start["test"]["boxes"][-1][key]

    return sides


def _answers(one: str, other: str) -> Callable[[Mapping[str, Any]], tuple[float, float]]:
    return lambda arms: (answer(arms, one), answer(arms, other))


def _scales(arm: str, other: int) -> Callable[[Mapping[str, Any]], tuple[float, float]]:
    """The last scale's top-1, and that of another one, as an index into the list of scales."""

    def sides(arms: Mapping[str, Any]) -> tuple[float, float]:
        top1 = [value for name, value in arms[arm]["top1"].items() if name.startswith("scale")]
        return top1[-1], top1[other]

    return sides


CLAIMS = (
    Claim("IoU of the finest box, end - after pretrain-apn", "≥ 0.10 on every seed", _box("iou_mean"), 0.10),
    Claim("its hit rate, end - after pretrain-apn", "not lower on any seed", _box("hit_rate"), 0.0),
    Claim("finest scale - scale 1", "above 0 on every seed", _scales(LEARNED.name, 0), 0.0, more=True),
    Claim("finest scale - the one before", "not below 0 in the mean", _scales(LEARNED.name, -2), 0.0),
    Claim(
        "fused - plain, equal compute", "≥ 0.03, interval above 0", _answers(LEARNED.name, EQUAL.name), 0.03
    ),
    Claim("fused / with true boxes at test", "≥ 0.95", _answers(LEARNED.name, GIVEN), ratio=True),
    Claim("fused / boxes taught", "≥ 0.95", _answers(LEARNED.name, TAUGHT.name), ratio=True),
    Claim(
        "fused / trained with true boxes", "≥ 0.95 (ceiling)", _answers(LEARNED.name, TRUE.name), ratio=True
    ),
    Claim("fused - random boxes", "above 0", _answers(LEARNED.name, RANDOM.name), 0.0, more=True),
    Claim("true boxes: fused - plain, equal compute", "≥ 0.08", _answers(TRUE.name, EQUAL.name), 0.08),
    Claim("true boxes: finest scale - the one before", "above 0", _scales(TRUE.name, -2), 0.0, more=True),
)


def shown(value: Mapping[str, Any] | None) -> str:
    """A spread as text."""
    if value is None:
        return ""
    return f"{value['mean']:.3f}" + ("" if value["deviation"] is None else f" ±{value['deviation']:.3f}")


def shown_pair(value: Mapping[str, Any], sign: str = "+") -> str:
    """A mean difference (or, without sign, quotient) and its interval as text."""
    text = f"{value['mean']:{sign}.3f}"
    if value["interval"] is not None:
        low, high = value["interval"]
        text += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return text


def _moments(moments: Sequence[Mapping[str, Any]]) -> Table:
    measured = [entry for entry in moments if "test" in entry]
    zooms = sorted({0, len(measured[0]["test"]["boxes"]) - 1})
    heads = [f"zoom {zoom + 1}\n{name}" for zoom in zooms for name in BOX.values()]
    table = table_of("The learned boxes on the test images, after each stage and phase", ["after"], heads)
    table.add_column("rank\nloss", justify="right")
    for entry in measured:
        boxes, rank = entry["test"]["boxes"], entry["test"]["rank"]
        table.add_row(
            entry["moment"].removeprefix("alternate: "),
            *(shown(boxes[zoom][key]) for zoom in zooms for key in BOX),
            shown(rank),
        )
    table.caption = "side: as a share of the scale before; hit: the item's centre is inside the box"
    return table


def _claims(claims: Sequence[Mapping[str, Any]]) -> Table:
    table = table_of("Claims", ["figure", "wanted"], ["seeds", "mean [95 % t interval]"])
    for claim in claims:
        table.add_row(
            claim["claim"],
            claim["wanted"],
            "" if claim["count"] is None else "{} of {}".format(*claim["count"]),
            shown_pair(claim, "" if claim["kind"] == "ratio" else "+"),
        )
    table.caption = "seeds: on how many the mark is reached; differences and quotients are paired by seed"
    return table


def table_of(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of words on the left, of numbers on the right."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table
