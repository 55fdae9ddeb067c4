"""Multiply-adds, counted while an image goes through the network, and the plain backbone that costs as many."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from racnn_cli.core.model import RACNN, build
from racnn_cli.errors import BackboneError
from racnn_cli.recipe import Recipe


class Compute(NamedTuple):
    """The plain backbone at equal compute. Attributes: its input side; its multiply-adds; those of all scales."""

    size: int
    plain: int
    scales: int


@torch.no_grad()
def multiply_adds(model: RACNN) -> int:
    """Of one image through the network: backbones, APNs, crops (of the side in the recipe), classifiers, fusion.

    Of a network with one scale, without bringing the image to its size.
    """
    model.eval()
    scales, half = [model.scale(number) for number in range(len(model.sizes))], model.side / 2
    given = [torch.tensor([[0.5, 0.5, half]])] * (len(scales) - 1)
    with FlopCounterMode(display=False) as counter:
        if len(scales) == 1:
            size = model.sizes[0]
            scales[0].classify(scales[0].backbone(torch.zeros(1, 3, size, size)))
        else:
            model(torch.zeros(1, 3, model.source, model.source), given)
        for scale in scales:
            if scale.apn is not None:
                scale.apn(torch.zeros(1, scale.backbone.channels, *scale.backbone.map_size))
    return counter.get_total_flops() // 2


def at_size(recipe: Recipe, classes: int, size: int) -> int:
    """Multiply-adds of the recipe's backbone alone, on images of `size` pixels.

    Raises:
        BackboneError: the backbone takes no such size.
    """
    plain = recipe.model.model_copy(update={"scales": 1, "sizes": (size,)})
    return multiply_adds(build(plain, classes, source=size, weights="none"))


@lru_cache(maxsize=8)
def equal_compute(recipe: Recipe, classes: int) -> Compute:
    """The smallest input, in steps of the backbone's stride, that costs at least what all scales cost together.

    A backbone that takes no other size keeps that of scale 1.

    Args:
        recipe: with its sizes resolved.
        classes: number of classes.
    """
    model = build(recipe.model, classes, source=recipe.data.source, weights="none")
    wanted, first = multiply_adds(model), model.scale(0).backbone
    step = max(round(first.input_size / first.map_size[0]), 1)
    size = round(sum(s * s for s in model.sizes) ** 0.5 / step) * step
    try:
        while at_size(recipe, classes, size) < wanted:
            size += step
        while at_size(recipe, classes, size - step) >= wanted:
            size -= step
    except BackboneError:
        size = first.input_size
    return Compute(size, at_size(recipe, classes, size), wanted)
