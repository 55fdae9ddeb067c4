"""Cost of a network in multiply-adds, and the input size at which the plain backbone costs as much."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from racnn_cli.core.model import RACNN, build
from racnn_cli.errors import BackboneError
from racnn_cli.recipe import Recipe


class Compute(NamedTuple):
    """Input side of the plain backbone at equal compute, and the multiply-adds of all scales."""

    size: int
    scales: int


@torch.no_grad()
def multiply_adds(model: RACNN) -> int:
    """Count the multiply-adds for one image: backbones, APNs, crops of the recipe's side, classifiers and fusion.

    With one scale, resizing the image is not counted.
    """
    model.eval()
    scales, half = [model.scale(number) for number in range(len(model.sizes))], model.side / 2
    boxes = [torch.tensor([[0.5, 0.5, half]])] * (len(scales) - 1)
    with FlopCounterMode(display=False) as counter:
        if len(scales) == 1:
            size = model.sizes[0]
            scales[0].classify(scales[0].backbone(torch.zeros(1, 3, size, size)))
        else:
            model(torch.zeros(1, 3, model.source, model.source), boxes)
        for scale in scales:
            if scale.apn is not None:
                scale.apn(torch.zeros(1, scale.backbone.channels, *scale.backbone.map_size))
    return counter.get_total_flops() // 2


def plain_multiply_adds(recipe: Recipe, classes: int, size: int) -> int:
    """Count the multiply-adds of the recipe's backbone alone, for one image of `size` pixels.

    Raises:
        BackboneError: the backbone does not take this size.
    """
    plain = recipe.model.model_copy(update={"scales": 1, "sizes": (size,)})
    return multiply_adds(build(plain, classes, source=size, weights="none"))


@lru_cache(maxsize=8)
def equal_compute(recipe: Recipe, classes: int) -> Compute:
    """Find the smallest input, in steps of the backbone's stride, that costs at least as much as all scales.

    A backbone that takes no other size keeps that of scale 1.

    Args:
        recipe: with its sizes resolved.
        classes: number of classes.
    """
    model = build(recipe.model, classes, source=recipe.data.source, weights="none")
    target, backbone = multiply_adds(model), model.scale(0).backbone
    stride = max(round(backbone.input_size / backbone.map_size[0]), 1)
    size = round(sum(side * side for side in model.sizes) ** 0.5 / stride) * stride
    try:
        while plain_multiply_adds(recipe, classes, size) < target:
            size += stride
        while plain_multiply_adds(recipe, classes, size - stride) >= target:
            size -= stride
    except BackboneError:
        size = backbone.input_size
    return Compute(size, target)
