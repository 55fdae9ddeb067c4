"""Boxes in the place of the APNs': the true ones, and others of the same size anywhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from racnn_cli.core import attention
from racnn_cli.training.stages import Batch, Guide


def true_boxes(scales: int, floor: float, ceiling: float) -> Guide:
    """What box annotation would give: the last box is the item's square, those before are around it.

    A coarse box is centred on the item and as tight as the bounds allow, with the item inside it. A picture
    without a true box gets boxes as large as they may be.

    Args:
        scales: of the network, S.
        floor, ceiling: bounds of a box's side, as a share of the scale's before.
    """

    def guide(batch: Batch) -> list[Tensor]:
        centre, item = squares(batch["box"])
        corner, width = torch.zeros_like(centre), torch.ones_like(item)
        proposals = []
        for side in nested_sides(item, scales, floor, ceiling):
            here = torch.cat([(centre - corner) / width, side / 2], dim=1)
            proposal = attention.bound(here, floor, ceiling)
            corner = corner + width * (proposal[:, :2] - proposal[:, 2:])
            width = width * 2 * proposal[:, 2:]
            proposals.append(proposal)
        return proposals

    return guide


def random_boxes(scales: int, floor: float, ceiling: float, seed: int) -> Guide:
    """Boxes with the sides of the true ones, each at a uniformly random place on the view that it is cut from.

    A place is a function of the seed and of the picture's `index`: it never changes during a training.
    """

    def guide(batch: Batch) -> list[Tensor]:
        item = squares(batch["box"])[1]
        drawn = [np.random.default_rng((seed, int(n))).random((scales - 1, 2)) for n in batch["index"]]
        places = torch.from_numpy(np.stack(drawn)).to(item)  # (B, S - 1, 2)
        sides = nested_sides(item, scales, floor, ceiling)
        return [
            torch.cat([side / 2 + (1 - side) * places[:, number], side / 2], dim=1)
            for number, side in enumerate(sides)
        ]

    return guide


def squares(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest square around each box (B, 4): its centre (B, 2) and its side (B, 1).

    Where there is no box (NaN) it is the whole picture.
    """
    missing = boxes.isnan().any(dim=1, keepdim=True)
    boxes = torch.where(missing, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), boxes)
    return (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)


def nested_sides(item: Tensor, scales: int, floor: float, ceiling: float) -> list[Tensor]:
    """Sides (B, 1) of nested boxes, each as a share of the one before, that end at an item of side (B, 1).

    A coarse box leaves the finer ones no more to do than their ceiling lets them, and is else as small as it
    may be.
    """
    before, sides = torch.ones_like(item), []
    for finer in reversed(range(scales - 1)):
        sides.append((item / (before * ceiling**finer)).clamp(floor, ceiling))
        before = before * sides[-1]
    return sides
