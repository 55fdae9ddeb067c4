"""How good: accuracy, likelihood and calibration of predictions, and where boxes lie against the truth.

Shapes: B images, N classes. A proposal is `(tx, ty, tl)`, centre and half side; a ground-truth box is
`(x0, y0, x1, y1)`, both in [0, 1] of the same picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15  # of the calibration error, as in Guo et al., ICML 2017
NEAR = 0.02  # a bound is only ever approached: a side within 2 % of it counts as being at it


class Tally:
    """Figures of one classifier over a whole split, added up batch by batch; keeps 8 bytes an image."""

    def __init__(self, classes: int) -> None:
        self.classes, self.images = classes, 0
        self._top1 = self._top5 = self._nll = 0.0
        self._bins = torch.zeros(
            3, BINS, dtype=torch.float64
        )  # images, confidence, right answers of each bin
        self._pairs: list[Tensor] = []  # truth times N plus answer, of every image

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: log-probabilities (B, N), labels (B,)."""
        scores, labels = log_probabilities.detach().cpu().double(), labels.cpu()
        self.images += len(labels)
        right = topk(scores, labels, 1)
        self._top1 += right.sum().item()
        self._top5 += topk(scores, labels, 5).sum().item()
        self._nll -= scores.gather(1, labels[:, None]).sum().item()
        confidence, answer = scores.exp().max(dim=1)
        cell = (confidence * BINS).long().clamp(0, BINS - 1)
        self._bins.index_add_(1, cell, torch.stack([torch.ones_like(confidence), confidence, right.double()]))
        self._pairs.append(labels * self.classes + answer)

    def figures(self) -> dict[str, float]:
        """`top1`, `top5` (of min(5, N)), `nll` (mean, in nats), `ece` (15 equal bins, weighted by images)."""
        count = max(self.images, 1)
        _, confidence, right = self._bins
        return {
            "top1": self._top1 / count,
            "top5": self._top5 / count,
            "nll": self._nll / count,
            "ece": (confidence - right).abs().sum().item() / count,
        }

    def confusion(self) -> Tensor:
        """(K, 3) int64: each class, what it was taken for, and how many images that were; in this order."""
        pairs = torch.cat([*self._pairs, torch.zeros(0, dtype=torch.int64)])
        found, images = pairs.unique(return_counts=True)
        return torch.stack([found // self.classes, found % self.classes, images], dim=1)

    def per_class(self) -> list[tuple[float | None, int]]:
        """Of each class: the share of its images that were named right (None without any), and how many."""
        truth, answer, images = self.confusion().unbind(dim=1)
        count = torch.zeros(self.classes, dtype=torch.int64).index_add_(0, truth, images)
        right = torch.zeros_like(count).index_add_(0, truth, images * (truth == answer))
        return [(r / n if n else None, n) for r, n in zip(right.tolist(), count.tolist(), strict=True)]


def topk(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Is the true class among the min(k, N) best? Scores (B, N), labels (B,) to bool (B,)."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1)


def wilson(share: float, images: int) -> tuple[float, float]:
    """95 % interval of a share that was counted over so many images (Wilson, 1927)."""
    if not images:
        return 0.0, 1.0
    z = 1.959963984540054
    middle = share + z * z / (2 * images)
    spread = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    scale = 1 + z * z / images
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def corners(proposals: Tensor) -> Tensor:
    """Proposals (B, 3) to their corners (B, 4)."""
    return torch.cat([proposals[:, :2] - proposals[:, 2:], proposals[:, :2] + proposals[:, 2:]], dim=1)


def iou(proposals: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union (B,) of proposals (B, 3) with true boxes (B, 4)."""
    both = _intersection(proposals, truth)
    return both / (_area(corners(proposals)) + _area(truth) - both)


def coverage(proposals: Tensor, truth: Tensor) -> Tensor:
    """Share (B,) of the true boxes' (B, 4) area that lies inside the proposals (B, 3)."""
    return _intersection(proposals, truth) / _area(truth)


def hit(proposals: Tensor, truth: Tensor) -> Tensor:
    """Does the centre of the true box (B, 4) lie inside the proposal (B, 3)? Bool (B,)."""
    centre = (truth[:, :2] + truth[:, 2:]) / 2
    return ((centre - proposals[:, :2]).abs() <= proposals[:, 2:]).all(dim=1)


def at_bounds(sides: Tensor, floor: float, ceiling: float) -> tuple[Tensor, Tensor]:
    """Which boxes are as small, and which as large, as they may be? Sides (B,) to two of bool (B,)."""
    return sides <= floor * (1 + NEAR), sides >= ceiling * (1 - NEAR)


def against(proposals: Tensor, truth: Tensor) -> Tensor:
    """IoU, hit and coverage (B', 3) of the proposals (B, 3) that have a true box (B, 4).

    One of no area (or NaN) was cut away when the picture was made square, or never known: nothing is to be found.
    """
    there = ((truth[:, 2:] - truth[:, :2]) > 0).all(dim=1)
    proposals, truth = proposals[there], truth[there]
    return torch.stack([measure(proposals, truth).float() for measure in (iou, hit, coverage)], dim=1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


def _intersection(proposals: Tensor, truth: Tensor) -> Tensor:
    found = corners(proposals)
    low = torch.maximum(found[:, :2], truth[:, :2])
    high = torch.minimum(found[:, 2:], truth[:, 2:])
    return (high - low).clamp_min(0).prod(dim=1)
