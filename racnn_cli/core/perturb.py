"""The gradient of a loss with respect to a box, estimated from the losses of boxes around it.

The loss of a CNN is rough in the box: its derivative predicts little about a step as large as an update's
(`racnn bench gradient`). So the loss is averaged over a neighborhood of boxes, and the gradient of that average is
estimated from a few antithetic pairs of samples. The CNN is frozen, so each sample costs one forward pass and no
backward pass. Known as evolution strategies (Salimans et al. 2017) or a score-function gradient (Williams 1992).

An offset of a box is `(dx, dy, r)`: the shift of its center and the change of its side, as shares of its side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 0.9  # change of the side, so that a box keeps a tenth of it
NODES = 64  # of the quadrature over the change of the side
FLOOR = 2e-6  # smallest second moment of an offset, as a share of that without bounds


def neighbours(proposals: Tensor, count: int, spread: float, noise: Tensor | None = None) -> Tensor:
    """Sample boxes around each proposal, in antithetic pairs inside the image.

    Offsets are normal with standard deviation `spread`, clamped so that a box and its mirror image both lie inside the
    image: an asymmetric pair would turn the loss's curvature into a gradient towards the border. The bounds of a
    proposal's side do not apply here, because the gradient needs samples in both directions at a bound too.

    Args:
        proposals: (B, 3).
        count: boxes per proposal, even.
        spread: see above.
        noise: (B, 3 count / 2) samples from a standard normal; None draws them from torch's global generator.

    Returns:
        (count, B, 3).
    """
    if noise is None:
        noise = torch.randn(len(proposals), 3 * (count // 2), device=proposals.device)
    drawn = spread * noise.to(proposals.dtype).view(len(proposals), count // 2, 3).transpose(0, 1)
    change = _clamp_change(drawn[..., 2:], proposals)
    low, high = _shift_bounds(proposals, change)
    shift = torch.minimum(torch.maximum(drawn[..., :2], low), high)
    half = proposals[:, 2:]
    moves = torch.cat([2 * half * shift, half * change], dim=2)
    return torch.cat([proposals + moves, proposals - moves])


def _clamp_change(change: Tensor, proposals: Tensor) -> Tensor:
    """Clamp changes of the side (N, B, 1) to those with which a box and its mirror image fit into the image."""
    limit = _largest_change(proposals)
    return torch.minimum(torch.maximum(change, -limit), limit)


def _largest_change(proposals: Tensor) -> Tensor:
    return (0.5 / proposals[:, 2:] - 1).clamp(0, LARGEST)  # (B, 1)


def _shift_bounds(proposals: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (N, B, 2) of the shift with which a box of a changed side (N, B, 1) and its mirror image fit."""
    half = proposals[:, 2:]
    before = (proposals[:, :2] - half) / (2 * half)  # distance to the left and upper border, in sides
    after = (1 - proposals[:, :2] - half) / (2 * half)
    low = torch.maximum(change / 2 - before, -change / 2 - after)
    high = torch.minimum(after - change / 2, before + change / 2)
    return low, torch.maximum(low, high)  # rounding could exchange them


def perturbed_loss(proposals: Tensor, boxes: Tensor, losses: Tensor, spread: float) -> Tensor:
    """Return the mean loss, with the estimated gradient with respect to the proposals.

    The mean of loss times offset is the gradient times the second moments of the offsets. These are `spread`² where
    nothing is clamped. Near a border and for large boxes the offsets are shorter, and a change of the side comes with a
    shift. So the moments are computed for each proposal and divided out.

    Args:
        proposals: (B, 3), the APN's output.
        boxes: (count, B, 3) sampled around them.
        losses: (count, B), one per box.
        spread: as in `neighbours`.

    Returns:
        a scalar.
    """
    fixed, boxes, losses = proposals.detach(), boxes.detach(), losses.detach()
    half = fixed[:, 2:]
    offsets = torch.cat([(boxes[..., :2] - fixed[:, :2]) / (2 * half), boxes[..., 2:] / half - 1], dim=2)
    advantage = losses - losses.mean(dim=0)  # (count, B)
    product = (advantage[..., None] * offsets).mean(dim=0)  # (B, 3)
    second_moments = offset_moments(fixed, spread)
    scale = second_moments.diagonal(dim1=1, dim2=2).rsqrt()  # to a unit diagonal: single precision then suffices
    gradient = scale * torch.linalg.solve(scale[:, :, None] * second_moments * scale[:, None], scale * product)
    coordinates = torch.cat([proposals[:, :2] / (2 * half), proposals[:, 2:] / half], dim=1)
    surrogate = (gradient * coordinates).sum(dim=1).mean()
    return losses.mean() + surrogate - surrogate.detach()


def offset_moments(proposals: Tensor, spread: float) -> Tensor:
    """Second moments (B, 3, 3) of the offsets that `neighbours` draws around proposals (B, 3), with a floor.

    For a given change of the side, the shifts are independent clamped normal variables, whose moments are known; over
    the change of the side they are averaged numerically.
    """
    limit = _largest_change(proposals).clamp_max(5 * spread)  # (B, 1); a normal variable is not further away
    steps = (torch.arange(NODES, device=proposals.device, dtype=proposals.dtype) + 0.5) / NODES
    inside = torch.exp(-(steps * limit / spread).square() / 2)  # (B, NODES)
    inside = inside / inside.sum(dim=1, keepdim=True) * torch.erf(limit / spread / math.sqrt(2))
    weights = torch.cat([inside, 1 - inside.sum(dim=1, keepdim=True)], dim=1).T[..., None]  # the last: clamped
    change = (torch.cat([steps, steps.new_ones(1)]) * limit).T[..., None]  # (NODES + 1, B, 1), positive: of each pair
    low, high = (bounds / spread for bounds in _shift_bounds(proposals, change))
    below, above = torch.special.ndtr(low), torch.special.ndtr(-high)  # shares that are clamped
    density_low, density_high = (torch.exp(-bounds.square() / 2) / math.sqrt(2 * math.pi) for bounds in (low, high))
    mean = low * below + high * above + density_low - density_high
    square = low.square() * below + high.square() * above + 1 - below - above + low * density_low - high * density_high
    means = torch.cat([spread * mean, change], dim=2)  # (NODES + 1, B, 3)
    second_moments = torch.einsum("nbi,nbj->bij", weights * means, means)
    squares = (weights * torch.cat([spread**2 * square, change.square()], dim=2)).sum(dim=0)  # (B, 3)
    second_moments.diagonal(dim1=1, dim2=2).copy_(squares + FLOOR * spread**2)
    return second_moments
