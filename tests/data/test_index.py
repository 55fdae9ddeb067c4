"""Layouts, splits, sources, and reporting every error of a data set at once."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from racnn_cli import recipe
from racnn_cli.data.checks import MAX_REPORTED
from racnn_cli.data.datasets import REGISTRY, BuiltinDataset
from racnn_cli.data.index import build_index
from racnn_cli.data.source import FileSource, open_source
from racnn_cli.data.split import choose, hold_out
from racnn_cli.data.types import Index
from racnn_cli.errors import DataError


def image(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    """An image of noise that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(os.fsencode(path)))
    Image.fromarray(noise.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


def folder(root: Path, counts: dict[str, int]) -> Path:
    for path, count in counts.items():
        for number in range(count):
            image(root / path / f"{number:02d}.png")
    return root


def index(path: Path, *, seed: int = 0, classes: list[str] | None = None, **keys: object) -> Index:
    return build_index(recipe.Data(path=str(path), **keys), seed=seed, classes=classes)  # type: ignore[arg-type]


def error(path: Path, **keys: object) -> DataError:
    with pytest.raises(DataError) as caught:
        index(path, **keys)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value


def counts(listed: Index) -> dict[str, dict[str, int]]:
    return {
        split: {name: sum(item.label == label for item in items) for label, name in enumerate(listed.classes)}
        for split, items in listed.splits.items()
    }


def names(listed: Index) -> dict[str, list[str]]:
    return {
        split: [f"{item.path.parent.name}/{item.path.name}" for item in items] for split, items in listed.splits.items()
    }


# ---- the split


@settings(max_examples=150, deadline=None)
@example(sizes=[7], val=0.5, test=0.4375, seed=0)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    val=st.floats(0.01, 0.5),
    test=st.one_of(st.just(0.0), st.floats(0.01, 0.45)),
    seed=st.integers(0, 9),
)
def test_the_split_is_stratified_disjoint_and_complete(sizes, val, test, seed):
    labels = {f"c{label}": [f"c{label}/{n}" for n in range(size)] for label, size in enumerate(sizes)}
    rest, held = hold_out(labels, {"val": val, "test": test}, seed=seed)
    assert sorted(rest + held["val"] + held["test"]) == sorted(name for members in labels.values() for name in members)
    for label, members in labels.items():
        size = len(members)
        train, *held_out = (sum(name.startswith(f"{label}/") for name in s) for s in (rest, *held.values()))
        assert train >= 1
        for share, count in zip((val, test), held_out, strict=True):
            # Where earlier splits are rounded up and one image stays for training, the last split gets the remainder.
            assert abs(count - share * size) <= 1 or count == 1 or train == 1
            if share > 0 and size >= 3:
                assert count >= 1
        assert held_out[1] == 0 or test > 0
    assert hold_out({k: v[::-1] for k, v in labels.items()}, {"val": val, "test": test}, seed=seed) == (rest, held)


def test_adding_a_class_does_not_move_the_images_of_the_others():
    labels = {"a": [f"a{n}" for n in range(20)], "b": [f"b{n}" for n in range(20)]}
    shares = {"val": 0.2, "test": 0.2}
    both, single = hold_out(labels, shares, seed=1), hold_out({"b": labels["b"]}, shares, seed=1)
    assert [name for name in both[1]["test"] if name[0] == "b"] == single[1]["test"]
    assert both != hold_out(labels, shares, seed=2)
    assert len(choose(labels["a"], 5, "a", seed=0)) == 5


# ---- layouts


def test_a_folder_per_class_is_split_by_the_seed(tmp_path):
    root = folder(tmp_path / "birds", {"robin": 20, "wren": 10})
    listed = index(root)
    assert listed.classes == ["robin", "wren"]
    assert counts(listed) == {
        "train": {"robin": 13, "wren": 6},
        "val": {"robin": 3, "wren": 2},
        "test": {"robin": 4, "wren": 2},
    }
    assert index(root) == listed
    assert names(index(root, seed=1))["test"] != names(listed)["test"]
    assert counts(index(root, test=0.0))["test"] == {"robin": 0, "wren": 0}
    # the same files in another folder, created in another order, are split in the same way
    other = tmp_path / "elsewhere"
    for file in sorted(root.rglob("*.png"), reverse=True):
        image(other / file.relative_to(root))
    assert names(index(other)) == names(listed)


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_folders_of_splits_are_kept(tmp_path, val):
    root = folder(tmp_path, {"train/a": 3, "train/b": 2, f"{val}/a": 1, f"{val}/b": 1, "test/a": 2, "test/b": 1})
    listed = index(root)
    assert counts(listed) == {"train": {"a": 3, "b": 2}, "val": {"a": 1, "b": 1}, "test": {"a": 2, "b": 1}}
    assert all(f"{split}/" in str(item.path) for split in ("train", "test") for item in listed.splits[split])


def test_a_missing_split_is_held_out_from_train(tmp_path):
    root = folder(tmp_path / "a", {"train/a": 10, "train/b": 10, "test/a": 5, "test/b": 5})
    listed = index(root, val=0.2)
    assert counts(listed) == {"train": {"a": 8, "b": 8}, "val": {"a": 2, "b": 2}, "test": {"a": 5, "b": 5}}
    assert all("train" in item.path.parts for item in listed.splits["val"])
    root = folder(tmp_path / "b", {"train/a": 10, "train/b": 10, "val/a": 5, "val/b": 5})
    assert counts(index(root, test=0.3))["test"] == {"a": 3, "b": 3}
    assert counts(index(root, test=0.0))["test"] == {"a": 0, "b": 0}


def test_nested_folders_links_hidden_files_and_other_files(tmp_path):
    root = folder(tmp_path / "data", {"a/2024/may": 3, "b": 3, ".cache/x": 1, "__MACOSX/a": 1})
    image(root / "a" / ".hidden.png")
    (root / "a" / "notes.txt").write_text("seen in May")
    (root / "README.md").write_text("about")
    outside = folder(tmp_path / "outside", {"c": 3})
    (root / "c").symlink_to(outside / "c", target_is_directory=True)
    (root / "b" / "more").symlink_to(root, target_is_directory=True)  # a cycle
    (root / "b" / "cycle").symlink_to(root / "b", target_is_directory=True)
    (root / "b" / "more").unlink()
    listed = index(root)
    assert listed.classes == ["a", "b", "c"]
    assert sum(len(items) for items in listed.splits.values()) == 9
    notes = "\n".join(listed.notes)
    assert "notes.txt" in notes
    assert "README.md" in notes
    assert "which is listed once only" in notes


def test_a_csv_with_splits_and_boxes(tmp_path):
    for number in range(4):
        image(tmp_path / "images" / f"{number}.png", (40, 30))
    table = tmp_path / "labels.csv"
    table.write_text(
        "\ufeffPath, Label ,split,x,y,w,h,note\n"
        'images/0.png,"robin, red",train,1,2,3.5,4,n\n'
        "images/1.png,wren,train,,,,,\n"
        f"{tmp_path}/images/2.png,wren,valid,0,0,40,30,\n"
        'images/3.png,"robin, red",TEST,,,,,\n',
        encoding="utf-8",
    )
    listed = index(table)
    assert listed.classes == ["robin, red", "wren"]
    assert counts(listed) == {
        "train": {"robin, red": 1, "wren": 1},
        "val": {"robin, red": 0, "wren": 1},
        "test": {"robin, red": 1, "wren": 0},
    }
    assert [item.box for item in listed.splits["train"]] == [(1.0, 2.0, 3.5, 4.0), None]
    assert listed.splits["val"][0].path == tmp_path / "images" / "2.png"
    assert "ignored columns: note" in listed.notes[0]
    assert any("'robin, red' has no val image" in note for note in listed.notes)


def test_a_csv_without_splits_is_split_as_a_folder(tmp_path):
    root = folder(tmp_path, {"a": 10, "b": 10})
    rows = [f"{file.relative_to(root)},{file.parent.name}" for file in root.rglob("*.png")]
    for number, order in enumerate((rows, sorted(rows, reverse=True))):
        (root / f"{number}.csv").write_text("\n".join(["path,label", *order]))
    assert names(index(root / "0.csv")) == names(index(root / "1.csv")) == names(index(root))


def test_runs_beside_the_images_are_not_classes(tmp_path):
    root = folder(tmp_path, {"red": 9, "blue": 9})
    before = index(root)
    for run in ("runs/own", "elsewhere"):
        (root / run).mkdir(parents=True)
        (root / run / "recipe.toml").touch()
    image(root / "runs" / "own" / "drawn.png")
    listed = index(root)
    assert listed.splits == before.splits
    assert listed.fingerprint == before.fingerprint
    assert sum("contains a run of racnn" in note for note in listed.notes) == 2


def test_a_limit_of_all_images_keeps_at_least_one_of_each_class(tmp_path):
    root = folder(tmp_path, {"a": 5, "b": 5, "c": 5})
    for images, expected in ((7, 2), (2, 1), (100, 3)):
        limited = index(root, images=images, val=0.2, test=0.2)
        assert counts(limited)["train"] == dict.fromkeys("abc", expected)
    assert counts(index(root, images=7, limit=1, val=0.2, test=0.2))["train"] == dict.fromkeys("abc", 1)


def test_limit_keeps_n_images_per_class_and_split(tmp_path):
    root = folder(tmp_path, {"a": 30, "b": 20})
    full, limited = index(root), index(root, limit=3)
    assert counts(limited) == {split: {"a": 3, "b": 3} for split in ("train", "val", "test")}
    assert all(set(limited.splits[split]) <= set(full.splits[split]) for split in limited.splits)


# ---- errors of files


def broken(tmp_path: Path) -> Path:
    root = folder(tmp_path / "birds", {"robin": 6, "wren": 6})
    (root / "robin" / "empty.jpg").touch()
    (root / "robin" / "text.png").write_text("not an image")
    content = image(root / "wren" / "cut.bmp", (40, 40)).read_bytes()
    (root / "wren" / "cut.bmp").write_bytes(content[: len(content) // 2])
    (root / "wren" / "missing.png").symlink_to(root / "nowhere.png")
    (root / "wren" / "drawing.svg").write_bytes(b"<svg/>")
    (root / "void").mkdir()
    image(root / "loose.png")
    Image.new("1", (20_000, 9_500)).save(root / "robin" / "bomb.png")
    return root


BROKEN = (
    "empty.jpg is empty",
    "text.png is not a",
    "cut.bmp is damaged or truncated",
    "missing.png does not exist",
    "drawing.svg: .svg files are not supported",
    "void contains no images",
    "loose.png has no label",
    "bomb.png is oversized",
)


def test_every_bad_file_is_named_in_one_error(tmp_path):
    report = error(broken(tmp_path))
    assert all(text in report.message for text in BROKEN)
    assert f"has {len(BROKEN)} error(s)" in report.message
    assert "--skip-bad" in report.hint


def test_skip_bad_continues_and_records_them(tmp_path):
    root = broken(tmp_path)
    listed = index(root, skip_bad=True)
    assert listed.classes == ["robin", "wren"]
    assert sum(len(items) for items in listed.splits.values()) == 12
    assert len(listed.skipped) == len(BROKEN)
    assert all(any(text in line for line in listed.skipped) for text in BROKEN)
    assert index(root, skip_bad=True) == listed


def test_a_long_list_of_errors_is_cut_and_counted(tmp_path):
    root = folder(tmp_path, {"a": 2, "b": 2})
    for number in range(MAX_REPORTED + 7):
        (root / "a" / f"bad{number}.jpg").touch()
    report = error(root)
    assert report.message.count("is empty") == MAX_REPORTED
    assert "... and 7 more" in report.message


def test_every_bad_row_of_a_csv_is_named_with_its_line(tmp_path):
    for name in "abcdefg":
        image(tmp_path / f"{name}.png", (40, 30))
    table = tmp_path / "t.csv"
    table.write_text(
        "path,label,split,x,y,w,h\n"
        "a.png,one,train,0,0,5,5\n"
        "b.png,two,train,,,,\n"
        "c.png,,train,,,,\n"
        "./a.png,two,train,,,,\n"
        "d.png,one,trained,,,,\n"
        "e.png,one,train,30,0,11,5\n"
        "f.png,one,train,3,0,0,5\n"
        "g.png,one,train,3,0,5\n"
        "missing.png,one,train,,,,\n"
        "g.png,two,train,1,2,,\n"
        ",two,train,,,,\n"
    )
    report = error(table)
    for line in (
        "t.csv line 4: c.png has no label",
        "t.csv line 5: ./a.png is already in line 2",
        "t.csv line 6: split is 'trained'; it must be train, val or test",
        "t.csv line 7: the box x,y,w,h = 30,0,11,5 extends beyond the image",
        "which is stored as 40 x 30",
        "t.csv line 8: f.png: the box x,y,w,h = 3,0,0,5 must have",
        "t.csv line 9 does not have 7 cells",
        "missing.png does not exist",
        "t.csv line 11: g.png: x,y,w,h is '1,2,,'",
        "t.csv line 12 has no path",
    ):
        assert line in report.message
    assert "has 9 error(s)" in report.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file;class\na;b\n", "has no column path, label; its first line is 'file;class'"),
        ("path,lable\na,b\n", "has no column label"),
        ("path,label,x,y\na,b,1,2\n", "has no column w, h"),
        ("path,label,label\na,b,c\n", "has two columns label"),
        ("", "has no column path, label"),
    ],
)
def test_a_csv_without_its_columns(tmp_path, text, expected):
    (tmp_path / "t.csv").write_text(text)
    report = error(tmp_path / "t.csv")
    assert expected in report.message
    assert "path,label" in report.hint


def test_a_csv_that_is_not_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    assert "is not a CSV file in UTF-8" in error(tmp_path / "t.csv").message


# ---- errors of classes and splits


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1}, "class 'c' is in test and not in train"),
        ({"Red_bird": 2, "red bird": 2, "wren": 2}, "'Red_bird' and 'red bird' look like names of the same class"),
        ({"a": 4}, "there is only one class, 'a'"),
        ({"a": 1, "b": 1}, "val has no image"),
        ({"val/a": 2, "val/b": 2, "test/a": 2}, "train has no image"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "valid/a": 1}, "are both the val split"),
        ({"a\x1b[31m": 2, "b": 2}, r"class name 'a\x1b[31m' contains control characters"),
        ({"": 3}, "there is no labelled image"),
    ],
)
def test_classes_that_do_not_fit_together(tmp_path, layout, expected):
    report = error(folder(tmp_path, layout))
    assert expected in report.message
    assert "\x1b" not in report.message
    assert expected in str(error(tmp_path, skip_bad=True))


def test_an_empty_folder(tmp_path):
    (tmp_path / "a").mkdir()
    assert "there is no labelled image" in error(tmp_path / "a").message


def test_a_class_with_one_image_and_a_class_missing_in_test_are_noted(tmp_path):
    listed = index(folder(tmp_path / "one", {"a": 1, "b": 8}))
    assert counts(listed)["train"]["a"] == 1
    assert "class 'a' has only one image: it is in train" in "\n".join(listed.notes)
    listed = index(folder(tmp_path / "two", {"train/a": 4, "train/b": 4, "test/a": 2}))
    assert "class 'b' has no test image" in "\n".join(listed.notes)


def test_the_classes_of_a_run_are_fixed(tmp_path):
    root = folder(tmp_path, {"a": 4, "b": 4})
    listed = index(root, classes=["b", "a"])
    assert listed.classes == ["b", "a"]
    assert all(item.path.parent.name == "ba"[item.label] for items in listed.splits.values() for item in items)
    assert "the run does not know the class 'b'; it knows 'a', 'c'" in error(root, classes=["a", "c"]).message
    assert "the run's class 'c' is not in the data" in error(root, classes=["a", "b", "c"]).message


def test_skipping_all_train_images_of_a_class_is_still_an_error(tmp_path):
    root = folder(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1, "test/c": 1, "train/c": 0})
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "x.png").touch()
    report = error(root, skip_bad=True)
    assert "class 'c' is in test and not in train" in report.message
    assert "x.png is empty" in report.message


def test_shares_that_leave_nothing(tmp_path):
    root = folder(tmp_path, {"a": 4, "b": 4})
    assert "leave nothing to train on" in error(root, val=0.6, test=0.5).message


# ---- the path


def test_a_misspelled_path_suggests_similar_names(tmp_path):
    folder(tmp_path / "birds", {"robin": 3, "wren": 3})
    assert str(tmp_path / "birds") in error(tmp_path / "brids").hint
    assert str(tmp_path / "birds") in error(tmp_path / "Brids" / "train").hint
    assert "plankton" in error(Path("plancton")).hint
    (tmp_path / "birds.zip").touch()
    assert "neither a folder nor a .csv file" in error(tmp_path / "birds.zip").message


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_folder_without_read_permission(tmp_path):
    root = folder(tmp_path, {"a": 3, "b": 3, "c": 3})
    (root / "c").chmod(0)
    try:
        assert "cannot be read" in error(root).message
    finally:
        (root / "c").chmod(0o755)


def test_a_class_that_loses_all_its_images_is_an_error(tmp_path) -> None:
    root = folder(tmp_path, {"a": 8, "b": 8})
    (root / "c").mkdir()
    for number in range(3):
        (root / "c" / f"{number}.png").write_bytes(b"not an image")
    (root / "d").mkdir()
    (root / "d" / "drawing.svg").write_bytes(b"<svg/>")
    report = error(root, skip_bad=True)
    assert "the class 'c' has lost all of its 3 images" in report.message
    assert "the class 'd' has lost all of its 1 images" in report.message


def test_what_is_skipped_does_not_depend_on_the_verified_splits(tmp_path) -> None:
    root = folder(tmp_path, {"a": 8, "b": 8})
    for number in range(3):
        (root / "b" / f"{number:02d}.png").write_bytes(b"not an image")
    data = recipe.Data(path=str(root), skip_bad=True)
    trained = build_index(data, seed=0)
    assert sum(sum(classes.values()) for classes in trained.left_out.values()) == 3
    assert set().union(*trained.left_out.values()) == {"b"}
    evaluated = build_index(data, seed=0, classes=trained.classes, verify=("test",))
    assert evaluated.splits == trained.splits


# ---- sources


def test_a_source_of_files_loads_what_the_index_lists(tmp_path) -> None:
    data = recipe.Data(path=str(folder(tmp_path, {"a": 6, "b": 6})), fit="squash")
    source = open_source(data, seed=1)
    assert source.index == build_index(data, seed=1)
    images = source.dataset("val", 16, augment=False)
    assert [item.path for item in images.items] == [item.path for item in source.index.splits["val"]]
    assert images[(0, 0)]["image"].shape == (3, 16, 16)
    with pytest.raises(DataError, match="the run's class 'c' is not in the data"):
        open_source(data, seed=1, classes=["a", "b", "c"])


def test_a_builtin_data_set_opens_its_own_source(tmp_path, monkeypatch) -> None:
    calls = []
    own = FileSource(index(folder(tmp_path, {"a": 6, "b": 6})), recipe.Data(), 0)

    def open_own(data: recipe.Data, seed: int) -> FileSource:
        calls.append((data.path, seed))
        return own

    entry = BuiltinDataset(name="drawn", about="", open=open_own)
    monkeypatch.setitem(REGISTRY, "drawn", entry)
    assert open_source(recipe.Data(path="drawn"), seed=4) is own
    assert open_source(recipe.Data(path="drawn:some:folder"), seed=5, classes=["a", "b"]) is own
    assert calls == [("", 4), ("some:folder", 5)]
    with pytest.raises(DataError, match="does not know the class 'b'"):
        open_source(recipe.Data(path="drawn"), seed=0, classes=["a"])
    with pytest.raises(DataError, match="the order of the classes 'a', 'b' differs"):
        open_source(recipe.Data(path="drawn"), seed=0, classes=["b", "a"])
    with pytest.raises(DataError, match="there are no files to read"):
        build_index(recipe.Data(path="drawn"), seed=0)


def test_clutter_without_its_item_files_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte") as caught:
        open_source(recipe.Data(path=f"clutter:{tmp_path}"), seed=0)
    assert "dataset-fashion-mnist" in caught.value.hint
