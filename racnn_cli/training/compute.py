"""The compute of a prediction and of training, counted with torch's FlopCounterMode.

A multiply-add is two floating-point operations (FLOPs). Convolutions and matrix products are counted, also those of the
crops, forward and backward, as a phase runs them. Validation is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from racnn_cli.core.model import RACNN, build
from racnn_cli.errors import BackboneError
from racnn_cli.events import Compute
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.training import phases
from racnn_cli.training.loop import freeze_all_but
from racnn_cli.training.phases import Phase

Epochs = Mapping[tuple[str, str], int]
"""Stage and name of a phase to the number of its epochs."""


def epochs_run(run: Run) -> Epochs:
    """Count the epochs of each phase in the log of a run."""
    return Counter((event.stage, event.phase) for event in run.epochs())


def compute_of(run: Run, *, images: int) -> Compute:
    """The compute of a run: of one prediction, and of its training on `images` images, as logged."""
    recipe, classes = run.recipe(), len(run.classes())
    return Compute(
        prediction=prediction_flops(recipe, classes), training=images * training_flops(recipe, classes, epochs_run(run))
    )


def training_flops(recipe: Recipe, classes: int, epochs: Epochs) -> int:
    """FLOPs of training per training image.

    Args:
        recipe: with its sizes resolved.
        classes: number of classes.
        epochs: how long each phase was trained.

    Raises:
        BackboneError: the backbone does not take its size.
    """
    run = frozenset(phase for phase, number in epochs.items() if number)
    costs = _phase_costs(recipe, classes, run)
    return sum(epochs[phase] * cost for phase, cost in costs.items())


@lru_cache(maxsize=8)
def _phase_costs(recipe: Recipe, classes: int, run: frozenset[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """FLOPs per image of the phases that were run."""
    model = _untrained(recipe, classes)
    every = [phases.pretrain_cnn(recipe)]
    if recipe.model.scales > 1:
        every += [phases.pretrain_apn(recipe), phases.cnn_phase(recipe), phases.apn_phase(recipe)]
        every += [phases.fusion(recipe)] if model.fusion is not None else []
    return {(phase.stage, phase.name): phase_flops(model, phase) for phase in every if (phase.stage, phase.name) in run}


def phase_flops(model: RACNN, phase: Phase) -> int:
    """FLOPs of a phase per image, forward and backward, with the boxes of untrained APNs. The gradients are lost."""
    modules = phase.modules(model)
    freeze_all_but(model, modules)
    model.eval()  # a single image has no batch statistics
    batch = {
        "image": torch.zeros(1, 3, model.source, model.source, dtype=torch.uint8),
        "label": torch.zeros(1, dtype=torch.int64),
        "box": torch.full((1, 4), torch.nan),
        "index": torch.zeros(1, dtype=torch.int64),
        "key": torch.zeros(1, dtype=torch.int64),
    }
    with FlopCounterMode(display=False) as counter:
        for _, loss in phase.losses(model, modules, batch):
            loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


@lru_cache(maxsize=16)
def prediction_flops(recipe: Recipe, classes: int) -> int:
    """FLOPs of one prediction, with the boxes of untrained APNs.

    Raises:
        BackboneError: the backbone does not take its size.
    """
    model = _untrained(recipe, classes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, model.source, model.source))
    return counter.get_total_flops()


@lru_cache(maxsize=8)
def equal_size(recipe: Recipe, classes: int) -> int:
    """Find the smallest input of the plain backbone that costs at least as much as all scales.

    In steps of the backbone's stride. A backbone that takes no other size keeps that of scale 1.

    Args:
        recipe: with its sizes resolved.
        classes: number of classes.
    """
    target = prediction_flops(recipe, classes)
    backbone = _untrained(plain(recipe, recipe.model.sizes[0]), classes).scale(0).backbone
    stride = max(round(backbone.input_size / backbone.map_size[0]), 1)

    def costs_enough(size: int) -> bool:
        return prediction_flops(plain(recipe, size), classes) >= target

    size = max(round(sum(side * side for side in recipe.model.sizes) ** 0.5 / stride), 1) * stride
    try:
        while not costs_enough(size):
            size += stride
        while size > stride and costs_enough(size - stride):
            size -= stride
    except BackboneError:
        size = backbone.input_size
    return size


def plain(recipe: Recipe, size: int) -> Recipe:
    """The recipe with one scale, of `size` pixels, on a source of that side."""
    return recipe.override({"model.scales": 1, "model.sizes": [size], "data.source": size})


def _untrained(recipe: Recipe, classes: int) -> RACNN:
    with torch.random.fork_rng(devices=[]):
        return build(recipe.model, classes, source=recipe.data.source, weights="none")
