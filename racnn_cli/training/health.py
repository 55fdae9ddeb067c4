"""Warnings read from a run's images and validation figures, each with what to try."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from racnn_cli.data.types import Index
from racnn_cli.events import Validation
from racnn_cli.recipe import Recipe

MAX_AT_BOUND = 0.5  # share of boxes at a size limit above which a warning is given
MIN_SPREAD = 0.01  # standard deviation of box centers below which all boxes count as the same place
MAX_IMBALANCE = 10  # times as many images in the largest class as in the smallest, above which a warning is given
MIN_IMAGES = 20  # with fewer validation images, the scales are not compared


def imbalance(index: Index) -> dict[str, str]:
    """Compare the largest with the smallest class of the training split.

    Returns:
        Kind of warning to its text; empty if the classes are balanced well enough.
    """
    counts = Counter(item.label for item in index.splits["train"])
    (largest, most), *_, (smallest, fewest) = counts.most_common() * 2
    if most <= MAX_IMBALANCE * fewest:
        return {}
    return {
        "imbalance": f"the training split has {most} images of {index.classes[largest]!r} and {fewest} of "
        f"{index.classes[smallest]!r}: try data.limit, which caps the large classes, and compare mean_class, the "
        "mean of the classes' accuracies, instead of top-1"
    }


def warnings(val: Validation, recipe: Recipe, images: int, *, finer: bool = True) -> dict[str, str]:
    """Find signs of a run that goes wrong.

    Args:
        val: validation figures of all scales.
        recipe: the run's recipe.
        images: number of validation images.
        finer: whether the finer scales have been trained on their boxes, so that their accuracy counts.

    Returns:
        Kind of warning to its text; empty if there is none.
    """
    texts = {}
    model = recipe.model
    for scale, boxes in enumerate(val.boxes, start=2):
        if boxes.at_floor > MAX_AT_BOUND:
            texts[f"floor {scale}"] = (
                f"{boxes.at_floor:.0%} of scale {scale}'s boxes have the smallest size allowed "
                f"(side {model.floor:.2f}): try a smaller model.floor, or one more scale"
            )
        if boxes.at_ceiling > MAX_AT_BOUND:
            texts[f"ceiling {scale}"] = (
                f"{boxes.at_ceiling:.0%} of scale {scale}'s boxes have the largest size allowed (side "
                f"{model.ceiling:.2f}), so it sees what scale {scale - 1} sees: try a larger alternate.tighten, "
                "or one scale less (--scales) if the object fills its image"
            )
        if boxes.centre_std < MIN_SPREAD:
            texts[f"alike {scale}"] = (
                f"scale {scale}'s boxes are at the same place in every image (their centers differ by "
                f"{boxes.centre_std:.3f} of the side): unless the object is too, try a larger pretrain_apn.lr "
                "or more pretrain_apn.epochs"
            )
    top1 = [answer.top1 for answer in val.scales] if finer else []
    for scale, (coarse, fine) in enumerate(itertools.pairwise(top1), start=1):
        # Two standard errors of independent samples: conservative, since both scales see the same images.
        error = math.sqrt(max(coarse * (1 - coarse) + fine * (1 - fine), 0.0) / max(images, 1))
        if images >= MIN_IMAGES and coarse - fine > 2 * error:
            texts[f"worse {scale}"] = (
                f"scale {scale + 1} is less accurate ({fine:.3f}) than scale {scale} ({coarse:.3f}), so its crop "
                "may miss the object: try a larger model.side, more alternate.cnn_epochs, or "
                f"--scales {scale}"
            )
    return texts
