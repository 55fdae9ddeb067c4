"""The two losses of RA-CNN (Fu et al. 2017, equations 8 and 9)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (B, N) and labels (B,) (first term of equation 8)."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def rank_loss(
    coarse: Tensor, fine: Tensor, labels: Tensor, margin: float = 0.05, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Pairwise rank loss: the finer scale should be more confident of the true class than the coarser one.

    `max(0, p_t(coarse) - p_t(fine) + margin)` (equation 9), where p_t is the softmax probability of the true class.
    The coarse scale is detached, because otherwise making it worse would lower the loss.

    Args:
        coarse: (B, N) logits of scale s.
        fine: (B, N) logits of scale s + 1.
        labels: (B,) true classes.
        margin: required difference of the two probabilities.
        reduction: `mean` over the batch, or `none` for one loss per image.

    Returns:
        a scalar, or (B,) for `none`.
    """
    reference = coarse.detach().float().softmax(dim=1).gather(1, labels[:, None])  # (B, 1)
    confidence = fine.float().softmax(dim=1).gather(1, labels[:, None])  # (B, 1)
    losses = F.relu(reference - confidence + margin)[:, 0]
    return losses.mean() if reduction == "mean" else losses
