"""`racnn bench ablation`: what each ingredient of the training is worth: the recipe with one thing changed.

All arms of a seed start from one state after `pretrain-cnn`, which they share with `racnn bench attention`, and so
does the arm `default`, which is trained once for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from racnn_cli.bench import Figures, Options
from racnn_cli.bench.arms import LEARNED, Arm, Seed
from racnn_cli.bench.attention import Claim, answer, shown, shown_pair, spread, table_of
from racnn_cli.bench.seeds import paired

DEFAULT = replace(LEARNED, name="default", folder=LEARNED.place)
CENTRE = Arm("start from the centre", "no peak pre-training of the boxes", {"pretrain_apn.epochs": 0})
ARMS = (
    DEFAULT,
    Arm("no tighter boxes", "boxes in the CNN phase are not drawn smaller", {"alternate.tighten": 0.0}),
    Arm("no jitter", "boxes in the CNN phase are not moved", {"alternate.jitter": 0.0}),
    Arm("no settling", "jitter and tightening stay as they are to the end", {"alternate.settle": False}),
    Arm(
        "no perturbation",
        "the boxes learn by the gradient through the crop",
        {"alternate.apn_gradient": "backprop"},
    ),
    Arm(
        "paper",
        "the paper's own way: gradient of the mask through nested crops, nothing drawn at random",
        {
            "alternate.apn_gradient": "backprop",
            "model.gradient": "boxcar",
            "model.zoom": "nested",
            "alternate.jitter": 0.0,
            "alternate.tighten": 0.0,
            "alternate.settle": False,
        },
    ),
    Arm("boxes never trained", "the boxes stay as pretrain-apn left them", {"alternate.apn_epochs": 0}),
    CENTRE,
)
RECOVERY = Claim(
    "fused, start from the centre - default",
    "≥ -0.02",
    lambda arms: (answer(arms, CENTRE.name), answer(arms, DEFAULT.name)),
    -0.02,
)


def run(options: Options) -> Figures:
    """Train what is not trained yet, and put the arms side by side.

    Raises:
        RacnnError: as `attention.run`.
    """
    found, name = [], ""
    for number in options.seeds:
        seed = Seed(options, number)
        name = seed.recipe.name
        arms = {arm.name: seed.figures(arm) for arm in ARMS}
        found.append({"seed": number, "folder": str(seed.folder), "arms": arms})
    return summary(name, found)


def summary(name: str, found: Sequence[Mapping[str, Any]]) -> Figures:
    """The table of `run`.

    Args:
        name: of the recipe.
        found: one entry a seed: `seed`, `folder`, and `arms`, name to what `Seed.figures` gives.
    """
    first = found[0]["arms"][DEFAULT.name]
    finest = f"scale {len(first['boxes']) + 1}"
    base = [answer(entry["arms"], DEFAULT.name) for entry in found]
    arms: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        each = [entry["arms"][arm.name] for entry in found]
        arms[arm.name] = {
            "about": arm.about,
            "changes": dict(arm.changes),
            finest: spread([one["top1"][finest] for one in each]),
            "fused": spread([one["top1"]["fused"] for one in each]),
            "iou": spread([one["boxes"][-1]["iou_mean"] for one in each]),
            "hit": spread([one["boxes"][-1]["hit_rate"] for one in each]),
            "fused_minus_default": paired([one["top1"]["fused"] for one in each], base),
        }
    recovered = RECOVERY.measure(found)
    values = {
        "recipe": name,
        "images": first["images"],
        "runs": [dict(entry) for entry in found],
        "arms": arms,
        "recovered": recovered,
    }
    table = table_of(
        f"Recipe {name} with one thing changed: top-1 and finest box on {first['images']} test images",
        ["arm"],
        [finest, "fused", "IoU", "hit", "fused - default [95 % t interval]"],
    )
    for arm_name, row in arms.items():
        difference = "" if arm_name == DEFAULT.name else shown_pair(row["fused_minus_default"])
        table.add_row(arm_name, *(shown(row[key]) for key in (finest, "fused", "iou", "hit")), difference)
    notes = [f"{arm.name}: {arm.about}" for arm in ARMS]
    notes.append("{} of {} seeds that start from the centre come within 2 points".format(*recovered["count"]))
    table.caption = "\n".join(["mean ± standard deviation over the seeds", *notes])
    return Figures([table], values)
