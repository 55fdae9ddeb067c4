"""`racnn bench ablation`: the effect of each ingredient of the training, measured by changing one thing in the recipe.

All arms of a seed start from one state after `pretrain-cnn`. That state and the arm `default` are shared with
`racnn bench attention`. Without ground-truth boxes in the data, only accuracies are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from racnn_cli.bench import BenchResult, Options, summary
from racnn_cli.bench.arms import LEARNED, Arm, SeedExperiment, check_names
from racnn_cli.bench.records import SeedResult
from racnn_cli.bench.summary import Claim, final, format_spread, paired, spread

# At the default of 5e-3 the gradient through the crop ruins the boxes; this is the best of 5e-3, 1e-3 and 1e-4.
BACKPROP = {"alternate.apn_gradient": "backprop", "alternate.apn_lr": 1e-4}
DEFAULT = replace(LEARNED, name="default", folder=LEARNED.folder_name)
CENTER = Arm("start from the centre", "the APNs are not pre-trained on peaks", {"pretrain_apn.epochs": 0})
ARMS = (
    DEFAULT,
    Arm("no tighter boxes", "boxes in the CNN phase are not made smaller", {"alternate.tighten": 0.0}),
    Arm("no jitter", "boxes in the CNN phase are not moved", {"alternate.jitter": 0.0}),
    Arm("no ramp", "every round has as many CNN epochs as the last one", {"alternate.ramp": False}),
    Arm("no settling", "jitter and tightening stay the same to the end", {"alternate.settle": False}),
    Arm("no perturbation", "the boxes learn from the gradient through the crop", BACKPROP),
    Arm("mask gradient", "the boxes learn from the gradient of the mask", {**BACKPROP, "model.gradient": "boxcar"}),
    Arm("nested crops", "a crop is cut from the previous crop, not from the source", {"model.zoom": "nested"}),
    Arm("no mask", "the crop has a hard edge", {"model.k": math.inf}),
    Arm("boxes never trained", "the boxes stay as pretrain-apn left them", {"alternate.apn_epochs": 0}),
    CENTER,
)
RECOVERY = Claim("fused, start from the centre - default", "≥ -0.02", final(CENTER.name, DEFAULT.name), margin=-0.02)


def run(options: Options) -> BenchResult:
    """Train what is not finished, and compare the arms over the seeds.

    Raises:
        RecipeError: an unknown arm.
        RunError: a folder holds a run of another recipe, or training fails.
    """
    arms, seeds = select_arms(options.arms), []
    for number in options.seeds:
        experiment = SeedExperiment(options, number, needs_boxes=False)
        seeds.append(experiment.run_arms(arms))
    return summarize(experiment.recipe.name, arms, seeds)


def select_arms(names: Sequence[str]) -> list[Arm]:
    """Return the default and the named arms, in the order of `ARMS`; all of them if `names` is empty.

    Raises:
        RecipeError: an unknown arm.
    """
    check_names(names, ARMS)
    return [arm for arm in ARMS if not names or arm is DEFAULT or arm.name in names]


def summarize(name: str, arms: Sequence[Arm], seeds: Sequence[SeedResult]) -> BenchResult:
    """Summarize the results of recipe `name` as a table and values."""
    first = seeds[0].arms[DEFAULT.name]
    finest = f"scale {len(first.boxes) + 1}"
    has_truth = first.boxes[-1].iou_mean is not None
    box_keys = ["iou_mean", "hit_rate", "coverage_mean"] if has_truth else []
    default = [seed.arms[DEFAULT.name].top1["fused"] for seed in seeds]
    rows: dict[str, dict[str, Any]] = {}
    for arm in arms:
        results = [seed.arms[arm.name] for seed in seeds]
        fused = [result.top1["fused"] for result in results]
        rows[arm.name] = {
            "about": arm.about,
            "changes": {key: str(value) if value == math.inf else value for key, value in arm.changes.items()},
            finest: spread([result.top1[finest] for result in results]),
            "fused": spread(fused),
            **{key: spread([getattr(result.boxes[-1], key) for result in results]) for key in box_keys},
            "fused_minus_default": paired(fused, default),
        }
    runs = [seed.to_json() for seed in seeds]
    values: dict[str, Any] = {"recipe": name, "images": first.images, "runs": runs, "arms": rows}
    notes = [summary.SPREAD_NOTE, *(f"{arm.name}: {arm.about}" for arm in arms)]
    for arm in arms:
        notes.append(summary.describe_kept(arm.name, [seed.arms[arm.name].choices for seed in seeds]))
    if CENTER in arms:
        values["recovered"] = recovered = RECOVERY.measure([seed.arms for seed in seeds])
        count = "{} of {}".format(*recovered["count"])
        notes.append(f"{count} seeds that start from the centre come within 2 points")
    content = "top-1 and finest box" if has_truth else "top-1"
    columns = [finest, "fused", *box_keys]
    table = summary.new_table(
        f"Recipe {name} with one thing changed: {content} on {first.images} test images",
        text=["arm"],
        numbers=[*(summary.BOX_HEADINGS.get(key, key) for key in columns), "fused - default [95 % t interval]"],
        notes=notes,
    )
    for arm_name, row in rows.items():
        difference = "" if arm_name == DEFAULT.name else summary.format_paired(row["fused_minus_default"])
        table.add_row(arm_name, *(format_spread(row[key]) for key in columns), difference)
    return BenchResult([table], values)
