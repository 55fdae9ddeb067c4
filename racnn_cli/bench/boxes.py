"""Boxes instead of the APNs': the true ones, and others of the same size anywhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from racnn_cli.core import attention
from racnn_cli.training.stages import Batch, Guide, Teacher


def true_boxes(scales: int, floor: float, ceiling: float) -> Guide:
    """What box annotation would give: the last box is the item's square, those before are around it.

    A coarse box is centred on the item and as tight as the bounds allow, with the item inside it. An image
    without a true box gets boxes as large as they may be.

    Args:
        scales: of the network, S.
        floor, ceiling: bounds of a box's side, as a share of the scale's before.
    """
    teacher = item_within(scales, floor, ceiling)

    def guide(batch: Batch) -> list[Tensor]:
        box, proposals = attention.full_box(batch["box"]), []
        for number in range(scales - 1):
            proposals.append(teacher(batch, box, number))
            box = attention.compose(box, proposals[-1])
        return proposals

    return guide


def item_within(scales: int, floor: float, ceiling: float) -> Teacher:
    """The true box as an APN could propose it, wherever the views before it have ended up.

    It leaves the finer zooms no more to do than their ceiling lets them, and is else as small as it may be.
    """

    def teacher(batch: Batch, parent: Tensor, number: int) -> Tensor:
        here = attention.relative(parent, squares(batch["box"]))
        finer = scales - 2 - number
        return attention.bound(torch.cat([here[:, :2], here[:, 2:] / ceiling**finer], dim=1), floor, ceiling)

    return teacher


def random_boxes(scales: int, floor: float, ceiling: float, seed: int) -> Guide:
    """Boxes with the sides of the true ones, each at a uniformly random place on the view that it is cut from.

    A place is a function of the seed and of the image's `index`: it never changes during a training.
    """

    true = true_boxes(scales, floor, ceiling)

    def guide(batch: Batch) -> list[Tensor]:
        drawn = [np.random.default_rng((seed, int(n))).random((scales - 1, 2)) for n in batch["index"]]
        places = torch.from_numpy(np.stack(drawn)).to(batch["box"])  # (B, S - 1, 2)
        halves = [proposal[:, 2:] for proposal in true(batch)]
        return [
            torch.cat([half + (1 - 2 * half) * places[:, number], half], dim=1)
            for number, half in enumerate(halves)
        ]

    return guide


def squares(boxes: Tensor) -> Tensor:
    """The smallest square (B, 3) around each box (B, 4); where there is no box (NaN) it is the whole image."""
    missing = boxes.isnan().any(dim=1, keepdim=True)
    boxes = torch.where(missing, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), boxes)
    side = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, side / 2], dim=1)
