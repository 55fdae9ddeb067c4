"""Identical images in two splits or two classes, and images that a run was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_layout import folder, image, listed, sizes

from racnn_cli import recipe
from racnn_cli.data.index import build_index, labelled
from racnn_cli.errors import DataError


def splits(root: Path, test: int = 10) -> Path:
    return folder(
        root, {f"{split}/{label}": n for split, n in (("train", 8), ("val", 2), ("test", test)) for label in "ab"}
    )


def test_test_images_that_are_in_train_stop_a_run(tmp_path) -> None:
    root = splits(tmp_path)
    for number in range(3):
        shutil.copy(root / "train" / "a" / f"0{number}.png", root / "test" / "a" / f"copy{number}.jpg")
    with pytest.raises(
        DataError, match=r"3 of the 23 test images are also in train, such as test/a/copy0\.jpg"
    ) as caught:
        listed(root)
    assert "data.allow_duplicates=true" in caught.value.hint
    index = listed(root, allow_duplicates=True)
    assert any(note.startswith("3 of the 23 test images are also in train") for note in index.notes)
    assert any(note.startswith("3 image(s) are copies of another one") for note in index.notes)
    # a run that exists may be continued and measured
    again = build_index(recipe.Data(path=str(root)), seed=0, classes=["a", "b"])
    assert again.splits == index.splits


def test_up_to_one_percent_is_a_note(tmp_path) -> None:
    root = splits(tmp_path, test=50)
    shutil.copy(root / "train" / "a" / "00.png", root / "test" / "a" / "00.png")  # instead of another image: 1 of 100
    assert any(note.startswith("1 of the 100 test images are also in train") for note in listed(root).notes)


def test_other_pairs_of_splits_are_notes(tmp_path) -> None:
    root = splits(tmp_path)
    shutil.copy(root / "train" / "a" / "00.png", root / "val" / "a" / "x.png")
    shutil.copy(root / "val" / "b" / "01.png", root / "test" / "b" / "y.png")
    notes = listed(root).notes
    assert any(
        note.startswith("1 of the 5 val images are also in train, such as val/a/x.png and train/a/00.png")
        for note in notes
    )
    assert any(note.startswith("1 of the 21 test images are also in val") for note in notes)


def test_one_image_in_two_classes(tmp_path) -> None:
    root = splits(tmp_path)
    shutil.copy(root / "train" / "a" / "00.png", root / "train" / "b" / "x.png")
    notes = listed(root).notes
    assert "2 identical images are in two classes, such as train/a/00.png and train/b/x.png" in notes


def test_a_csv_that_names_a_file_twice_by_other_paths(tmp_path) -> None:
    folder(tmp_path, {"images": 8})
    (tmp_path / "link").symlink_to(tmp_path / "images")
    rows = [f"images/0{n}.png,{'ab'[n % 2]},train" for n in range(6)]
    rows += ["images/06.png,a,val", "images/07.png,b,test", "link/00.png,a,test"]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(
        DataError, match=r"1 of the 2 test images are also in train, such as link/00\.png and images/00\.png"
    ):
        listed(tmp_path / "t.csv")


def test_images_of_the_run_are_counted_when_it_is_measured_on_others(tmp_path) -> None:
    trained = listed(splits(tmp_path / "own"))
    assert {split: len(joined) // 16 for split, joined in trained.contents.items()} == {"train": 16, "val": 4}
    other = folder(tmp_path / "other", {"a": 3, "b": 3})
    for number in range(2):
        shutil.copy(tmp_path / "own" / "train" / "a" / f"0{number}.png", other / "a" / f"seen{number}.png")
    shutil.copy(tmp_path / "own" / "val" / "a" / "00.png", other / "b" / "chosen.png")
    data = recipe.Data(path=str(other))
    notes = labelled(data, seed=0, classes=trained.classes, contents=trained.contents).notes
    assert any(note.startswith("2 of the 9 images are in the run's train split, such as a/seen0.png") for note in notes)
    assert any(note.startswith("1 of the 9 images are in the run's val split, such as b/chosen.png") for note in notes)
    assert labelled(data, seed=0, classes=trained.classes).notes == []


def test_a_data_set_without_copies_has_no_notes(tmp_path) -> None:
    index = listed(splits(tmp_path))
    assert sizes(index) == {"train": 16, "val": 4, "test": 20}
    assert index.notes == []
    image(tmp_path / "train" / "a" / "new.png")
    assert listed(tmp_path).contents["train"] != index.contents["train"]
