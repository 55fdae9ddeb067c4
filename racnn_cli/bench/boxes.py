"""Boxes that do not come from an APN: ground-truth boxes, and boxes of the same size at random positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from racnn_cli.core import attention
from racnn_cli.recipe import Recipe
from racnn_cli.training.phases import LEARNED, Batch, BoxSource

Proposals = Callable[[Batch], list[Tensor]]
Targets = Callable[[Batch, Tensor, int], Tensor]
BoxKind = Literal["apn", "true", "random", "taught"]
"""Where boxes come from; `taught`: from APNs that are trained on ground-truth boxes."""


def box_source(kind: BoxKind, recipe: Recipe) -> BoxSource:
    """Return the boxes of this kind for a recipe."""
    bounds = (recipe.model.scales, recipe.model.floor, recipe.model.ceiling)
    sources = {
        "apn": LEARNED,
        "true": BoxSource(proposals=true_boxes(*bounds)),
        "random": BoxSource(proposals=random_boxes(true_boxes(*bounds), seed=recipe.seed)),
        "taught": BoxSource(targets=true_targets(*bounds)),
    }
    return sources[kind]


def true_boxes(scales: int, floor: float, ceiling: float) -> Proposals:
    """Propose the square around the ground-truth box to the last scale, and squares that contain it to those before.

    A coarser box is centered on the ground-truth box and as small as the bounds allow. Images without a ground-truth
    box get boxes of the largest size.

    Args:
        scales: number of scales S.
        floor, ceiling: bounds of a box's side, as a share of the side of the scale before.
    """
    target = true_targets(scales, floor, ceiling)

    def propose(batch: Batch) -> list[Tensor]:
        box, boxes = attention.full_box(batch["box"]), []
        for number in range(scales - 1):
            boxes.append(target(batch, box, number))
            box = attention.compose(box, boxes[-1])
        return boxes

    return propose


def true_targets(scales: int, floor: float, ceiling: float) -> Targets:
    """Target the ground-truth box relative to what a scale sees, wherever that is; arguments as in `true_boxes`.

    A target is no smaller than needed: the zooms after it can reach the ground-truth box at their ceiling.
    """

    def target(batch: Batch, parent: Tensor, number: int) -> Tensor:
        box = attention.relative(parent, enclosing_squares(batch["box"]))
        finer_zooms = scales - 2 - number
        side = box[:, 2:] / ceiling**finer_zooms
        return attention.bound(torch.cat([box[:, :2], side], dim=1), floor, ceiling)

    return target


def random_boxes(true: Proposals, *, seed: int) -> Proposals:
    """Propose boxes with the sides of `true`, at uniformly random positions on the view that they are cut from.

    A position depends on the seed and the image's `index` only, so it is the same in every epoch.
    """

    def propose(batch: Batch) -> list[Tensor]:
        halves = [box[:, 2:] for box in true(batch)]
        draws = [np.random.default_rng((seed, int(n))).random((len(halves), 2)) for n in batch["index"]]
        positions = torch.from_numpy(np.stack(draws)).to(batch["box"])  # (B, S - 1, 2)
        return [
            torch.cat([half + (1 - 2 * half) * positions[:, number], half], dim=1) for number, half in enumerate(halves)
        ]

    return propose


def enclosing_squares(boxes: Tensor) -> Tensor:
    """Return the smallest squares (B, 3) around boxes (B, 4); the whole image where there is no box (NaN)."""
    missing = boxes.isnan().any(dim=1, keepdim=True)
    boxes = torch.where(missing, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), boxes)
    side = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, side / 2], dim=1)
