"""Metrics: accuracy, likelihood and calibration of predictions, and boxes compared with the ground truth.

Shapes: B images, N classes. A proposal is `(tx, ty, tl)` (center and half side) and a ground-truth box is
`(x0, y0, x1, y1)`, both in [0, 1] of the same image.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from racnn_cli.core import mixture

TEMPERATURES = [2 ** (number / 8) for number in range(-16, 25)]  # 0.25 to 8, among which the best one is chosen
BINS = 15  # of the calibration error (Guo et al., ICML 2017)
TOLERANCE = 0.02  # a side within 2 % of a bound counts as being at it, because proposals only approach it


class ClassificationMetrics:
    """Accuracy, likelihood and calibration of one classifier, accumulated over batches.

    Args:
        classes: number of classes N.
        temperature: of the calibrated probabilities, `softmax(logits / temperature)`.
    """

    def __init__(self, classes: int, temperature: float = 1.0) -> None:
        self.classes, self.temperature, self.images = classes, temperature, 0
        self._top1 = self._top5 = 0.0
        self._nll = torch.zeros(2, dtype=torch.float64)  # as they are, calibrated
        self._nlls = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
        # Images, sum of confidences, correct predictions; as they are, calibrated.
        self._bins = torch.zeros(2, 3, BINS, dtype=torch.float64)
        self._pairs: list[Tensor] = []  # label * N + prediction of every image
        self._per_class = torch.zeros(2, classes, dtype=torch.int64)  # images, correct predictions

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch of log-probabilities (B, N) and labels (B,)."""
        self._nlls -= true_class_scores(log_probabilities, labels).sum(dim=1)
        scores, labels = log_probabilities.detach().cpu().double(), labels.cpu()
        self.images += len(labels)
        correct = topk(scores, labels, 1)
        self._top1 += correct.sum().item()
        self._top5 += topk(scores, labels, 5).sum().item()
        prediction = scores.argmax(dim=1)
        calibrated = scores if self.temperature == 1 else (scores / self.temperature).log_softmax(dim=1)
        for kind, values in enumerate((scores, calibrated)):
            self._nll[kind] -= values.gather(1, labels[:, None]).sum()
            confidence = values.amax(dim=1).exp()
            bins = (confidence * BINS).long().clamp(0, BINS - 1)
            sums = torch.stack([torch.ones_like(confidence), confidence, correct.double()])
            self._bins[kind].index_add_(1, bins, sums)
        self._pairs.append(labels * self.classes + prediction)
        self._per_class.index_add_(1, labels, torch.stack([torch.ones_like(labels), (prediction == labels).long()]))

    def merge(self, other: ClassificationMetrics) -> None:
        """Add the images that another instance accumulated, such as one of another process."""
        self.images += other.images
        self._top1 += other._top1
        self._top5 += other._top5
        self._nll += other._nll
        self._nlls += other._nlls
        self._bins += other._bins
        self._pairs += other._pairs
        self._per_class += other._per_class

    def compare(self, other: ClassificationMetrics) -> tuple[int, int]:
        """Count the images that only this instance, and only the other one, classified right.

        Both must have seen the same images in the same order.
        """
        both = []
        for metrics in (self, other):
            pairs = torch.cat([*metrics._pairs, torch.zeros(0, dtype=torch.int64)])
            both.append(pairs // self.classes == pairs % self.classes)
        mine, theirs = both
        return int((mine & ~theirs).sum()), int((theirs & ~mine).sum())

    @property
    def top1(self) -> float:
        """Accuracy."""
        return self._top1 / max(self.images, 1)

    @property
    def mean_class(self) -> float:
        """Mean over the classes that have images of their accuracy, which a large class cannot dominate."""
        shares = [share for share, _ in self.per_class() if share is not None]
        return statistics.fmean(shares) if shares else 0.0

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats."""
        return self._nll[0].item() / max(self.images, 1)

    def fit_temperature(self) -> tuple[float, float]:
        """Return the one of `TEMPERATURES` that fits these images best, and the mean NLL with it.

        Temperature scaling (Guo et al., ICML 2017).
        """
        best = mixture.fit_temperature(self._nlls, TEMPERATURES)
        return TEMPERATURES[best], self._nlls[best].item() / max(self.images, 1)

    def compute(self) -> dict[str, float]:
        """Return `top1`, `mean_class`, `top5` (of min(5, N)), `nll` and `ece` (15 equal bins, weighted by images), the
        `temperature`, and with it `calibrated_nll` and `calibrated_ece`."""
        count = max(self.images, 1)
        nll, calibrated_nll = (self._nll / count).tolist()
        ece, calibrated_ece = ((self._bins[:, 1] - self._bins[:, 2]).abs().sum(dim=1) / count).tolist()
        figures = {"top1": self.top1, "mean_class": self.mean_class, "top5": self._top5 / count}
        figures |= {"nll": nll, "ece": ece, "temperature": self.temperature}
        return figures | {"calibrated_nll": calibrated_nll, "calibrated_ece": calibrated_ece}

    def confusion(self) -> Tensor:
        """Return (K, 3) int64: true class, predicted class and number of images, sorted, without empty pairs."""
        pairs = torch.cat([*self._pairs, torch.zeros(0, dtype=torch.int64)])
        pairs, images = torch.unique(pairs, return_counts=True)
        return torch.stack([pairs // self.classes, pairs % self.classes, images], dim=1)

    def per_class(self) -> list[tuple[float | None, int]]:
        """Return the accuracy (None without images) and the number of images of each class."""
        return [(correct / n if n else None, n) for n, correct in self._per_class.T.tolist()]

    def never_predicted(self) -> list[tuple[int, int]]:
        """Return the classes that have images and are never predicted, each with its number of images."""
        predicted = set(self.confusion()[:, 1].tolist())
        return [(label, n) for label, (_, n) in enumerate(self.per_class()) if n and label not in predicted]


class BoxMetrics:
    """Sides, positions and ground-truth overlap of one scale's boxes, accumulated over batches.

    Args:
        floor, ceiling: bounds of a box's side, as a fraction of the previous scale's side.
    """

    def __init__(self, floor: float, ceiling: float) -> None:
        self.floor, self.ceiling = floor, ceiling
        self._proposals: list[Tensor] = []
        self._overlaps: list[Tensor] = []

    def add(self, proposals: Tensor, boxes: Tensor, truth: Tensor) -> None:
        """Add a batch: proposals (B, 3) on the previous scale; boxes (B, 3) and ground truth (B, 4) on the source."""
        self._proposals.append(proposals)
        self._overlaps.append(box_overlap(boxes, truth))  # (B', 3)

    def merge(self, other: BoxMetrics) -> None:
        """Add the boxes that another instance accumulated, such as one of another process."""
        self._proposals += other._proposals
        self._overlaps += other._overlaps

    def compute(self) -> dict[str, float]:
        """Return statistics over all boxes.

        `side_mean`, `side_min`, `side_max`, `side_std` and `centre_std` are fractions of the previous scale's side.
        `at_floor` and `at_ceiling` are the fractions of boxes within 2 % of that bound. With ground truth there are
        also `iou_mean`, `hit_rate` and `coverage_mean`.
        """
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


def true_class_scores(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the true class at each of `TEMPERATURES`: of (B, N) and labels (B,), (T, B) on the CPU."""
    scores, labels = log_probabilities.detach().float(), labels.to(log_probabilities.device)[:, None]
    rows = [(scores / value).log_softmax(dim=1).gather(1, labels)[:, 0] for value in TEMPERATURES]
    return torch.stack(rows).cpu().double()


def topk(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return whether the true class is among the min(k, N) best: scores (B, N), labels (B,) to bool (B,)."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1)


def wilson_interval(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion measured on n images (Wilson 1927)."""
    if not images:
        return 0.0, 1.0
    z = 1.959963984540054
    middle = share + z * z / (2 * images)
    spread = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    scale = 1 + z * z / images
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def corners(proposals: Tensor) -> Tensor:
    """Convert proposals (B, 3) to corners (B, 4)."""
    return torch.cat([proposals[:, :2] - proposals[:, 2:], proposals[:, :2] + proposals[:, 2:]], dim=1)


def iou(proposals: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union (B,) of proposals (B, 3) and ground-truth boxes (B, 4)."""
    both = _intersection(proposals, truth)
    return both / (_area(corners(proposals)) + _area(truth) - both)


def coverage(proposals: Tensor, truth: Tensor) -> Tensor:
    """Fraction (B,) of the ground-truth boxes' (B, 4) area inside the proposals (B, 3)."""
    return _intersection(proposals, truth) / _area(truth)


def hit(proposals: Tensor, truth: Tensor) -> Tensor:
    """Whether the center of the ground-truth box (B, 4) lies inside the proposal (B, 3): bool (B,)."""
    centre = (truth[:, :2] + truth[:, 2:]) / 2
    return ((centre - proposals[:, :2]).abs() <= proposals[:, 2:]).all(dim=1)


def at_bounds(sides: Tensor, floor: float, ceiling: float) -> tuple[Tensor, Tensor]:
    """Whether each side (B,) is at its lower and at its upper bound: two bool (B,)."""
    return sides <= floor * (1 + TOLERANCE), sides >= ceiling * (1 - TOLERANCE)


def box_overlap(proposals: Tensor, truth: Tensor) -> Tensor:
    """Return IoU, hit and coverage (B', 3) of the proposals (B, 3) that have a ground-truth box (B, 4).

    Boxes without an area (or NaN) are skipped: they are unknown, or were cropped away with the image's border.
    """
    valid = ((truth[:, 2:] - truth[:, :2]) > 0).all(dim=1)
    proposals, truth = proposals[valid], truth[valid]
    return torch.stack([measure(proposals, truth).float() for measure in (iou, hit, coverage)], dim=1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


def _intersection(proposals: Tensor, truth: Tensor) -> Tensor:
    boxes = corners(proposals)
    low = torch.maximum(boxes[:, :2], truth[:, :2])
    high = torch.minimum(boxes[:, 2:], truth[:, 2:])
    return (high - low).clamp_min(0).prod(dim=1)
