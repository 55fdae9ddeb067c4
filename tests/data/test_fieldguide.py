"""The drawn birds: one small part tells the class, its box is exact, and nothing else depends on the class."""

from __future__ import annotations

import csv
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from racnn_cli.data.datasets import fieldguide
from racnn_cli.data.datasets.fieldguide import CLASSES, draw, write

SIDE = 160
LABELS = range(len(CLASSES))


def inside(boxes: list[tuple[float, float, float, float]], side: int, margin: float) -> np.ndarray:
    """Mask (side, side) of the boxes x, y, w, h, each enlarged by `margin` pixels."""
    mask = np.zeros((side, side), dtype=bool)
    for x, y, w, h in boxes:
        left, top = (max(0, int(np.floor(v - margin))) for v in (x, y))
        mask[top : int(np.ceil(y + h + margin)), left : int(np.ceil(x + w + margin))] = True
    return mask


def change(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Difference of each pixel (H, W), the largest of the three channels."""
    return np.abs(first.astype(int) - second.astype(int)).max(axis=2)


def test_an_image_is_a_function_of_its_seed_and_index() -> None:
    image, box = draw(2, size=SIDE, seed=7, index=3)
    repeated, repeated_box = draw(2, size=SIDE, seed=7, index=3)
    assert np.array_equal(image, repeated)
    assert box == repeated_box
    for seed, index in ((7, 4), (8, 3)):
        other, other_box = draw(2, size=SIDE, seed=seed, index=index)
        assert change(image, other).mean() > 5
        assert other_box != box


@pytest.mark.parametrize("index", range(5))
def test_two_classes_differ_in_their_parts_and_nowhere_else(index: int) -> None:
    drawn = [draw(label, size=SIDE, seed=1, index=index) for label in LABELS]
    for first in LABELS:
        for second in range(first):
            (image, box), (other, other_box) = drawn[first], drawn[second]
            differs = change(image, other)
            outside = ~inside([box, other_box], SIDE, margin=1)
            assert differs[outside].max() == 0, (CLASSES[first], CLASSES[second])
            assert differs.max() > 40, (CLASSES[first], CLASSES[second])


@pytest.mark.parametrize("label", LABELS, ids=CLASSES)
def test_the_box_fits_the_part(label: int) -> None:
    # Compared with a class whose part lies elsewhere, only the part itself changes in the box.
    elsewhere = CLASSES.index("red-legs") if "legs" not in CLASSES[label] else CLASSES.index("eye-ring")
    for index in range(3):
        image, (x, y, w, h) = draw(label, size=SIDE, seed=4, index=index)
        other, _ = draw(elsewhere, size=SIDE, seed=4, index=index)
        differs = (change(image, other) > 6) & inside([(x, y, w, h)], SIDE, margin=1)
        rows, columns = np.nonzero(differs)
        assert np.ptp(columns) + 1 >= 0.7 * w
        assert np.ptp(rows) + 1 >= 0.7 * h


def test_boxes_lie_inside_the_images_and_are_small() -> None:
    for label in LABELS:
        longest = []
        for index in range(8):
            _, (x, y, w, h) = draw(label, size=64, seed=2, index=index)
            assert min(x, y) >= 0
            assert max(x + w, y + h) <= 64
            longest.append(max(w, h) / 64)
        assert min(longest) > 0.05
        assert max(longest) < 0.15
        assert 0.06 < np.mean(longest) < 0.13


def test_birds_face_both_ways_and_sit_anywhere() -> None:
    beaks = np.array([draw(0, size=64, seed=3, index=index)[1][:2] for index in range(16)])
    legs = np.array([draw(7, size=64, seed=3, index=index)[1][:2] for index in range(16)])
    facing_right = (beaks > legs)[:, 0].mean()
    assert 0.2 < facing_right < 0.8
    assert np.all(np.ptp(beaks, axis=0) > 16)


@pytest.mark.parametrize("size", [64, 160, 512])
def test_any_size_shows_the_same_image(size: int) -> None:
    image, box = draw(4, size=size, seed=5, index=1)
    reference, reference_box = draw(4, size=256, seed=5, index=1)
    another, _ = draw(4, size=256, seed=5, index=2)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert np.allclose(np.array(box) / size, np.array(reference_box) / 256, atol=1e-9)

    reduced = [
        np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BOX), dtype=float)
        for pixels in (image, reference, another)
    ]
    assert np.abs(reduced[0] - reduced[1]).mean() < 2
    assert np.abs(reduced[0] - reduced[2]).mean() > 10


def test_a_written_set_is_balanced_and_described_by_its_csv(tmp_path: Path, monkeypatch) -> None:
    drawn: dict[int, tuple[np.ndarray, tuple[float, ...]]] = {}

    def fill(label: int, *, size: int, seed: int, index: int) -> tuple[np.ndarray, tuple[float, ...]]:
        """Instead of a bird, which takes longer: an image and a box that show what they were drawn for."""
        drawn[index] = np.full((size, size, 3), (label, seed, index), np.uint8), (index / 7, label, 5.25, 6.5)
        return drawn[index]

    monkeypatch.setattr(fieldguide, "draw", fill)
    table = write(tmp_path / "birds", images=160, size=64, seed=11)
    assert table == tmp_path / "birds" / "labels.csv"
    with table.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    assert reader.fieldnames == ["path", "label", "split", "x", "y", "w", "h"]
    assert Counter((row["label"], row["split"]) for row in rows) == {
        (name, split): count for name in CLASSES for split, count in (("train", 12), ("val", 3), ("test", 5))
    }
    assert {row["path"] for row in rows} == {
        path.relative_to(table.parent).as_posix() for path in table.parent.rglob("*.png")
    }

    numbers = {int(row["path"].rsplit("-", 1)[1].removesuffix(".png")): row["label"] for row in rows}
    assert sorted(numbers) == list(range(160))
    order = [CLASSES.index(numbers[number]) for number in range(160)]
    steps = Counter((after - before) % len(CLASSES) for before, after in pairwise(order))
    assert max(steps.values()) < 60  # neither sorted by class nor in rotation

    for row in rows:
        number = int(row["path"].rsplit("-", 1)[1].removesuffix(".png"))
        image, box = drawn[number]
        assert image.shape == (64, 64, 3)
        assert image[0, 0].tolist() == [CLASSES.index(row["label"]), 11, number]
        with Image.open(table.parent / row["path"]) as stored:
            assert np.array_equal(np.asarray(stored), image)
        assert [float(row[key]) for key in "xywh"] == pytest.approx(box, abs=0.01)


def test_the_smallest_set_has_every_class_in_every_split(tmp_path: Path) -> None:
    table = write(tmp_path, images=26, size=64, seed=3)
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 26
    assert len({(row["label"], row["split"]) for row in rows}) == 3 * len(CLASSES)
    counts = Counter(row["label"] for row in rows)
    assert max(counts.values()) - min(counts.values()) == 1
    for row in rows[::4]:
        number = int(row["path"].rsplit("-", 1)[1].removesuffix(".png"))
        image, box = draw(CLASSES.index(row["label"]), size=64, seed=3, index=number)
        with Image.open(table.parent / row["path"]) as stored:
            assert np.array_equal(np.asarray(stored), image)
        assert [float(row[key]) for key in "xywh"] == pytest.approx(box, abs=0.01)
