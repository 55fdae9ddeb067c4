"""What is wrong with a run, in plain words, and what to try: read from its validation figures."""

from __future__ import annotations

import itertools
import math

from racnn_cli.events import Validation
from racnn_cli.recipe import Recipe

MANY = 0.5  # share of boxes at a bound that is worth a word
ALIKE = 0.01  # standard deviation of the centres below which all boxes are one place
BUSY = 20  # fewer validation images tell nothing about one scale being worse than another


def warnings(val: Validation, recipe: Recipe, images: int, *, finer: bool = True) -> dict[str, str]:
    """What kind of trouble, and a sentence about it with what to try; empty when all is well.

    Args:
        val: as from `evaluation.measure`, of all scales.
        recipe: of the run.
        images: number of validation images behind the figures.
        finer: the finer scales have been trained on their boxes, so that their accuracy counts.
    """
    found = {}
    model = recipe.model
    for number, box in enumerate(val.boxes, start=2):
        if box.at_floor > MANY:
            found[f"floor {number}"] = (
                f"{box['at_floor']:.0%} of scale {number}'s boxes are as small as they may be "
                f"(side {model.floor:.2f}): try a smaller model.floor, or one scale more"
            )
        if box.at_ceiling > MANY:
            found[f"ceiling {number}"] = (
                f"{box['at_ceiling']:.0%} of scale {number}'s boxes are as large as they may be (side "
                f"{model.ceiling:.2f}), so it sees what scale {number - 1} sees: try a larger alternate.tighten, "
                "or --scales with one scale less if the object fills its image"
            )
        if box.centre_std < ALIKE:
            found[f"alike {number}"] = (
                f"scale {number}'s boxes lie at the same place in every image (centres differ by "
                f"{box['centre_std']:.3f} of the side): unless the object does too, try a larger pretrain_apn.lr "
                "or more pretrain_apn.epochs"
            )
    top1 = [scale.top1 for scale in val.scales] if finer else []
    for number, (coarse, fine) in enumerate(itertools.pairwise(top1), start=1):
        # Two standard errors as if the images were different ones; they are the same, so chance is even less.
        error = math.sqrt(max(coarse * (1 - coarse) + fine * (1 - fine), 0.0) / max(images, 1))
        if images >= BUSY and coarse - fine > 2 * error:
            found[f"worse {number}"] = (
                f"scale {number + 1} is right less often ({fine:.3f}) than scale {number} ({coarse:.3f}): its crop "
                "shows less of what matters; try a larger model.side, more alternate.cnn_epochs, or --scales "
                f"{number}"
            )
    return found
