"""Names of classes and files: Unicode forms, look-alikes, case; paths, labels and boxes of a CSV file."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from test_layout import folder, image, listed, sizes

from racnn_cli import recipe
from racnn_cli.data.index import build_index, labelled
from racnn_cli.data.locate import absolute
from racnn_cli.errors import DataError
from racnn_cli.run import Run

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def table(root: Path, rows: list[str], header: str = "path,label") -> Path:
    path = root / "t.csv"
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return path


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        listed(path)
    return caught.value.message


def test_names_that_differ_in_their_unicode_form_are_one_class(tmp_path) -> None:
    counts = {f"train/{NFC}": 5, "train/tea": 5, f"val/{NFD}": 2, "val/tea": 2, f"test/{NFD}": 1, "test/tea": 1}
    index = listed(folder(tmp_path, counts))
    assert index.classes == [NFC, "tea"]
    assert sizes(index) == {"train": 10, "val": 4, "test": 2}


def test_a_run_takes_its_classes_in_either_form(tmp_path) -> None:
    """A network trained on Linux is measured on a Mac, and the other way round."""
    for form, other in ((NFC, NFD), (NFD, NFC)):
        data = recipe.Data(path=str(folder(tmp_path / form / other, {other: 3, "tea": 3})))
        assert sorted({item.label for item in labelled(data, seed=0, classes=[form, "tea"]).items}) == [0, 1]
        assert build_index(data, seed=0, classes=[form, "tea"]).classes == [form, "tea"]


def test_the_split_and_the_fingerprint_do_not_depend_on_the_form(tmp_path) -> None:
    indexes = []
    for form in (NFC, NFD):
        for label in ("a", "b"):
            for number in range(9):
                image(tmp_path / form / label / f"{form}{number}.png")
        indexes.append(listed(tmp_path / form))
    first, second = indexes
    assert first.fingerprint == second.fingerprint
    assert [unicodedata.normalize("NFC", item.path.name) for item in first.splits["test"]] == [
        unicodedata.normalize("NFC", item.path.name) for item in second.splits["test"]
    ]


def test_two_files_whose_names_differ_in_form_alone_are_both_kept(tmp_path) -> None:
    for form in (NFC, NFD):
        image(tmp_path / "a" / f"{form}.png")
    if len(list((tmp_path / "a").iterdir())) == 1:
        pytest.skip("this file system does not tell the two names apart")
    folder(tmp_path, {"a": 4, "b": 6})
    assert sum(sizes(listed(tmp_path)).values()) == 12


def test_a_csv_finds_files_in_either_form(tmp_path) -> None:
    names = [f"{NFD}{number}.png" for number in range(8)]
    for name in names:
        image(tmp_path / name)
    rows = [f"{unicodedata.normalize('NFC', name)},{'ab'[number % 2]}" for number, name in enumerate(names)]
    assert sum(sizes(listed(table(tmp_path, rows))).values()) == 8


@pytest.mark.parametrize(
    ("first", "second", "points"),
    [
        ("a b", "a\u00a0b", "U+0020 against U+00A0"),
        ("café", "cafe\u0301\u200b", "none against U+200B"),
        ("Panda", "P\u0430nda", "none against U+0430"),
        ("wren", "ｗren", "U+0077 against U+FF57"),
    ],
)
def test_names_that_look_the_same_are_refused_with_their_code_points(tmp_path, first, second, points) -> None:
    message = problem(folder(tmp_path, {first: 5, second: 5, "zebra": 5}))
    assert "look like names of the same class" in message
    assert f"(code points {points})" in message


def test_case_may_differ_where_both_classes_have_many_images(tmp_path) -> None:
    index = listed(folder(tmp_path / "letters", {"a": 4, "A": 4, "b": 4, "B": 40}))
    assert index.classes == ["A", "B", "a", "b"]
    assert "the classes 'A' and 'a' differ in case only and are kept apart" in index.notes
    assert "'Robin' and 'robin' look like names of the same class" in problem(
        folder(tmp_path / "typo", {"robin": 30, "Robin": 2, "wren": 30})
    )


def test_a_csv_whose_paths_all_fail_is_one_problem_with_its_cause(tmp_path) -> None:
    folder(tmp_path / "images", {"a": 3, "b": 3})
    rows = [f"{label}/0{number}.png,{label}" for label in "ab" for number in range(3)]
    cases = {
        "backslashes": ([f"images\\{row}".replace("/", "\\") for row in rows], "images\\a\\00.png has backslashes"),
        "folder": (rows, f"{tmp_path}/images/a/00.png exists"),
        "too long": ([f"data/images/{row}" for row in rows], f"{tmp_path}/images/a/00.png exists"),
        "nowhere": ([f"x{row}" for row in rows], f"paths are relative to {tmp_path}/"),
    }
    for name, (paths, cause) in cases.items():
        message = problem(table(tmp_path, paths))
        assert message.count("\n") == 1, name
        assert "none of the 6 files exists" in message, name
        assert cause in message, name


def test_the_errors_of_a_csv_are_in_the_order_of_its_lines(tmp_path) -> None:
    folder(tmp_path, {"a": 4, "b": 4})
    rows = ["z.png,a", "a/00.png,a", "c.png,", "b/00.png,b", "m.png,b", "a/01.png,nan"]
    lines = [line for line in problem(table(tmp_path, rows)).splitlines() if "line" in line]
    assert [line.split(":")[0].split()[-1] for line in lines] == ["2", "4", "6", "7"]


@pytest.mark.parametrize("label", ["nan", "NaN", "<NA>", "null", "#N/A"])
def test_a_label_that_is_a_missing_value_is_asked_about(tmp_path, label) -> None:
    folder(tmp_path, {"a": 4, "b": 4})
    rows = [f"{name}/0{number}.png,{name}" for name in "ab" for number in range(3)]
    message = problem(table(tmp_path, [*rows, f"a/03.png,{label}"]))
    assert f"has the label {label!r}, which is how a missing label is often written" in message
    index = listed(table(tmp_path, [*rows, f"a/03.png,{label}"]), skip_bad=True)
    assert index.classes == ["a", "b"]
    assert listed(table(tmp_path, [f"{row}one" for row in rows])).classes == ["aone", "bone"]


def test_boxes_as_fractions_are_refused_with_the_fix(tmp_path) -> None:
    folder(tmp_path, {"a": 3, "b": 3})
    rows = [f"{name}/0{number}.png,{name},0.1,0.25,0.5,0.5" for name in "ab" for number in range(3)]
    message = problem(table(tmp_path, rows, "path,label,x,y,w,h"))
    assert "all 6 boxes are smaller than a pixel, such as x,y,w,h = 0.1,0.25,0.5,0.5" in message
    assert "multiply x and w by the image's width" in message
    rows[0] = "a/00.png,a,0,0,8,6"
    assert sizes(listed(table(tmp_path, rows, "path,label,x,y,w,h")))["train"] == 2


def test_a_relative_path_belongs_to_the_folder_that_the_run_was_started_in(here, racnn, monkeypatch) -> None:
    folder(here / "data", {"a": 12, "b": 12})
    result = racnn("train", "tiny", "--data", "data", "--out", "run", "--quick")
    assert result.code == 0, result.err
    assert Run(here / "run").recipe().data.path == str(here / "data")
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    assert racnn("eval", "--run", "../run").code == 0
    assert racnn("train", "tiny", "--data", "../data", "--out", "../run", "--resume", "--quick").code == 0
    assert absolute(recipe.Data(path="plankton")) == "plankton"
    assert absolute(recipe.Data(path="clutter:items")) == f"clutter:{here / 'other' / 'items'}"
