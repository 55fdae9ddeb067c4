"""Where images come from: layouts, the split, and every error of a data set said at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from racnn_cli import recipe
from racnn_cli.data.index import SHOWN, Index, build_index
from racnn_cli.data.split import choose, hold_out
from racnn_cli.errors import RacnnError


def image(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def folder(root: Path, counts: dict[str, int]) -> Path:
    for place, count in counts.items():
        for number in range(count):
            image(root / place / f"{number:02d}.png")
    return root


def index(path: Path, *, seed: int = 0, classes: list[str] | None = None, **keys: object) -> Index:
    return build_index(recipe.Data(path=str(path), **keys), seed=seed, classes=classes)  # type: ignore[arg-type]


def error(path: Path, **keys: object) -> RacnnError:
    with pytest.raises(RacnnError) as caught:
        index(path, **keys)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value


def counts(found: Index) -> dict[str, dict[str, int]]:
    return {
        split: {name: sum(item.label == place for item in items) for place, name in enumerate(found.classes)}
        for split, items in found.splits.items()
    }


def names(found: Index) -> dict[str, list[str]]:
    return {
        split: [f"{item.path.parent.name}/{item.path.name}" for item in items]
        for split, items in found.splits.items()
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
    labels = {f"c{place}": [f"c{place}/{n}" for n in range(size)] for place, size in enumerate(sizes)}
    rest, held = hold_out(labels, {"val": val, "test": test}, seed=seed)
    assert sorted(rest + held["val"] + held["test"]) == sorted(
        name for members in labels.values() for name in members
    )
    for label, members in labels.items():
        size = len(members)
        train, *others = (sum(name.startswith(f"{label}/") for name in s) for s in (rest, *held.values()))
        assert train >= 1
        for share, number in zip((val, test), others, strict=True):
            # The last splits get what is left where the first are rounded up and one image stays to train on.
            assert abs(number - share * size) <= 1 or number == 1 or train == 1
            if share > 0 and size >= 3:
                assert number >= 1
        assert others[1] == 0 or test > 0
    assert hold_out({k: v[::-1] for k, v in labels.items()}, {"val": val, "test": test}, seed=seed) == (
        rest,
        held,
    )


def test_a_class_more_does_not_move_the_images_of_the_others():
    labels = {"a": [f"a{n}" for n in range(20)], "b": [f"b{n}" for n in range(20)]}
    shares = {"val": 0.2, "test": 0.2}
    both, one = hold_out(labels, shares, seed=1), hold_out({"b": labels["b"]}, shares, seed=1)
    assert [name for name in both[1]["test"] if name[0] == "b"] == one[1]["test"]
    assert both != hold_out(labels, shares, seed=2)
    assert len(choose(labels["a"], 5, "a", seed=0)) == 5


# ---- layouts


def test_a_folder_a_class_is_split_by_the_seed(tmp_path):
    root = folder(tmp_path / "birds", {"robin": 20, "wren": 10})
    found = index(root)
    assert found.classes == ["robin", "wren"]
    assert counts(found) == {
        "train": {"robin": 13, "wren": 6},
        "val": {"robin": 3, "wren": 2},
        "test": {"robin": 4, "wren": 2},
    }
    assert index(root) == found
    assert names(index(root, seed=1))["test"] != names(found)["test"]
    assert counts(index(root, test=0.0))["test"] == {"robin": 0, "wren": 0}
    # the same files elsewhere, made in another order, are split in the same way
    other = tmp_path / "elsewhere"
    for file in sorted(root.rglob("*.png"), reverse=True):
        image(other / file.relative_to(root))
    assert names(index(other)) == names(found)


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_folders_of_splits_are_kept(tmp_path, val):
    root = folder(
        tmp_path, {"train/a": 3, "train/b": 2, f"{val}/a": 1, f"{val}/b": 1, "test/a": 2, "test/b": 1}
    )
    found = index(root)
    assert counts(found) == {"train": {"a": 3, "b": 2}, "val": {"a": 1, "b": 1}, "test": {"a": 2, "b": 1}}
    assert all(f"{split}/" in str(item.path) for split in ("train", "test") for item in found.splits[split])


def test_a_split_that_the_data_does_not_name_is_taken_off_train(tmp_path):
    root = folder(tmp_path / "a", {"train/a": 10, "train/b": 10, "test/a": 5, "test/b": 5})
    found = index(root, val=0.2)
    assert counts(found) == {"train": {"a": 8, "b": 8}, "val": {"a": 2, "b": 2}, "test": {"a": 5, "b": 5}}
    assert all("train" in item.path.parts for item in found.splits["val"])
    root = folder(tmp_path / "b", {"train/a": 10, "train/b": 10, "val/a": 5, "val/b": 5})
    assert counts(index(root, test=0.3))["test"] == {"a": 3, "b": 3}
    assert counts(index(root, test=0.0))["test"] == {"a": 0, "b": 0}


def test_nested_folders_links_hidden_files_and_other_files(tmp_path):
    root = folder(tmp_path / "data", {"a/2024/may": 3, "b": 3, ".cache/x": 1, "__MACOSX/a": 1})
    image(root / "a" / ".hidden.png")
    (root / "a" / "notes.txt").write_text("seen in May")
    (root / "README.md").write_text("about")
    kept = folder(tmp_path / "kept", {"c": 3})
    (root / "c").symlink_to(kept / "c", target_is_directory=True)
    (root / "b" / "more").symlink_to(root, target_is_directory=True)  # a circle
    (root / "b" / "circle").symlink_to(root / "b", target_is_directory=True)
    (root / "b" / "more").unlink()
    found = index(root)
    assert found.classes == ["a", "b", "c"]
    assert sum(len(items) for items in found.splits.values()) == 9
    notes = "\n".join(found.notes)
    assert "notes.txt" in notes
    assert "README.md" in notes
    assert "links back" in notes


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
    found = index(table)
    assert found.classes == ["robin, red", "wren"]
    assert counts(found) == {
        "train": {"robin, red": 1, "wren": 1},
        "val": {"robin, red": 0, "wren": 1},
        "test": {"robin, red": 1, "wren": 0},
    }
    assert [item.box for item in found.splits["train"]] == [(1.0, 2.0, 3.5, 4.0), None]
    assert found.splits["val"][0].path == tmp_path / "images" / "2.png"
    assert "columns are not used: note" in found.notes[0]
    assert any("'robin, red' has no val image" in note for note in found.notes)


def test_a_csv_without_splits_is_split_as_a_folder(tmp_path):
    root = folder(tmp_path, {"a": 10, "b": 10})
    rows = [f"{file.relative_to(root)},{file.parent.name}" for file in root.rglob("*.png")]
    for number, order in enumerate((rows, sorted(rows, reverse=True))):
        (root / f"{number}.csv").write_text("\n".join(["path,label", *order]))
    assert names(index(root / "0.csv")) == names(index(root / "1.csv")) == names(index(root))


def test_runs_that_lie_where_the_images_lie_are_no_classes(tmp_path):
    root = folder(tmp_path, {"red": 9, "blue": 9})
    before = index(root)
    for place in ("runs/own", "elsewhere"):
        (root / place).mkdir(parents=True)
        (root / place / "recipe.toml").touch()
    image(root / "runs" / "own" / "drawn.png")
    found = index(root)
    assert found.splits == before.splits
    assert found.fingerprint == before.fingerprint
    assert sum("holds a run of racnn" in note for note in found.notes) == 2


def test_limit_keeps_so_many_of_each_class_and_split(tmp_path):
    root = folder(tmp_path, {"a": 30, "b": 20})
    whole, few = index(root), index(root, limit=3)
    assert counts(few) == {split: {"a": 3, "b": 3} for split in ("train", "val", "test")}
    assert all(set(few.splits[split]) <= set(whole.splits[split]) for split in few.splits)


# ---- errors of files


def broken(tmp_path: Path) -> Path:
    root = folder(tmp_path / "birds", {"robin": 6, "wren": 6})
    (root / "robin" / "empty.jpg").touch()
    (root / "robin" / "text.png").write_text("no image")
    whole = image(root / "wren" / "cut.bmp", (40, 40)).read_bytes()
    (root / "wren" / "cut.bmp").write_bytes(whole[: len(whole) // 2])
    (root / "wren" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "wren" / "moving.gif").write_bytes(b"GIF89a")
    (root / "nothing").mkdir()
    image(root / "loose.png")
    Image.new("1", (20_000, 9_500)).save(root / "robin" / "bomb.png")
    return root


BROKEN = (
    "empty.jpg is empty",
    "text.png is not a",
    "cut.bmp is damaged or truncated",
    "gone.png does not exist",
    "moving.gif: .gif files are not read",
    "nothing holds no image",
    "loose.png has no label",
    "bomb.png is oversized",
)


def test_every_bad_file_is_named_in_one_error(tmp_path):
    found = error(broken(tmp_path))
    assert all(text in found.message for text in BROKEN)
    assert f"has {len(BROKEN)} error(s)" in found.message
    assert "--skip-bad" in found.hint


def test_skip_bad_goes_on_and_records_them(tmp_path):
    root = broken(tmp_path)
    found = index(root, skip_bad=True)
    assert found.classes == ["robin", "wren"]
    assert sum(len(items) for items in found.splits.values()) == 12
    assert len(found.skipped) == len(BROKEN)
    assert all(any(text in line for line in found.skipped) for text in BROKEN)
    assert index(root, skip_bad=True) == found


def test_a_long_list_of_errors_is_cut_and_counted(tmp_path):
    root = folder(tmp_path, {"a": 2, "b": 2})
    for number in range(SHOWN + 7):
        (root / "a" / f"bad{number}.jpg").touch()
    found = error(root)
    assert found.message.count("is empty") == SHOWN
    assert "... and 7 more" in found.message


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
        "d.png,one,training,,,,\n"
        "e.png,one,train,30,0,11,5\n"
        "f.png,one,train,3,0,0,5\n"
        "g.png,one,train,3,0,5\n"
        "gone.png,one,train,,,,\n"
        "g.png,two,train,1,2,,\n"
        ",two,train,,,,\n"
    )
    found = error(table)
    for line in (
        "t.csv line 4: c.png has no label",
        "t.csv line 5: ./a.png is there already in line 2",
        "t.csv line 6: split is 'training'; train, val or test",
        "t.csv line 7: the box x,y,w,h = 30,0,11,5 leaves the image",
        "which is 40 x 30 as stored",
        "t.csv line 8: f.png: the box x,y,w,h = 3,0,0,5 must have",
        "t.csv line 9 has not 7 cells",
        "gone.png does not exist",
        "t.csv line 11: g.png: x,y,w,h is '1,2,,'",
        "t.csv line 12 names no file",
    ):
        assert line in found.message
    assert "has 9 error(s)" in found.message


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("file;class\na;b\n", "has no column path, label; its first line is 'file;class'"),
        ("path,lable\na,b\n", "has no column label"),
        ("path,label,x,y\na,b,1,2\n", "has no column w, h"),
        ("path,label,label\na,b,c\n", "names the column label twice"),
        ("", "has no column path, label"),
    ],
)
def test_a_csv_without_its_columns(tmp_path, text, wanted):
    (tmp_path / "t.csv").write_text(text)
    found = error(tmp_path / "t.csv")
    assert wanted in found.message
    assert "path,label" in found.hint


def test_a_csv_that_is_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    assert "is not a CSV file in UTF-8" in error(tmp_path / "t.csv").message


# ---- errors of classes and splits


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ({"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1}, "class 'c' is in test and not in train"),
        ({"Red_bird": 2, "red bird": 2, "wren": 2}, "'Red_bird' and 'red bird' look like names of one class"),
        ({"a": 4}, "there is only one class, 'a'"),
        ({"a": 1, "b": 1}, "val has no image"),
        ({"val/a": 2, "val/b": 2, "test/a": 2}, "train has no image"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "valid/a": 1}, "are both the val split"),
        ({"a\x1b[31m": 2, "b": 2}, r"class name 'a\x1b[31m' contains control characters"),
        ({"": 3}, "there is no labelled image"),
    ],
)
def test_classes_that_do_not_fit_together(tmp_path, layout, wanted):
    found = error(folder(tmp_path, layout))
    assert wanted in found.message
    assert "\x1b" not in found.message
    assert wanted in str(error(tmp_path, skip_bad=True))


def test_an_empty_folder(tmp_path):
    (tmp_path / "a").mkdir()
    assert "there is no labelled image" in error(tmp_path / "a").message


def test_a_class_with_one_images_and_a_class_missing_in_test_are_noted(tmp_path):
    found = index(folder(tmp_path / "one", {"a": 1, "b": 8}))
    assert counts(found)["train"]["a"] == 1
    assert "class 'a' has one image: it is in train" in "\n".join(found.notes)
    found = index(folder(tmp_path / "two", {"train/a": 4, "train/b": 4, "test/a": 2}))
    assert "class 'b' has no test image" in "\n".join(found.notes)


def test_the_classes_of_a_run_are_fixed(tmp_path):
    root = folder(tmp_path, {"a": 4, "b": 4})
    found = index(root, classes=["b", "a"])
    assert found.classes == ["b", "a"]
    assert all(item.path.parent.name == "ba"[item.label] for items in found.splits.values() for item in items)
    assert "the run does not know the class 'b'; it knows 'a', 'c'" in error(root, classes=["a", "c"]).message
    assert "the run's class 'c' is not in the data" in error(root, classes=["a", "b", "c"]).message


def test_skipping_every_images_of_a_class_in_train_is_still_an_error(tmp_path):
    root = folder(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1, "test/c": 1, "train/c": 0})
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "x.png").touch()
    found = error(root, skip_bad=True)
    assert "class 'c' is in test and not in train" in found.message
    assert "x.png is empty" in found.message


def test_shares_that_leave_nothing(tmp_path):
    root = folder(tmp_path, {"a": 4, "b": 4})
    assert "leave nothing to train on" in error(root, val=0.6, test=0.5).message


# ---- the path itself


def test_a_misspelt_path_names_what_is_near(tmp_path):
    folder(tmp_path / "birds", {"robin": 3, "wren": 3})
    assert str(tmp_path / "birds") in error(tmp_path / "brids").hint
    assert str(tmp_path / "birds") in error(tmp_path / "Brids" / "train").hint
    assert "plankton" in error(Path("plancton")).hint
    (tmp_path / "birds.zip").touch()
    assert "neither a folder nor a .csv file" in error(tmp_path / "birds.zip").message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    root = folder(tmp_path, {"a": 3, "b": 3, "c": 3})
    (root / "c").chmod(0)
    try:
        assert "cannot be read" in error(root).message
    finally:
        (root / "c").chmod(0o755)


def test_a_class_that_only_had_bad_files_stays_away_in_evaluation(tmp_path) -> None:
    """What --skip-bad leaves out must not depend on which splits are read to the end."""
    for label in ("a", "b", "c"):
        (tmp_path / label).mkdir()
        for number in range(8):
            file = tmp_path / label / f"{number}.png"
            if label == "c":
                file.write_bytes(b"no image")
            else:
                Image.new("RGB", (20, 20), (number, 0, 0)).save(file)
    data = recipe.Data(path=str(tmp_path), skip_bad=True)
    trained = build_index(data, seed=0)
    assert trained.classes == ["a", "b"]
    again = build_index(data, seed=0, classes=trained.classes, verify=("test",))
    assert again.splits == trained.splits
