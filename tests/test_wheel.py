"""What is installed is whole: the wheel and the sdist hold every package, the recipes and the page's style."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from racnn_cli import recipe as recipes

ROOT = Path(__file__).resolve().parent.parent
NEEDED = [
    "racnn_cli/__main__.py",
    "racnn_cli/cli.py",
    "racnn_cli/results/report.css",
    "racnn_cli/training/loop.py",
    "racnn_cli/data/samples/fieldguide.py",
    "backbones/__init__.py",
    "backbones/vgg.py",
    *(f"recipes/{name}.toml" for name in recipes.names()),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist."""
    pytest.importorskip("hatchling", reason="the build backend is not installed (extra dev)")
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_holds_everything_and_nothing_else(built) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(about).decode()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "racnn = racnn_cli.__main__:main" in archive.read(entry).decode()
    assert set(NEEDED) <= set(names)
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"racnn_cli", "backbones", "recipes"}
    assert not [
        name for name in names if "__pycache__" in name or name.endswith((".pyc", ".safetensors", ".onnx"))
    ]
    for module in (ROOT / "racnn_cli").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in names
    for requirement in (
        "torch>=2.10",
        "timm",
        "typer",
        "rich",
        "albumentations==2.0.8",
        "pydantic",
        "onnxruntime",
    ):
        assert f"Requires-Dist: {requirement}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert any("LICENSE" in name for name in names)


def test_the_sdist_holds_what_the_wheel_is_built_from_and_the_tests(built) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        *NEEDED,
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "tests/conftest.py",
    } <= names


def test_an_unpacked_wheel_finds_its_recipes_from_anywhere(built, tmp_path) -> None:
    (wheel,) = built.glob("*.whl")
    place, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=elsewhere,
            env=os.environ | {"PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import racnn_cli, backbones; print(racnn_cli.__file__); print(backbones.__file__)")
    assert all(line.startswith(str(place)) for line in where.splitlines())
    listed = run("-m", "racnn_cli", "recipes", "ls")
    assert [line.split()[0] for line in listed.splitlines()] == recipes.names()
    assert "about" in run("-m", "racnn_cli", "recipes", "show", "demo")
