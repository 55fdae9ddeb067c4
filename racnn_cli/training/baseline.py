"""The plain backbone that a run is compared with, under the same budget."""

from __future__ import annotations

import math

from racnn_cli import backbones
from racnn_cli.errors import BackboneError
from racnn_cli.events import RoundEvent
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run


def rounds_run(run: Run) -> int:
    """How many rounds `alternate` ran, from the log."""
    return len({event.round for event in run.read_log() if isinstance(event, RoundEvent)})


def baseline_recipe(recipe: Recipe, *, rounds: int, size: int | None = None) -> Recipe:
    """The recipe of the plain backbone under the same budget, counted in multiply-adds of the convolutions.

    One scale whose input has as many pixels as all scales together (rounded to a multiple of 32, or scale 1's size
    where the backbone takes no other), and as many epochs as cost what the CNN and APN phases cost. An APN phase is
    counted like a CNN phase, in the baseline's favour.

    Args:
        recipe: as used by the run, with its sizes resolved.
        rounds: that `alternate` ran.
        size: of the input, instead of that size.
    """
    sizes = recipe.model.sizes
    if size is None:
        size = max(round(math.sqrt(sum(side * side for side in sizes)) / 32) * 32, sizes[0])
        try:
            backbones.build(recipe.model.backbone, size=size, weights="none")
        except BackboneError:
            size = sizes[0]
    phases = recipe.alternate.cnn_epochs_in(rounds) + rounds * recipe.alternate.apn_epochs
    cost = recipe.pretrain_cnn.epochs * sizes[0] ** 2 + phases * sum(side * side for side in sizes)
    epochs = max(math.ceil(cost / size**2), 1)
    return recipe.override(
        {
            "name": "baseline",
            "about": f"the plain backbone of {recipe.name} under the same budget",
            "baseline": False,
            "onnx": False,
            "model.scales": 1,
            "model.sizes": [size],
            "data.source": max(recipe.data.source, size) if recipe.model.zoom == "source" else size,
            "pretrain_cnn.epochs": epochs,
            # Its best epoch on the validation split is kept, as the best round of the run is.
            "pretrain_cnn.patience": epochs,
        }
    )
