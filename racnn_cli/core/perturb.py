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


def neighbours(proposals: Tensor, count: int, spread: float, chance: Tensor | None = None) -> Tensor:
    """Boxes around each proposal, in pairs on opposite sides, inside the image.

    The centre moves by `spread` sides (standard deviation), the side by a factor of exp(`spread`). The bounds of
    a proposal's side do not hold for them: at a bound, too, the slope needs both directions.

    Args:
        proposals: (B, 3).
        count: boxes a proposal, even.
        spread: see above.
        chance: (B, 3 count / 2), of mean 0 and standard deviation 1; None: from torch's global generator.

    Returns:
        (count, B, 3).
    """
    if chance is None:
        chance = torch.randn(len(proposals), 3 * (count // 2), device=proposals.device)
    move = spread * chance.to(proposals.dtype).view(len(proposals), count // 2, 3).transpose(0, 1)
    # What the image's border takes from one box of a pair, its opposite gives up too: a lopsided pair would turn
    # the curvature of the loss into a slope towards the border.
    for sign in (1, -1, 1):
        move = sign * moved(proposals, _inside(proposals, sign * move))
    return torch.cat([_inside(proposals, move), _inside(proposals, -move)])


def moved(proposals: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (N, B, 3) from proposals (B, 3): centres in sides of the proposal, logarithm of the side's factor."""
    half = proposals[:, 2:]
    return torch.cat([(boxes[..., :2] - proposals[:, :2]) / (2 * half), (boxes[..., 2:] / half).log()], dim=2)


def _inside(proposals: Tensor, move: Tensor) -> Tensor:
    """The boxes (N, B, 3) that are so far from proposals (B, 3), brought inside the image."""
    half = proposals[:, 2:]
    boxes = torch.cat([proposals[:, :2] + 2 * half * move[..., :2], half * move[..., 2:].exp()], dim=2)
    return attention.bound(boxes.flatten(0, 1), 0.0, 1.0).view(boxes.shape)


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
    here, losses = proposals.detach(), losses.detach()
    moves = moved(here, tried.detach())  # (count, B, 3)
    excess = losses - losses.mean(dim=0)  # (count, B)
    slope = (excess[..., None] * moves).mean(dim=0) / spread**2  # (B, 3)
    coordinates = torch.cat([proposals[:, :2] / (2 * here[:, 2:]), proposals[:, 2:].log()], dim=1)
    carrier = (slope * coordinates).sum(dim=1).mean()
    return losses.mean() + carrier - carrier.detach()
