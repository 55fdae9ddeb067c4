"""Problems of a run that its validation figures show, each as a sentence with what to try."""

from __future__ import annotations

import itertools
import math

from racnn_cli.events import Validation
from racnn_cli.recipe import Recipe

MANY_AT_BOUND = 0.5  # share of boxes at a bound that is reported
SAME_PLACE = 0.01  # standard deviation of the centers below which all boxes are at one place
FEWEST_IMAGES = 20  # with fewer validation images, one scale being worse than another says nothing


def warnings(val: Validation, recipe: Recipe, images: int, *, finer: bool = True) -> dict[str, str]:
    """The kind of each problem, and a sentence about it; empty when there is none.

    Args:
        val: validation figures of all scales.
        recipe: of the run.
        images: number of validation images behind the figures.
        finer: the finer scales have been trained on their boxes, so that their accuracy counts.
    """
    problems, model = {}, recipe.model
    for number, box in enumerate(val.boxes, start=2):
        if box.at_floor > MANY_AT_BOUND:
            problems[f"floor {number}"] = (
                f"{box.at_floor:.0%} of scale {number}'s boxes are as small as they may be "
                f"(side {model.floor:.2f}): try a smaller model.floor, or one scale more"
            )
        if box.at_ceiling > MANY_AT_BOUND:
            problems[f"ceiling {number}"] = (
                f"{box.at_ceiling:.0%} of scale {number}'s boxes are as large as they may be (side "
                f"{model.ceiling:.2f}), so it sees what scale {number - 1} sees: try a larger alternate.tighten, "
                "or --scales with one scale less if the object fills its image"
            )
        if box.centre_std < SAME_PLACE:
            problems[f"alike {number}"] = (
                f"scale {number}'s boxes are at the same place in every image (their centers differ by "
                f"{box.centre_std:.3f} of the side): unless the object is too, try a larger pretrain_apn.lr "
                "or more pretrain_apn.epochs"
            )
    accuracies = [scale.top1 for scale in val.scales] if finer else []
    for number, (coarse, fine) in enumerate(itertools.pairwise(accuracies), start=1):
        # Two standard errors as if the images were different ones. They are the same, so the real error is smaller.
        error = math.sqrt(max(coarse * (1 - coarse) + fine * (1 - fine), 0.0) / max(images, 1))
        if images >= FEWEST_IMAGES and coarse - fine > 2 * error:
            problems[f"worse {number}"] = (
                f"scale {number + 1} is less accurate ({fine:.3f}) than scale {number} ({coarse:.3f}): its crop "
                "shows less of what matters; try a larger model.side, more alternate.cnn_epochs, or --scales "
                f"{number}"
            )
    return problems
