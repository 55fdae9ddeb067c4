"""The slope of a loss in a box, measured on boxes around it.

A CNN is rough: how its answer changes when a box moves by a hundredth of a pixel says little about a move as
large as an update makes (`racnn bench gradient`). So the loss is averaged over a neighbourhood of boxes, whose
slope is estimated from the losses of a few boxes drawn from it in opposite pairs; the CNN is frozen, so each
costs one forward pass and no backward one. Known as evolution strategies (Salimans et al. 2017) or a smoothed,
score-function gradient (Williams 1992).
"""

from __future__ import annotations

import torch
from torch import Tensor

from racnn_cli.core import attention


def neighbours(proposals: Tensor, count: int, spread: float, floor: float, ceiling: float) -> Tensor:
    """Boxes around each proposal, in pairs on opposite sides, brought within the bounds.

    The centre moves by `spread` sides (standard deviation), the side by a factor of exp(`spread`). Draws from
    torch's global generator.

    Args:
        proposals: (B, 3).
        count: boxes a proposal, even.
        spread, floor, ceiling: see above and `attention.bound`.

    Returns:
        (count, B, 3).
    """
    noise = torch.randn(count // 2, *proposals.shape, device=proposals.device, dtype=proposals.dtype)
    noise = spread * torch.cat([noise, -noise])  # (count, B, 3)
    half = proposals[:, 2:]
    centre = proposals[:, :2] + 2 * half * noise[..., :2]
    boxes = torch.cat([centre, half * noise[..., 2:].exp()], dim=2)
    return attention.bound(boxes.flatten(0, 1), floor, ceiling).view(boxes.shape)


def perturbed_loss(proposals: Tensor, tried: Tensor, losses: Tensor, spread: float) -> Tensor:
    """The mean of the losses, with the gradient that they imply for the proposals.

    The gradient is taken in the coordinates in which the boxes were drawn, centre over side and logarithm of
    the side, and per unit of `spread`, from the displacements that were really made.

    Args:
        proposals: (B, 3), the APN's.
        tried: (count, B, 3) boxes around them.
        losses: (count, B), one a box.
        spread: as in `neighbours`.

    Returns:
        a scalar.
    """
    here, half = proposals.detach(), proposals.detach()[:, 2:]
    moves = torch.cat(
        [(tried[..., :2] - here[:, :2]) / (2 * half), (tried[..., 2:] / half).log()], dim=2
    )  # (count, B, 3)
    moves = moves - moves.mean(dim=0)
    excess = losses - losses.mean(dim=0)  # (count, B)
    slope = (excess[..., None] * moves).mean(dim=0) / spread**2  # (B, 3)
    coordinates = torch.cat([proposals[:, :2] / (2 * half), proposals[:, 2:].log()], dim=1)
    carrier = (slope * coordinates).sum(dim=1).mean()
    return losses.mean() + carrier - carrier.detach()
