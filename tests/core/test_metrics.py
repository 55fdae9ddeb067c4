"""Metrics compared with torchmetrics, torchvision and values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)
from torchvision.ops import box_iou

from racnn_cli.core import device, metrics
from racnn_cli.errors import RecipeError


def metrics_of(logits: torch.Tensor, labels: torch.Tensor, batch: int = 7) -> metrics.ClassificationMetrics:
    result = metrics.ClassificationMetrics(logits.shape[1])
    for batch_scores, batch_labels in zip(logits.log_softmax(1).split(batch), labels.split(batch), strict=True):
        result.add(batch_scores, batch_labels)
    return result


@pytest.mark.parametrize("classes", [2, 5, 11])
@pytest.mark.parametrize("sharpness", [0.3, 4.0])
def test_values_agree_with_torchmetrics(classes: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (200,), generator=generator)
    logits = sharpness * torch.randn(200, classes, generator=generator)
    logits[torch.arange(200), labels] += 1.0
    ours = metrics_of(logits, labels)
    values, probabilities = ours.compute(), logits.softmax(1)
    top1 = multiclass_accuracy(probabilities, labels, classes, average="micro")
    top5 = multiclass_accuracy(probabilities, labels, classes, average="micro", top_k=min(5, classes))
    ece = multiclass_calibration_error(probabilities, labels, classes, n_bins=15, norm="l1")
    assert values["top1"] == pytest.approx(top1.item(), abs=1e-6)
    assert values["top5"] == pytest.approx(top5.item(), abs=1e-6)
    assert values["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    assert values["ece"] == pytest.approx(ece.item(), abs=1e-5)
    truth, prediction, images = ours.confusion().unbind(dim=1)
    table = torch.zeros(classes, classes, dtype=torch.int64)
    table[truth, prediction] = images
    assert torch.equal(table, multiclass_confusion_matrix(probabilities, labels, classes))
    each = multiclass_accuracy(probabilities, labels, classes, average="none")
    assert [share for share, _ in ours.per_class()] == pytest.approx(each.tolist(), abs=1e-6)
    macro = multiclass_accuracy(probabilities, labels, classes, average="macro")
    assert values["mean_class"] == pytest.approx(macro.item(), abs=1e-6)
    assert [n for _, n in ours.per_class()] == torch.bincount(labels, minlength=classes).tolist()


def test_a_class_without_images_has_no_accuracy() -> None:
    ours = metrics_of(torch.eye(3)[[0, 0, 2]] * 9, torch.tensor([0, 0, 0]))
    assert ours.per_class() == [(pytest.approx(2 / 3), 3), (None, 0), (None, 0)]
    assert ours.mean_class == ours.top1  # the classes without images do not count
    assert ours.confusion().tolist() == [[0, 0, 2], [0, 2, 1]]
    assert metrics_of(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).confusion().tolist() == []


def test_mean_per_class_accuracy_of_known_counts_and_of_two_processes() -> None:
    # Nine of ten common images and none of two rare ones are correct: 9 of 12, but (0.9 + 0) / 2.
    labels, predictions = torch.tensor([0] * 10 + [1] * 2), torch.tensor([0] * 9 + [1] + [0] * 2)
    first, second = (metrics_of(torch.eye(3)[predictions[s]] * 9, labels[s]) for s in (slice(0, 5), slice(5, 12)))
    first.merge(second)
    assert (first.top1, first.mean_class) == (0.75, 0.45)
    assert first.per_class() == [(0.9, 10), (0.0, 2), (None, 0)]
    assert first.compute()["mean_class"] == 0.45
    assert first.never_predicted() == []
    assert metrics_of(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).mean_class == 0.0


def test_classes_that_are_never_predicted() -> None:
    labels, predictions = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 2, 2, 0, 0])
    ours = metrics_of(torch.eye(4)[predictions] * 9, labels)
    assert ours.never_predicted() == [(1, 2)]  # class 2 is predicted, once and wrongly; class 3 has no image


def test_ten_thousand_classes_without_a_dense_matrix() -> None:
    labels = torch.arange(0, 10_000, 100)
    logits = torch.zeros(100, 10_000)
    logits[torch.arange(100), (labels + torch.arange(100) % 2) % 10_000] = 9.0  # every second one is wrong
    ours = metrics_of(logits, labels)
    assert ours.confusion().shape == (100, 3)
    assert sum(n for _, n in ours.per_class()) == 100
    assert ours.compute()["top1"] == 0.5


def test_values_do_not_depend_on_the_batch_size() -> None:
    logits, labels = torch.randn(50, 4), torch.randint(4, (50,))
    assert metrics_of(logits, labels, 50).compute() == pytest.approx(metrics_of(logits, labels, 3).compute())


def test_boxes_agree_with_torchvision_and_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    half = 0.05 + 0.4 * torch.rand(300, 1, generator=generator)
    proposals = torch.cat([half + (1 - 2 * half) * torch.rand(300, 2, generator=generator), half], dim=1)
    ends = torch.rand(300, 2, 2, generator=generator).sort(dim=1).values
    truth = ends.reshape(300, 4)
    assert torch.allclose(
        metrics.iou(proposals, truth), box_iou(metrics.corners(proposals), truth).diagonal(), atol=1e-6
    )
    # A box in the upper right quarter.
    box = torch.tensor([[0.75, 0.25, 0.25]])
    wide = torch.tensor([[0.25, 0.0, 0.75, 0.5]])  # its right half is inside the box
    low = torch.tensor([[0.6, 0.6, 0.9, 0.9]])
    assert metrics.iou(box, wide).item() == pytest.approx(1 / 3)
    assert metrics.coverage(box, wide).item() == pytest.approx(0.5)
    assert metrics.hit(box, wide).item()
    assert not metrics.hit(box, torch.tensor([[0.2, 0.0, 0.75, 0.5]])).item()
    assert metrics.coverage(box, low).item() == 0.0
    assert metrics.iou(box, low).item() == 0.0


def test_within_two_percent_of_a_bound_counts_as_at_it() -> None:
    at_floor, at_ceiling = metrics.at_bounds(
        torch.tensor([0.50, 0.509, 0.511, 0.783, 0.785, 0.80]), floor=0.5, ceiling=0.8
    )
    assert at_floor.tolist() == [True, True, False, False, False, False]
    assert at_ceiling.tolist() == [False, False, False, False, True, True]


def test_wilson_interval_of_known_counts() -> None:
    assert metrics.wilson_interval(0.9, 20) == pytest.approx((0.6990, 0.9721), abs=1e-4)
    low, high = metrics.wilson_interval(1.0, 10)
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert metrics.wilson_interval(0.0, 0) == (0.0, 1.0)


def test_device() -> None:
    assert device.select_device("cpu").type == "cpu"
    assert device.select_device("auto").type == device.available_devices()[0]
    missing = next((name for name in ("mps", "cuda") if name not in device.available_devices()), None)
    if missing is not None:
        with pytest.raises(RecipeError, match=f"{missing}.* is not on this machine"):
            device.select_device(missing)
