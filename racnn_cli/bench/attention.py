"""`racnn bench attention`: whether the APNs learn where to look, and what that is worth.

Trains the arms below for every seed (folders: see `arms.py`) and compares them on the test split. The learned boxes
are measured after every stage and phase, so the data need ground-truth boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from racnn_cli.bench import BenchResult, Options, summary
from racnn_cli.bench.arms import LEARNED, Arm, SeedExperiment
from racnn_cli.bench.records import ArmResult, Milestone, SeedResult
from racnn_cli.bench.summary import ABOVE, BOX_HEADINGS, Claim, Pair, final, format_spread, new_table, report, spread

FIXED = {
    # No APN is trained, and the boxes are used without augmentation.
    "pretrain_apn.epochs": 0,
    "alternate.apn_epochs": 0,
    "alternate.jitter": 0.0,
    "alternate.tighten": 0.0,
}
TRUE_AT_TEST = "learned, true boxes at test"
TAUGHT = Arm("boxes taught", "the recipe with APNs that learn true boxes in training", boxes="taught")
TRUE = Arm("true boxes", "CNNs trained and tested with true boxes", FIXED, boxes="true")
RANDOM = Arm("random boxes", "the same with boxes at random positions", FIXED, boxes="random")
PLAIN = Arm("plain", "one scale at the first view's size, as many epochs as scale 1", plain="first view")
EQUAL = Arm("plain, equal compute", "one scale that costs what all scales cost", plain="equal compute")
ARMS = (LEARNED, TAUGHT, TRUE, RANDOM, PLAIN, EQUAL)
"""In the order of training: the others start from the learned arm or depend on its number of rounds."""
FACTORS = (1, 0.5, 2, 4)
"""Multiples of the recipe's learning rate that are tried for every arm."""
ORDER = (LEARNED.name, TRUE_AT_TEST, *(arm.name for arm in ARMS[1:]))
"""Rows of the table."""


def run(options: Options) -> BenchResult:
    """Train what is not finished, and compare the arms over the seeds.

    Raises:
        DataError: the test images have no ground-truth boxes.
        RunError: a folder holds a run of another recipe, or training fails.
    """
    arms, grid = choose_learning_rates(options)
    seeds = []
    for number in options.seeds:
        experiment = SeedExperiment(options, number, learned=arms[0])
        seed = experiment.run_arms(arms)
        if true_at_test := seed.arms[LEARNED.name].true_boxes:
            seed.arms[TRUE_AT_TEST] = true_at_test
        seeds.append(seed)
    return summarize(experiment, seeds, grid)


Grid = Mapping[str, Mapping[float, Mapping[str, Any]]]
"""Arm to learning rate to the spread of its validation top-1 over the choosing seeds."""


def choose_learning_rates(options: Options) -> tuple[list[Arm], Grid]:
    """Choose the learning rate of every arm by its mean validation top-1 on the choosing seeds.

    Every arm gets as many runs as the others: all `FACTORS` on all of these seeds. Equal means are a tie, which the
    learning rate nearer to the recipe's wins.

    Returns:
        the arms, with the learning rates that were chosen, and the grid; it is empty without choosing seeds.
    """
    chosen, grid = [], dict[str, dict[float, dict[str, Any]]]()
    experiments = [SeedExperiment(options, number) for number in options.choose]
    if not experiments:
        return list(ARMS), grid
    recipe = experiments[0].recipe
    for arm in ARMS:
        candidates, rows = [arm.with_lr(recipe, factor) for factor in FACTORS], dict[float, dict[str, Any]]()
        for factor, candidate in zip(FACTORS, candidates, strict=True):
            values = [experiment.run_arm(candidate).val_final for experiment in experiments]
            rows[arm.lr(recipe) * factor] = spread(values)
        means = [row["mean"] for row in rows.values()]
        best = means.index(max(means))
        report(f"{arm.name}: {arm.lr_key} = {list(rows)[best]:g} is chosen")
        chosen.append(candidates[best])
        grid[arm.name] = rows
    return chosen, grid


def summarize(experiment: SeedExperiment, seeds: Sequence[SeedResult], grid: Grid) -> BenchResult:
    """Summarize the results as tables and values.

    Args:
        experiment: of any seed.
        seeds: results of all seeds.
        grid: how the learning rates were chosen; may be empty.
    """
    recipe, first = experiment.recipe, seeds[0].arms
    answers, images = list(first[LEARNED.name].top1), first[LEARNED.name].images
    arms = {
        arm: {answer: spread([seed.arms[arm].top1[answer] for seed in seeds]) for answer in first[arm].top1}
        for arm in ORDER
    }
    costs = {name: spread_compute([seed.arms[name] for seed in seeds]) for name in (arm.name for arm in ARMS)}
    compared = {name: [seed.arms[name] for seed in seeds] for name in (LEARNED.name, PLAIN.name, EQUAL.name)}
    notes = [
        summary.SPREAD_NOTE,
        *(f"{arm.name}: {arm.about}" for arm in ARMS),
        f"{TRUE_AT_TEST}: the learned weights, tested with true boxes",
        f"{EQUAL.name}: {first[EQUAL.name].size} px",
        *(
            summary.describe_compute(name, [one.compute for one in results if one.compute])
            for name, results in compared.items()
        ),
        *(summary.describe_kept(name, [one.choices for one in results]) for name, results in compared.items()),
    ]
    title = f"Recipe {recipe.name}: top-1 on {images} test images"
    table = new_table(title, text=["arm"], numbers=answers, notes=notes)
    for arm, spreads in arms.items():
        table.add_row(arm, *(format_spread(spreads.get(answer)) for answer in answers))
    values: dict[str, Any] = {
        "recipe": recipe.name,
        "images": images,
        "runs": [seed.to_json() for seed in seeds],
        "arms": arms,
        "moments": merge_milestones([seed.arms[LEARNED.name].milestones for seed in seeds]),
        "claims": [claim.measure([seed.arms for seed in seeds]) for claim in CLAIMS],
        "data": recipe.data.path,
        "compute": costs,
        "learning_rates": {arm: {f"{lr:g}": value for lr, value in rows.items()} for arm, rows in grid.items()},
    }
    tables = [table, _milestone_table(values["moments"]), _claim_table(values["claims"])]
    return BenchResult([*([_grid_table(grid)] if grid else []), *tables], values)


def spread_compute(results: Sequence[ArmResult]) -> dict[str, Any]:
    """Spreads of the compute of `prediction` and `training`."""
    costs = [result.compute for result in results if result.compute is not None]
    return {key: spread([getattr(cost, key) for cost in costs]) for key in ("prediction", "training")}


def _grid_table(grid: Grid) -> Table:
    table = new_table(
        "Validation top-1 by learning rate, on the choosing seeds",
        text=["arm"],
        numbers=["", "", "", ""],
        notes=["mean ± standard deviation; *: chosen. `alternate.cnn_lr`, of a plain backbone `pretrain_cnn.lr`"],
    )
    for arm, rows in grid.items():
        best = max(row["mean"] for row in rows.values())
        first = next(lr for lr, row in rows.items() if row["mean"] == best)
        cells = [f"{lr:g}: {format_spread(row)}{' *' if lr == first else ''}" for lr, row in rows.items()]
        table.add_row(arm, *cells)
    return table


def merge_milestones(runs: Sequence[Sequence[Milestone]]) -> list[dict[str, Any]]:
    """Merge the milestones of all seeds: `moment`, `epochs`, and `val` and `test` as trees of spreads."""
    merged = []
    for longest in max(runs, key=len):
        entry: dict[str, Any] = {"moment": longest.name, "epochs": longest.epochs}
        same = [milestone.to_json() for run in runs for milestone in run if milestone.name == longest.name]
        for split in ("val", "test"):
            if metrics := [milestone[split] for milestone in same if split in milestone]:
                entry[split] = summary.spread_tree(metrics)
        merged.append(entry)
    return merged


def _milestone_table(milestones: Sequence[Mapping[str, Any]]) -> Table:
    tested = [milestone for milestone in milestones if "test" in milestone]
    zooms = sorted({0, len(tested[0]["test"]["boxes"]) - 1})
    headings = [f"zoom {zoom + 1}\n{name}" for zoom in zooms for name in BOX_HEADINGS.values()]
    table = new_table(
        "The learned boxes on the test images, after each stage and phase",
        text=["after"],
        numbers=[*headings, "rank\nloss"],
        notes=["side: share of the side of the scale before; hit: the item's center is inside the box"],
    )
    for milestone in tested:
        boxes, rank = milestone["test"]["boxes"], milestone["test"]["rank"]
        table.add_row(
            milestone["moment"].removeprefix("alternate: "),
            *(format_spread(boxes[zoom][key]) for zoom in zooms for key in BOX_HEADINGS),
            format_spread(rank),
        )
    return table


def _claim_table(claims: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "Claims",
        text=["comparison", "target"],
        numbers=["seeds", "mean [95 % t interval]"],
        notes=["seeds: how many reach the target; differences and ratios are paired by seed"],
    )
    for claim in claims:
        count = "" if claim["count"] is None else "{} of {}".format(*claim["count"])
        mean = summary.format_paired(claim, "" if claim["kind"] == "ratio" else "+")
        table.add_row(claim["claim"], claim["wanted"], count, mean)
    return table


def _finest_box(key: str) -> Pair:
    """Compare the finest box at the end of training with that after pretrain-apn."""

    def pair(arms: Mapping[str, ArmResult]) -> tuple[float, float]:
        learned = arms[LEARNED.name]
        (start,) = (milestone.test for milestone in learned.milestones if milestone.name == "pretrain-apn")
        assert start is not None
        return getattr(learned.boxes[-1], key), getattr(start.boxes[-1], key)

    return pair


def _finest_scale(arm: str, other: int) -> Pair:
    """Compare the top-1 of the last scale with that of the scale at index `other`."""

    def pair(arms: Mapping[str, ArmResult]) -> tuple[float, float]:
        top1 = [value for name, value in arms[arm].top1.items() if name.startswith("scale")]
        return top1[-1], top1[other]

    return pair


CLAIMS = (
    Claim(
        "IoU of the finest box, end - after pretrain-apn", "≥ 0.10 on every seed", _finest_box("iou_mean"), margin=0.1
    ),
    Claim("its hit rate, end - after pretrain-apn", "not lower on any seed", _finest_box("hit_rate"), margin=0),
    Claim("finest scale - scale 1", "above 0 on every seed", _finest_scale("learned", 0), margin=ABOVE),
    Claim("finest scale - the one before", "not below 0 in the mean", _finest_scale("learned", -2), margin=0),
    Claim("fused - plain, equal compute", "≥ 0.03, interval above 0", final("learned", EQUAL.name), margin=0.03),
    Claim("fused / with true boxes at test", "≥ 0.95", final("learned", TRUE_AT_TEST), ratio=True),
    Claim("fused / boxes taught", "≥ 0.95", final("learned", TAUGHT.name), ratio=True),
    Claim("fused / trained with true boxes", "≥ 0.95 (ceiling)", final("learned", TRUE.name), ratio=True),
    Claim("fused - random boxes", "above 0", final("learned", RANDOM.name), margin=ABOVE),
    Claim("true boxes: fused - plain, equal compute", "≥ 0.08", final(TRUE.name, EQUAL.name), margin=0.08),
    Claim("true boxes: finest scale - the one before", "above 0", _finest_scale(TRUE.name, -2), margin=ABOVE),
)
