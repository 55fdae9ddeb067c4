"""The plain backbone that a run is compared with, under the same budget."""

from __future__ import annotations

import math

from racnn_cli.events import Budget
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run, write_json
from racnn_cli.training.compute import Epochs, compute_of, equal_size, plain, training_flops


def baseline_recipe(recipe: Recipe, *, classes: int, epochs: Epochs, size: int | None = None) -> Recipe:
    """The recipe of the plain backbone under the same budget.

    One scale whose input costs at least as much per prediction as all scales together (see `equal_size`), trained for
    as many epochs as cost at least what all stages of the run cost, in FLOPs of forward and backward passes.

    Args:
        recipe: as used by the run, with its sizes resolved.
        classes: number of classes.
        epochs: of each phase of the run.
        size: of the input, instead of that size.
    """
    size = size or equal_size(recipe.override({"seed": 0}), classes)
    single = plain(recipe, size)
    if recipe.model.zoom == "source":
        single = single.override({"data.source": max(recipe.data.source, size)})
    target = training_flops(recipe, classes, epochs)
    count = max(math.ceil(target / training_flops(single, classes, {("pretrain-cnn", ""): 1})), 1)
    return single.override(
        {
            "name": "baseline",
            "about": f"the plain backbone of {recipe.name} under the same budget",
            "baseline": False,
            "onnx": False,
            "pretrain_cnn.epochs": count,
            "pretrain_cnn.patience": 0,
        }
    )


def write_budget(run: Run, baseline: Run, *, images: int) -> None:
    """Write what a run and its baseline cost into the baseline's folder."""
    budget = Budget(run=compute_of(run, images=images), baseline=compute_of(baseline, images=images))
    write_json(baseline.budget, budget.to_json())
