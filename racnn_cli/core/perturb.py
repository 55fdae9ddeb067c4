"""The gradient of a loss with respect to a box, estimated from the losses of boxes around it.

The loss of a CNN is rough in the box: its derivative predicts little about a step as large as an update's
(`racnn bench gradient`). So the loss is averaged over a neighborhood of boxes, and the gradient of that average is
estimated from a few antithetic pairs of samples. The CNN is frozen, so each sample costs one forward pass and no
backward pass. Known as evolution strategies (Salimans et al. 2017) or a score-function gradient (Williams 1992).
"""

from __future__ import annotations

import torch
from torch import Tensor

from racnn_cli.core import attention


def neighbours(proposals: Tensor, count: int, spread: float, noise: Tensor | None = None) -> Tensor:
    """Sample boxes around each proposal, in antithetic pairs inside the image.

    The standard deviation is `spread` sides for the center and `spread` for the log side. The bounds of a proposal's
    side do not apply here, because the gradient needs samples in both directions at a bound too.

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
    offsets = spread * noise.to(proposals.dtype).view(len(proposals), count // 2, 3).transpose(0, 1)
    # Where the image's border shortens one offset of a pair, the other is shortened too: an asymmetric pair would
    # turn the loss's curvature into a gradient towards the border.
    for sign in (1, -1, 1):
        offsets = sign * _offsets(proposals, _displace(proposals, sign * offsets))
    return torch.cat([_displace(proposals, offsets), _displace(proposals, -offsets)])


def _offsets(proposals: Tensor, boxes: Tensor) -> Tensor:
    """Offsets of boxes (N, B, 3) from proposals (B, 3): center in sides of the proposal, and log of the side ratio."""
    half = proposals[:, 2:]
    return torch.cat([(boxes[..., :2] - proposals[:, :2]) / (2 * half), (boxes[..., 2:] / half).log()], dim=2)


def _displace(proposals: Tensor, offsets: Tensor) -> Tensor:
    """Boxes at offsets (N, B, 3) from proposals (B, 3), clamped to the image."""
    half = proposals[:, 2:]
    boxes = torch.cat([proposals[:, :2] + 2 * half * offsets[..., :2], half * offsets[..., 2:].exp()], dim=2)
    return attention.bound(boxes.flatten(0, 1), 0.0, 1.0).view(boxes.shape)


def perturbed_loss(proposals: Tensor, boxes: Tensor, losses: Tensor, spread: float) -> Tensor:
    """Return the mean loss, with the estimated gradient with respect to the proposals.

    The gradient is estimated in the coordinates the boxes were sampled in (center over side, log side), from their
    offsets after clamping.

    Args:
        proposals: (B, 3), the APN's output.
        boxes: (count, B, 3) sampled around them.
        losses: (count, B), one per box.
        spread: as in `neighbours`.

    Returns:
        a scalar.
    """
    fixed, losses = proposals.detach(), losses.detach()
    offsets = _offsets(fixed, boxes.detach())  # (count, B, 3)
    advantage = losses - losses.mean(dim=0)  # (count, B)
    gradient = (advantage[..., None] * offsets).mean(dim=0) / spread**2  # (B, 3)
    coordinates = torch.cat([proposals[:, :2] / (2 * fixed[:, 2:]), proposals[:, 2:].log()], dim=1)
    surrogate = (gradient * coordinates).sum(dim=1).mean()
    return losses.mean() + surrogate - surrogate.detach()
