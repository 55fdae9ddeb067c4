"""The data set `clutter`: valid and damaged files, images with a known box, training on them."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blobs import tiny

from racnn_cli import evaluation
from racnn_cli import recipe as recipes
from racnn_cli.core import attention
from racnn_cli.core.model import RACNN, build
from racnn_cli.data.datasets.clutter import CLASSES, Clutter, compose, read_items
from racnn_cli.data.images import batches
from racnn_cli.errors import DataError
from racnn_cli.training import stages
from racnn_cli.training.phases import BoxSource
from racnn_cli.training.trainer import Trainer

COUNTS = {"train": 60, "t10k": 30}
DATA = recipes.Data(val=0.25, test=0.25)


def idx(array: np.ndarray) -> bytes:
    """The IDX format: two zero bytes, 8 for unsigned bytes, the number of axes, each length, the values."""
    lengths = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.astype(np.uint8).tobytes()


def gray(part: str, label: int) -> int:
    """Return the value of every pixel of an item: it identifies the part and the class."""
    return (20 if part == "train" else 130) + 10 * label


def write_items(folder: Path, *, zipped: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for part, count in COUNTS.items():
        labels = np.random.default_rng(count).integers(0, len(CLASSES), count)
        grays = np.array([gray(part, label) for label in labels])
        photographs = np.broadcast_to(grays[:, None, None], (count, 28, 28))
        for name, array in (("images-idx3", photographs), ("labels-idx1", labels)):
            raw, file = idx(array), folder / f"{part}-{name}-ubyte"
            if zipped:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(raw))
            else:
                file.write_bytes(raw)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_items(tmp_path_factory.mktemp("items") / "fashion")


def clutter(folder: Path, images: int = 80, seed: int = 5) -> Clutter:
    return Clutter(folder, images, data=DATA, seed=seed)


# ---- the files


@pytest.mark.parametrize("zipped", [True, False])
def test_items_are_read_from_plain_and_from_gzipped_files(tmp_path, zipped) -> None:
    write_items(tmp_path, zipped=zipped)
    for part, count in COUNTS.items():
        photographs, labels = read_items(tmp_path, part)
        assert (photographs.shape, photographs.dtype) == ((count, 28, 28), np.uint8)
        assert (labels.shape, labels.dtype) == ((count,), np.uint8)
        assert len(set(labels.tolist())) > 5
        assert all((p == gray(part, int(label))).all() for p, label in zip(photographs, labels, strict=True))


def test_rows_and_columns_are_not_exchanged(tmp_path) -> None:
    write_items(tmp_path)
    whole = np.arange(60 * 28 * 28).reshape(60, 28, 28) % 251
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(whole)))
    np.testing.assert_array_equal(read_items(tmp_path, "train")[0], whole)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def changed(raw: bytes, place: int, value: int) -> bytes:
    return raw[:place] + bytes([value]) + raw[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "labels where photographs belong": lambda raw: changed(raw, 3, 1),
    "floats": lambda raw: changed(raw, 2, 0x0D),
    "not two zero bytes": lambda raw: changed(raw, 0, 7),
    "cut short": lambda raw: raw[:-5],
    "cut in its head": lambda raw: raw[:10],
    "too long": lambda raw: raw + b"more",
    "empty": lambda raw: b"",
    "an HTML page": lambda raw: b"<html>not found</html>",
}


def check_error(folder: Path, part: str, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_items(folder, part)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert "dataset-fashion-mnist" in caught.value.hint
    assert "--data" in caught.value.hint


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_not_an_idx_file_is_named(tmp_path, kind, zipped) -> None:
    write_items(tmp_path, zipped=zipped)
    file = tmp_path / (IMAGES + ".gz" if zipped else IMAGES)
    raw = file.read_bytes()
    raw = DAMAGE[kind](gzip.decompress(raw) if zipped else raw)
    file.write_bytes(gzip.compress(raw) if zipped else raw)
    check_error(tmp_path, "train", str(file), "not an IDX file of 3")
    assert len(read_items(tmp_path, "t10k")[0]) == 30


def damaged_streams() -> dict[str, bytes]:
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (60, 28, 28))))
    middle = len(whole) // 2
    return {
        "cut short": whole[:middle],
        "without its checksum": whole[:-8],
        "overwritten": whole[:middle] + bytes(400) + whole[middle + 400 :],
        "another checksum": changed(whole, len(whole) - 6, whole[-6] ^ 1),
        "unknown block type": changed(whole, 10, 0x07),
        "not zipped": idx(np.zeros((60, 28, 28))),
    }


@pytest.mark.parametrize("kind", damaged_streams())
def test_a_damaged_gzip_file_is_named(tmp_path, kind) -> None:
    write_items(tmp_path)
    file = tmp_path / f"{IMAGES}.gz"
    file.write_bytes(damaged_streams()[kind])
    check_error(tmp_path, "train", str(file), "cannot be read")


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_missing_file_is_named_with_both_names(tmp_path, name) -> None:
    write_items(tmp_path)
    (tmp_path / f"{name}.gz").unlink()
    check_error(tmp_path, "train", str(tmp_path), f"{name}.gz", f"nor {name}")
    with pytest.raises(DataError, match=name):
        clutter(tmp_path).dataset("train", 80, augment=True)


def test_a_missing_folder_and_a_file_instead(tmp_path) -> None:
    check_error(tmp_path / "nowhere", "train", str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    check_error(tmp_path / "file", "train", str(tmp_path / "file"))


def test_photographs_without_labels_are_counted(tmp_path) -> None:
    write_items(tmp_path)
    (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(idx(np.zeros(59))))
    with pytest.raises(DataError) as caught:
        read_items(tmp_path, "train")
    assert all(word in caught.value.message for word in (str(tmp_path), "60 train photographs", "59 labels"))
    assert caught.value.hint


# ---- one image


def photographs() -> np.ndarray:
    """A white item, an invisible one, one with a visible lower half, and noise for fragments."""
    items = np.random.default_rng(1).integers(0, 200, (300, 28, 28)).astype(np.uint8)
    items[0], items[1], items[2] = 255, 0, 255
    items[2, :14] = 0
    return items


@pytest.mark.parametrize("canvas", [64, 160, 224])
def test_the_box_is_where_the_item_is(canvas) -> None:
    """The same numbers are drawn for a white item and for an invisible one: only the item differs."""
    items = photographs()
    for seed in range(20):
        white, box = compose(items, 0, np.random.default_rng(seed), side=canvas)
        bare, same = compose(items, 1, np.random.default_rng(seed), side=canvas)
        assert white.shape == bare.shape == (canvas, canvas)
        assert white.dtype == np.uint8
        assert box == same
        x0, y0, x1, y1 = (round(value * canvas) for value in box)
        assert 0 <= x0 < x1 <= canvas
        assert 0 <= y0 < y1 <= canvas
        assert x1 - x0 == y1 - y0
        assert 20 / 160 * canvas - 1 <= x1 - x0 <= 33 / 160 * canvas
        assert (white[y0:y1, x0:x1] == 255).all()
        rows, columns = np.nonzero(white != bare)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
        assert 0.05 < (bare > 0).mean() < 0.6  # fragments, and room between them


def test_items_differ_in_place_and_size() -> None:
    boxes = np.array([compose(photographs(), 0, np.random.default_rng(s), side=160)[1] for s in range(200)]) * 160
    sides = boxes[:, 2] - boxes[:, 0]
    assert (sides.min(), sides.max()) == (20, 32)
    for axis in (0, 1):
        assert boxes[:, axis].min() < 8
        assert boxes[:, axis + 2].max() > 152
        assert boxes[:, axis].std() > 30
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.2


def test_at_a_distance_everything_is_smaller_and_there_are_more_fragments() -> None:
    items, filled = photographs(), []
    for seed in range(20):
        far, box = compose(items, 0, np.random.default_rng(seed), side=480, distance=3)
        assert 20 <= round((box[2] - box[0]) * 480) < 33  # as at a third of the canvas
        bare = [
            compose(items, 1, np.random.default_rng(seed), side=side, distance=d)[0] for side, d in ((480, 3), (160, 1))
        ]
        filled.append([(image > 0).mean() for image in bare])
        x0, y0, x1, y1 = (round(value * 480) for value in box)
        assert (far[y0:y1, x0:x1] == 255).all()
    near, away = np.mean(filled, axis=0)
    assert near == pytest.approx(away, rel=0.1)


def test_dark_pixels_of_an_item_are_transparent() -> None:
    items, fragment_pixels = photographs(), 0
    for seed in range(20):
        half, box = compose(items, 2, np.random.default_rng(seed), side=160)
        bare, _ = compose(items, 1, np.random.default_rng(seed), side=160)
        x0, y0, x1, y1 = (round(value * 160) for value in box)
        middle = (y0 + y1) // 2
        np.testing.assert_array_equal(half[y0 : middle - 1, x0:x1], bare[y0 : middle - 1, x0:x1])
        assert (half[middle + 1 : y1, x0:x1] > 200).all()
        fragment_pixels += int(np.count_nonzero(half[y0 : middle - 1, x0:x1]))
    assert fragment_pixels > 100


# ---- the splits


def test_splits_are_disjoint_and_test_items_come_from_the_test_part(folder) -> None:
    index = clutter(folder).index
    assert index.classes == list(CLASSES)
    assert {split: len(items) for split, items in index.splits.items()} == {"train": 40, "val": 20, "test": 20}
    paths = {split: {str(item.path) for item in items} for split, items in index.splits.items()}
    assert all(len(paths[split]) == len(index.splits[split]) for split in paths)
    assert not paths["train"] & paths["val"]
    assert all(path.startswith("t10k/") for path in paths["test"])
    assert all(path.startswith("train/") for path in paths["train"] | paths["val"])
    for split, items in index.splits.items():
        labels = read_items(folder, "t10k" if split == "test" else "train")[1]
        assert [item.label for item in items] == [labels[int(item.path.name)] for item in items]


def test_the_seed_chooses_the_items(folder) -> None:
    index, other_seed = clutter(folder).index, clutter(folder, seed=6).index
    assert index == clutter(folder).index
    assert index.splits["train"] != other_seed.splits["train"]
    assert index.splits["test"] != other_seed.splits["test"]
    assert index.fingerprint != other_seed.fingerprint
    assert index.fingerprint != clutter(folder, images=60).index.fingerprint


def test_more_images_than_items_is_an_error(folder) -> None:
    for images, count, needed in ((84, "60 train", "63 are"), (10_000, "60 train", "5000 are")):
        with pytest.raises(DataError) as caught:
            clutter(folder, images).dataset("train", 64, augment=True)
        assert all(word in caught.value.message for word in (str(folder), count, needed)), caught.value.message
        assert "fewer images" in caught.value.hint
    source = Clutter(folder, 80, data=recipes.Data(val=0.1, test=0.5), seed=5)
    with pytest.raises(DataError, match="30 t10k items, 40 are"):
        assert source.index


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_show_the_item_that_their_label_names(folder, split) -> None:
    source = clutter(folder)
    images = source.dataset(split, 96, augment=split == "train")
    items = source.index.splits[split]
    assert len(images) == len(items)
    for position, item in enumerate(items):
        sample = images[0, position]
        assert sample["image"].shape == (3, 96, 96)
        assert sample["image"].dtype == torch.uint8
        assert torch.equal(sample["image"][0], sample["image"][1])
        assert torch.equal(sample["image"][0], sample["image"][2])
        assert (sample["label"].item(), sample["index"].item()) == (item.label, position)
        box = sample["box"]
        assert box.shape == (4,)
        assert box.min() >= 0
        assert box.max() <= 1
        x0, y0, x1, y1 = (box * 96).round().int().tolist()
        item_pixels = sample["image"][:, y0:y1, x0:x1]
        assert (item_pixels == gray("t10k" if split == "test" else "train", item.label)).all()


def test_an_image_is_a_function_of_seed_split_epoch_and_position(folder) -> None:
    def image(split: str, epoch: int, position: int, *, seed: int = 5, augment: bool = False) -> torch.Tensor:
        return clutter(folder, seed=seed).dataset(split, 64, augment=augment)[epoch, position]["image"]

    for split in ("train", "val", "test"):
        still = image(split, 0, 3)
        assert torch.equal(still, image(split, 0, 3))
        assert torch.equal(still, image(split, 7, 3))
        assert not torch.equal(still, image(split, 0, 4))
        assert not torch.equal(still, image(split, 0, 3, seed=6))
    redrawn = image("train", 2, 3, augment=True)
    assert torch.equal(redrawn, image("train", 2, 3, augment=True))
    assert not torch.equal(redrawn, image("train", 3, 3, augment=True))
    boxes = [clutter(folder).dataset(split, 64, augment=False)[0, 3]["box"] for split in ("train", "val")]
    assert not torch.equal(*boxes)


def test_a_redrawn_image_keeps_its_item(folder) -> None:
    images = clutter(folder).dataset("train", 96, augment=True)
    boxes = set()
    for epoch in range(8):
        sample = images[epoch, 1]
        box = tuple((sample["box"] * 96).round().int().tolist())
        boxes.add(box)
        assert sample["image"][0, box[1], box[0]] == gray("train", int(sample["label"]))
    assert len(boxes) == 8


def test_workers_draw_the_same_images_as_one_process(folder) -> None:
    images = clutter(folder).dataset("train", 64, augment=True)
    loaded: list[list[dict[str, torch.Tensor]]] = [
        list(batches(images, batch=16, epoch=1, seed=0, shuffle=True, workers=workers)) for workers in (0, 1)
    ]
    assert len(loaded[0]) == len(loaded[1]) == 3
    for expected, batch in zip(*loaded, strict=True):
        assert all(torch.equal(expected[name], batch[name]) for name in ("image", "label", "box", "index"))


# ---- proposals from outside the APNs


def options(**changes: Any) -> recipes.Recipe:
    keys = {"data__source": 96, "model__backbone": "small_cnn", "model__apn_hidden": 8, "train__batch": 10}
    return tiny(Path("unused"), **(keys | {"model__sizes": [32, 32]} | changes))


def network(scales: int) -> RACNN:
    torch.manual_seed(0)
    recipe = options(model__scales=scales, model__sizes=[32] * scales)
    return build(recipe.model, len(CLASSES), source=96).eval()


def test_proposals_passed_to_the_network_are_used(folder) -> None:
    model = network(3)
    images = next(iter(loader(folder)))["image"]
    torch.manual_seed(1)
    first = torch.cat([torch.rand(10, 2) * 0.4 + 0.3, torch.rand(10, 1) * 0.2 + 0.1], dim=1)
    second = torch.cat([torch.rand(10, 2) * 0.4 + 0.3, torch.rand(10, 1) * 0.2 + 0.1], dim=1)
    with torch.no_grad():
        own, output = model(images), model(images, [first, second])
        repeated = model(images, own.proposals)
        source = model.normalise(images)
    assert torch.equal(output.proposals[0], first)
    assert torch.equal(output.proposals[1], second)
    torch.testing.assert_close(output.boxes[0], first)
    inner = torch.cat(
        [first[:, :2] + 2 * first[:, 2:] * (second[:, :2] - 0.5), 2 * first[:, 2:] * second[:, 2:]], dim=1
    )
    torch.testing.assert_close(output.boxes[1], inner)
    for number, box in ((1, first), (2, inner)):
        crop = attention.zoom(source, box, 32, k=model.k)
        torch.testing.assert_close(output.views[number], crop, atol=1e-4, rtol=1e-4)
        assert (output.views[number] - own.views[number]).abs().mean() > 0.05
    assert torch.equal(output.logits[0], own.logits[0])
    assert not torch.allclose(output.logits[1], own.logits[1])
    assert torch.equal(repeated.probabilities, own.probabilities)


def loader(folder: Path) -> Any:
    images = clutter(folder).dataset("val", 96, augment=False)
    return batches(images, batch=10, epoch=0, seed=0, shuffle=False, workers=0)


def true_boxes(batch: Any) -> list[torch.Tensor]:
    box = batch["box"]
    return [torch.cat([(box[:, :2] + box[:, 2:]) / 2, (box[:, 2:3] - box[:, :1]) / 2], dim=1)]


def test_validation_measures_the_boxes_it_is_given(folder) -> None:
    model = network(2)

    def boxes(guide: Any) -> dict[str, float]:
        result = evaluation.measure(model, loader(folder), margin=0.05, proposals=guide)
        figures = result.validation().to_json()["boxes"]
        assert len(figures) == 1
        assert set(figures[0]) >= {
            "side_mean", "side_std", "at_floor", "at_ceiling", "iou_mean", "hit_rate", "coverage_mean"
        }  # fmt: skip
        return figures[0]

    truth = [images["box"] for images in loader(folder)]
    sides = torch.cat(truth)[:, 2] - torch.cat(truth)[:, 0]
    figures = boxes(true_boxes)
    assert figures["iou_mean"] == pytest.approx(1.0, abs=1e-4)
    assert figures["coverage_mean"] == pytest.approx(1.0, abs=1e-4)
    assert figures["hit_rate"] == 1.0
    assert figures["side_mean"] == pytest.approx(sides.mean().item(), rel=1e-4)
    assert figures["side_std"] == pytest.approx(sides.std(unbiased=False).item(), rel=1e-2)

    figures = boxes(lambda batch: [torch.tensor([[0.5, 0.5, 0.2]]).expand(len(batch["label"]), 3)])
    assert figures["side_mean"] == pytest.approx(0.4)
    assert figures["side_std"] == pytest.approx(0.0, abs=1e-3)
    middle = (torch.cat(truth)[:, :2] + torch.cat(truth)[:, 2:]) / 2
    inside = ((middle - 0.5).abs() <= 0.2).all(dim=1)
    assert 0 < inside.sum() < 20
    assert figures["hit_rate"] == pytest.approx(inside.double().mean().item())
    assert 0 < figures["iou_mean"] < 0.2 < boxes(true_boxes)["iou_mean"]

    double = torch.tensor([1.0, 1.0, 2.0])
    doubled = boxes(lambda batch: [attention.bound(true_boxes(batch)[0] * double, 0.0, 1.0)])
    assert doubled["iou_mean"] == pytest.approx(0.25, abs=1e-4)
    assert doubled["coverage_mean"] == pytest.approx(1.0, abs=1e-4)

    assert boxes(None)["side_mean"] == pytest.approx(0.5, abs=0.05)  # an untrained APN's own


# ---- a run


def test_training_on_clutter_logs_box_metrics_and_settles_the_boxes(here, folder, monkeypatch) -> None:
    """The jitter of the CNN phase's boxes decreases with the number of the round."""
    recipe = options(
        **{f"{stage}__epochs": 1 for stage in ("pretrain_cnn", "pretrain_apn", "fusion")},
        train__batch=20,
        alternate__apn_gradient="perturb",
        alternate__boxes=2,
        alternate__jitter=0.3,
        alternate__tighten=0.5,
        alternate__settle=True,
        alternate__rounds=3,
    )
    settings, jitter = [], attention.jitter

    def record(boxes: torch.Tensor, amount: float, floor: float, ceiling: float, tighten: float, uniform: torch.Tensor):
        settings.append((round(amount, 6), round(tighten, 6)))
        return jitter(boxes, amount, floor, ceiling, tighten, uniform)

    monkeypatch.setattr(attention, "jitter", record)
    trainer = Trainer.start(recipe, out=here / "mine", quiet=True, source=clutter(folder))
    stages.run_all(trainer)
    assert trainer.model.classes == 10
    assert settings == [(0.3, 0.5)] * 2 + [(0.15, 0.25)] * 2  # 2 batches per round, none in the last one
    events = [json.loads(line) for line in (here / "mine" / "log.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [e["phase"] for e in epochs][2:] == ["CNN phase", "APN phase"] * 2 + ["CNN phase", "fusion head"]
    assert set(epochs[3]["train_loss"]) == {"rank 1-2"}
    logged = [event["val"]["boxes"][0] for event in epochs[1:]]
    for figures in logged:
        assert all(0 <= figures[name] <= 1 for name in ("iou_mean", "hit_rate", "coverage_mean"))
        assert figures["coverage_mean"] > figures["iou_mean"] > 0
    assert all(math.isfinite(value) for event in epochs for value in event["train_loss"].values())
    assert [event["stage"] for event in events if event["event"] == "stage"] == [
        "pretrain-cnn", "pretrain-apn", "alternate"
    ]  # fmt: skip


def test_training_with_given_boxes_uses_them(here, folder) -> None:
    recipe = options(
        **{f"{stage}__epochs": 1 for stage in ("pretrain_cnn", "pretrain_apn", "fusion")},
        train__batch=20,
        alternate__rounds=1,
        alternate__apn_epochs=0,
    )
    boxes = BoxSource(proposals=true_boxes)
    trainer = Trainer.start(recipe, out=here / "mine", quiet=True, source=clutter(folder), boxes=boxes)
    stages.run_all(trainer)
    lines = (here / "mine" / "log.jsonl").read_text().splitlines()
    rounds = [event for event in map(json.loads, lines) if event["event"] == "round"]
    assert rounds[0]["val"]["boxes"][0]["iou_mean"] == pytest.approx(1.0, abs=1e-4)
    assert trainer.validate().boxes[0].hit_rate == 1.0
