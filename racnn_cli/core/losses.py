"""The two losses of RA-CNN (paper, equations 8 and 9)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (B, N) against labels (B,)."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def rank_loss(
    coarse: Tensor,
    fine: Tensor,
    labels: Tensor,
    margin: float = 0.05,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Pairwise rank loss: the finer scale shall be surer of the true class than the coarser one.

    `max(0, p_t(coarse) - p_t(fine) + margin)`, mean over the batch, p_t the softmax probability of the true
    class. The coarse scale is the reference: it is detached, or the loss could be met by making it worse.

    Args:
        coarse, fine: logits (B, N) of scale s and of scale s + 1.
        labels: (B,) true classes.
        margin: how much surer.
        reduction: the batch's mean, or one loss an image (B,).
    """
    reference = coarse.detach().float().softmax(dim=1).gather(1, labels[:, None])  # (B, 1)
    chosen = fine.float().softmax(dim=1).gather(1, labels[:, None])  # (B, 1)
    losses = F.relu(reference - chosen + margin)[:, 0]
    return losses.mean() if reduction == "mean" else losses
