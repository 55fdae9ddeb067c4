"""`racnn bench ablation`: what each ingredient of the training is worth: the recipe with one thing changed.

All arms of a seed start from one state after `pretrain-cnn`, which they share with `racnn bench attention`, and so
does the arm `default`, which is trained once for both. The data need no true boxes: without them there are only no
figures of the boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from racnn_cli.bench import Figures, Options
from racnn_cli.bench.arms import LEARNED, Arm, SeedExperiment
from racnn_cli.bench.attention import BOX, Claim, answer, shown, shown_pair, spread, table_of
from racnn_cli.bench.seeds import paired
from racnn_cli.errors import RacnnError, did_you_mean

# At the default's 5e-3 the gradient through the crop ruins the boxes; this is the best of 5e-3, 1e-3 and 1e-4.
BACKPROP_LR = 1e-4
DEFAULT = replace(LEARNED, name="default", folder=LEARNED.place)
CENTRE = Arm("start from the centre", "no peak pre-training of the boxes", {"pretrain_apn.epochs": 0})
ARMS = (
    DEFAULT,
    Arm("no tighter boxes", "boxes in the CNN phase are not drawn smaller", {"alternate.tighten": 0.0}),
    Arm("no jitter", "boxes in the CNN phase are not moved", {"alternate.jitter": 0.0}),
    Arm("no ramp", "every round has as many CNN epochs as the last one", {"alternate.ramp": False}),
    Arm("no settling", "jitter and tightening stay as they are to the end", {"alternate.settle": False}),
    Arm(
        "no perturbation",
        "the boxes learn by the gradient through the crop",
        {"alternate.apn_gradient": "backprop", "alternate.apn_lr": BACKPROP_LR},
    ),
    Arm(
        "paper",
        "the paper's own way: gradient of the mask through nested crops, nothing drawn at random",
        {
            "alternate.apn_gradient": "backprop",
            "alternate.apn_lr": BACKPROP_LR,
            "model.gradient": "boxcar",
            "model.zoom": "nested",
            "alternate.jitter": 0.0,
            "alternate.tighten": 0.0,
            "alternate.settle": False,
            "alternate.ramp": False,
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
        RacnnError: an arm that does not exist, a folder with a run of another recipe, or training fails.
    """
    found, name, chosen = [], "", choose(options.arms)
    for number in options.seeds:
        seed = SeedExperiment(options, number, boxed=False)
        name = seed.recipe.name
        arms = {arm.name: seed.figures(arm) for arm in chosen}
        found.append({"seed": number, "folder": str(seed.folder), "arms": arms})
    return summary(name, found)


def choose(names: Sequence[str]) -> list[Arm]:
    """The default and the arms of these names, in the order of `ARMS`; all where there are none.

    Raises:
        RacnnError: there is no such arm.
    """
    known = [arm.name for arm in ARMS]
    for name in names:
        if name not in known:
            raise RacnnError(
                f"the ablation has no arm {name!r}{did_you_mean(name, known)}",
                f"one of: {', '.join(known)}",
            )
    return [arm for arm in ARMS if not names or arm is DEFAULT or arm.name in names]


def summary(name: str, found: Sequence[Mapping[str, Any]]) -> Figures:
    """The table of `run`.

    Args:
        name: of the recipe.
        found: one entry a seed: `seed`, `folder`, and `arms`, name to what `SeedExperiment.figures` gives.
    """
    first = found[0]["arms"][DEFAULT.name]
    finest = f"scale {len(first['boxes']) + 1}"
    shares = [key for key in ("iou_mean", "hit_rate", "coverage_mean") if key in first["boxes"][-1]]
    chosen = [arm for arm in ARMS if arm.name in found[0]["arms"]]
    base = [answer(entry["arms"], DEFAULT.name) for entry in found]
    arms: dict[str, dict[str, Any]] = {}
    for arm in chosen:
        each = [entry["arms"][arm.name] for entry in found]
        arms[arm.name] = {
            "about": arm.about,
            "changes": dict(arm.changes),
            finest: spread([one["top1"][finest] for one in each]),
            "fused": spread([one["top1"]["fused"] for one in each]),
            **{key: spread([one["boxes"][-1][key] for one in each]) for key in shares},
            "fused_minus_default": paired([one["top1"]["fused"] for one in each], base),
        }
    values = {
        "recipe": name,
        "images": first["images"],
        "runs": [dict(entry) for entry in found],
        "arms": arms,
    }
    what = "top-1 and finest box" if shares else "top-1"
    title = f"Recipe {name} with one thing changed: {what} on {first['images']} test images"
    figures = [finest, "fused", *shares]
    heads = [BOX.get(key, key) for key in figures]
    table = table_of(title, ["arm"], [*heads, "fused - default [95 % t interval]"])
    for arm_name, row in arms.items():
        difference = "" if arm_name == DEFAULT.name else shown_pair(row["fused_minus_default"])
        table.add_row(arm_name, *(shown(row[key]) for key in figures), difference)
    notes = [f"{arm.name}: {arm.about}" for arm in chosen]
    if CENTRE in chosen:
        values["recovered"] = recovered = RECOVERY.measure(found)
        notes.append(
            "{} of {} seeds that start from the centre come within 2 points".format(*recovered["count"])
        )
    table.caption = "\n".join(["mean ± standard deviation over the seeds", *notes])
    return Figures([table], values)
