"""Which folders are splits and which are classes, and which files are listed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from racnn_cli import recipe
from racnn_cli.data.index import build_index, labelled
from racnn_cli.data.layout import split_meaning
from racnn_cli.data.listing import list_images
from racnn_cli.data.types import Index
from racnn_cli.errors import DataError
from racnn_cli.results.predict import gather

COUNTER = iter(range(10**6))


def image(path: Path) -> Path:
    """An image that no other file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(next(COUNTER)).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def folder(root: Path, counts: dict[str, int]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for path, count in counts.items():
        for number in range(count):
            image(root / path / f"{number:02d}.png")
    return root


def listed(root: Path, **keys: object) -> Index:
    return build_index(recipe.Data(path=str(root), **keys), seed=0)  # type: ignore[arg-type]


def sizes(index: Index) -> dict[str, int]:
    return {split: len(items) for split, items in index.splits.items()}


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        *(
            (name, "train")
            for name in ("train", "Training", "cub_train", "train-set", "trainset", "TrainImages", "01 train")
        ),
        *((name, "val") for name in ("val", "valid", "Validation", "dev", "val_2", "images_val", "DevSet")),
        *((name, "test") for name in ("test", "TESTING", "test_images", "mytest.test", "testdata")),
        *((name, "eval") for name in ("eval", "Evaluation", "eval-data")),
        *(
            (name, "")
            for name in ("train_val", "contest", "latest", "trainer", "valley", "device", "sets", "data", "a")
        ),
    ],
)
def test_names_that_mean_a_split(name, meaning) -> None:
    assert split_meaning(name) == meaning


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("Training", "Validation", "Testing"), ("cub_train", "cub_dev", "cub_test"), ("trainset", "eval", "testset")],
)
def test_splits_with_other_names(tmp_path, train, val, test) -> None:
    counts = {f"{train}/a": 5, f"{train}/b": 4, f"{val}/a": 2, f"{val}/b": 1, f"{test}/a": 1, f"{test}/b": 1}
    index = listed(folder(tmp_path, counts))
    assert index.classes == ["a", "b"]
    assert sizes(index) == {"train": 9, "val": 3, "test": 2}
    notes = "\n".join(index.notes)
    for name, split in ((train, "train"), (val, "val"), (test, "test")):
        assert f"{tmp_path / name} is used as {split}" in notes


def test_eval_beside_val_is_test(tmp_path) -> None:
    index = listed(folder(tmp_path, {f"{split}/{label}": 3 for split in ("train", "val", "eval") for label in "ab"}))
    assert sizes(index) == {"train": 6, "val": 6, "test": 6}
    assert f"the folder {tmp_path / 'eval'} is used as test" in index.notes


def test_a_csv_takes_the_same_names(tmp_path) -> None:
    rows = ["path,label,split"]
    for number, split in enumerate(["Training"] * 4 + ["dev"] * 2 + ["evaluation"] * 2):
        image(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'ab'[number % 2]},{split}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    index = listed(tmp_path / "t.csv")
    assert sizes(index) == {"train": 4, "val": 2, "test": 2}
    assert "the split eval is used as test" in index.notes


def test_a_class_may_be_named_like_a_split(tmp_path) -> None:
    index = listed(folder(tmp_path, {"train": 8, "bus": 8, "car": 8}))
    assert index.classes == ["bus", "car", "train"]
    assert f"the folder {tmp_path / 'train'} is a class: it holds images directly" in index.notes


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        ({"train/a": 3, "train/b": 3, "bus": 3, "car": 3}, ("train", "bus", "car")),
        ({"test tubes/2020": 3, "test tubes/2021": 3, "flask": 3}, ("test tubes", "flask")),
        ({"train": 3, "test": 3}, ("train", "test")),
        ({"a/train": 3, "a/test": 3, "b": 3}, ("train", "test")),
        ({"a/train": 3, "a/test": 3, "b/train": 3, "b/old": 3}, ("old", "train")),
    ],
)
def test_a_doubtful_layout_is_refused_and_its_folders_are_listed(tmp_path, counts, named) -> None:
    with pytest.raises(DataError) as caught:
        listed(folder(tmp_path, counts))
    assert all(name in caught.value.message for name in named)
    assert "rename" in caught.value.hint


def test_other_folders_beside_splits_are_ignored_with_their_number_of_images(tmp_path) -> None:
    index = listed(folder(tmp_path, {"train/a": 5, "train/b": 5, "test/a": 1, "test/b": 1, "extra/a": 7}))
    assert sizes(index) == {"train": 8, "val": 2, "test": 2}
    note = f"the folder {tmp_path / 'extra'} is ignored: it is not one of train, val and test (it holds 7 images)"
    assert note in index.notes


def test_splits_inside_each_class(tmp_path) -> None:
    splits = {"Train": 4, "val": 1, "test": 2}
    index = listed(folder(tmp_path, {f"{label}/{split}": n for label in "ab" for split, n in splits.items()}))
    assert index.classes == ["a", "b"]
    assert sizes(index) == {"train": 8, "val": 2, "test": 4}
    assert all(item.path.parent.name == "test" for item in index.splits["test"])
    assert any("read from the folders inside each class: Train, test, val" in note for note in index.notes)


@pytest.mark.parametrize("wrapper", ["birds", "birds/images/v2"])
def test_one_inner_folder_is_entered(tmp_path, wrapper) -> None:
    root = folder(tmp_path, {f"{wrapper}/a": 6, f"{wrapper}/b": 6, "__MACOSX/birds": 1})
    index = listed(root)
    assert index.classes == ["a", "b"]
    assert any(f"the classes are read from {root / wrapper}" in note for note in index.notes)
    inner = folder(tmp_path / "split", {f"{split}/images/{label}": 4 for split in ("train", "test") for label in "ab"})
    assert sizes(listed(inner)) == {"train": 6, "val": 2, "test": 8}
    assert (
        sizes(listed(folder(tmp_path / "deep", {f"x/{s}/{c}": 4 for s in ("train", "test") for c in "ab"})))["test"]
        == 8
    )


def test_one_class_folder_is_not_entered(tmp_path) -> None:
    with pytest.raises(DataError, match="there is only one class, 'a'"):
        listed(folder(tmp_path, {"a/2020": 4}))


SYSTEM = ("@eaDir/x", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information", "__MACOSX/a",
          ".ipynb_checkpoints", ".Trashes", "LOST.DIR", "__pycache__")  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM)
def test_system_folders_are_skipped_everywhere(tmp_path, name) -> None:
    root = folder(tmp_path, {"a": 5, "b": 5, f"a/{name}": 2, name: 2})
    index = listed(root)
    assert index.classes == ["a", "b"]
    assert sum(sizes(index).values()) == 10
    assert len(list_images(root)) == 10
    assert len(gather([root])) == 10


def test_links_are_followed_once_in_training_and_prediction(tmp_path) -> None:
    other = folder(tmp_path / "other", {"more": 3})
    root = folder(tmp_path / "data", {"a": 5, "b": 5})
    os.symlink(other / "more", root / "a" / "link")
    os.symlink(other / "more", root / "a" / "again")
    os.symlink(root, root / "b" / "loop")
    index = listed(root)
    assert sum(sizes(index).values()) == 13
    assert sum("which is listed once only" in note for note in index.notes) == 2
    assert len(list_images(root)) == 13
    alone = tmp_path / "alone"
    alone.mkdir()
    os.symlink(other / "more", alone / "link")
    assert len(gather([alone])) == 3


def test_files_that_cannot_be_read_are_listed_for_prediction(tmp_path) -> None:
    image(tmp_path / "a.png")
    for name in ("b.heic", "c.svg", "d.jpg", "e.psd"):
        (tmp_path / name).write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.heic", "c.svg", "d.jpg", "e.psd"]


def test_unsupported_files_are_errors_and_are_counted_when_skipped(tmp_path) -> None:
    root = folder(tmp_path, {"a": 6, "b": 6})
    for number in range(4):
        (root / "a" / f"{number}.psd").write_bytes(b"8BPS")
    with pytest.raises(DataError, match=r"3\.psd: \.psd files are not supported"):
        listed(root)
    index = listed(root, skip_bad=True)
    assert sum(sizes(index).values()) == 12
    assert index.left_out == {"train": {}, "val": {}, "test": {}}  # they were not split
    assert "left out, in no split: 4 file(s) in formats that cannot be read: a 4" in index.notes


@pytest.mark.parametrize("layout", ["{split}/{label}", "{label}/{split}"])
def test_unsupported_files_count_in_the_split_that_the_data_name(tmp_path, layout) -> None:
    for split in ("train", "val"):
        for label in ("a", "b"):
            place = tmp_path / "data" / layout.format(split=split, label=label)
            for number in range(3):
                image(place / f"{number}.png")
            (place / "drawing.psd").write_bytes(b"8BPS")
    (tmp_path / "data" / layout.format(split="val", label="b") / "broken.png").write_bytes(b"no image")
    index = listed(tmp_path / "data", skip_bad=True)
    assert {split: dict(counts) for split, counts in index.left_out.items() if counts} == {
        "train": {"a": 1, "b": 1},
        "val": {"a": 1, "b": 2},
    }
    assert sum(sum(counts.values()) for counts in index.left_out.values()) == len(index.skipped)
    assert not [note for note in index.notes if note.startswith("left out")]


def test_files_without_a_class_are_counted_apart(tmp_path) -> None:
    root = folder(tmp_path, {"a": 6, "b": 6})
    image(root / "loose.png")
    (root / "a" / "broken.png").write_bytes(b"no image")
    index = listed(root, skip_bad=True)
    assert "left out without a class: 1 file(s), lines or folders" in index.notes
    assert sum(sum(counts.values()) for counts in index.left_out.values()) == 1
    assert len(index.skipped) == 2


def test_unsupported_files_of_classes_the_network_does_not_know_are_errors(tmp_path) -> None:
    root = folder(tmp_path, {"a": 3, "be\u0301": 3})
    (root / "extra").mkdir()
    for place in ("extra", "be\u0301"):
        (root / place / "drawing.psd").write_bytes(b"8BPS")
    data = recipe.Data(path=str(root), skip_bad=True)
    with pytest.raises(DataError, match="the run does not know the class 'extra'"):
        labelled(data, seed=0, classes=["a", "be\u0301"])
    shutil.rmtree(root / "extra")
    assert labelled(data, seed=0, classes=["a", "be\u0301"]).left_out == {"be\u0301": 1}
