"""How good: accuracy, likelihood and calibration of predictions, and where boxes lie against the truth.

Shapes: B images, N classes. A proposal is `(tx, ty, tl)`, centre and half side; a ground-truth box is
`(x0, y0, x1, y1)`, both in [0, 1] of the same image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15  # of the calibration error, as in Guo et al., ICML 2017
NEAR = 0.02  # a bound is only ever approached: a side within 2 % of it counts as being at it


class ClassificationMetrics:
    """Accuracy, likelihood and calibration of one classifier over a split, added up batch by batch.

    Args:
        classes: number of classes N.
    """

    def __init__(self, classes: int) -> None:
        self.classes, self.images = classes, 0
        self._top1 = self._top5 = self._nll = 0.0
        # Images, confidence and correct answers of each bin.
        self._bins = torch.zeros(3, BINS, dtype=torch.float64)
        self._pairs: list[Tensor] = []  # label * N + answer, of every image

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Count a batch: log-probabilities (B, N), labels (B,)."""
        scores, labels = log_probabilities.detach().cpu().double(), labels.cpu()
        self.images += len(labels)
        correct = topk(scores, labels, 1)
        self._top1 += correct.sum().item()
        self._top5 += topk(scores, labels, 5).sum().item()
        self._nll -= scores.gather(1, labels[:, None]).sum().item()
        confidence, answer = scores.exp().max(dim=1)
        cell = (confidence * BINS).long().clamp(0, BINS - 1)
        self._bins.index_add_(
            1, cell, torch.stack([torch.ones_like(confidence), confidence, correct.double()])
        )
        self._pairs.append(labels * self.classes + answer)

    def merge(self, other: ClassificationMetrics) -> None:
        """Count what another one has counted, such as another process's."""
        self.images += other.images
        self._top1 += other._top1
        self._top5 += other._top5
        self._nll += other._nll
        self._bins += other._bins
        self._pairs += other._pairs

    @property
    def top1(self) -> float:
        """Share of correct answers."""
        return self._top1 / max(self.images, 1)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats."""
        return self._nll / max(self.images, 1)

    def figures(self) -> dict[str, float]:
        """`top1`, `top5` (of min(5, N)), `nll`, `ece` (15 equal bins, weighted by images)."""
        count = max(self.images, 1)
        _, confidence, correct = self._bins
        ece = (confidence - correct).abs().sum().item() / count
        return {"top1": self.top1, "top5": self._top5 / count, "nll": self.nll, "ece": ece}

    def confusion(self) -> Tensor:
        """(K, 3) int64: class, answer and how many images, for every pair that occurs, sorted."""
        pairs = torch.cat([*self._pairs, torch.zeros(0, dtype=torch.int64)])
        found, images = pairs.unique(return_counts=True)
        return torch.stack([found // self.classes, found % self.classes, images], dim=1)

    def per_class(self) -> list[tuple[float | None, int]]:
        """For each class: the share of its images that were answered correctly (None without any), and their number."""
        truth, answer, images = self.confusion().unbind(dim=1)
        count = torch.zeros(self.classes, dtype=torch.int64).index_add_(0, truth, images)
        correct = torch.zeros_like(count).index_add_(0, truth, images * (truth == answer))
        return [(c / n if n else None, n) for c, n in zip(correct.tolist(), count.tolist(), strict=True)]


class BoxMetrics:
    """Sides and places of the boxes of one scale over a split, and where they lie against ground-truth boxes.

    Args:
        floor, ceiling: bounds of a box's side, as a share of the side of the scale before.
    """

    def __init__(self, floor: float, ceiling: float) -> None:
        self.floor, self.ceiling = floor, ceiling
        self._proposals: list[Tensor] = []
        self._overlaps: list[Tensor] = []

    def add(self, proposals: Tensor, boxes: Tensor, truth: Tensor) -> None:
        """Count a batch: proposals (B, 3) on the scale before; boxes (B, 3) and truth (B, 4) on the source."""
        self._proposals.append(proposals)
        self._overlaps.append(box_overlap(boxes, truth))  # (B', 3)

    def merge(self, other: BoxMetrics) -> None:
        """Count what another one has counted, such as another process's."""
        self._proposals += other._proposals
        self._overlaps += other._overlaps

    def figures(self) -> dict[str, float]:
        """`side_mean`, `side_min`, `side_max`, `side_std`, `centre_std`, as shares of the scale before; `at_floor`,
        `at_ceiling`, the share of boxes within 2 % of that bound; with ground truth `iou_mean`, `hit_rate`,
        `coverage_mean`."""
        proposals, overlaps = torch.cat(self._proposals), torch.cat(self._overlaps)
        sides = 2 * proposals[:, 2]
        at_floor, at_ceiling = at_bounds(sides, self.floor, self.ceiling)
        spread = proposals.double().std(dim=0, correction=0)
        result = {
            "side_mean": sides.mean().item(),
            "side_min": sides.min().item(),
            "side_max": sides.max().item(),
            "side_std": 2 * spread[2].item(),
            "centre_std": spread[:2].square().mean().sqrt().item(),
            "at_floor": at_floor.float().mean().item(),
            "at_ceiling": at_ceiling.float().mean().item(),
        }
        if len(overlaps):
            names = ("iou_mean", "hit_rate", "coverage_mean")
            result |= dict(zip(names, overlaps.mean(dim=0).tolist(), strict=True))
        return result


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


def box_overlap(proposals: Tensor, truth: Tensor) -> Tensor:
    """IoU, hit and coverage (B', 3) of the proposals (B, 3) that have a true box (B, 4).

    One of no area (or NaN) was cut away when the image was made square, or never known: nothing is to be found.
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
