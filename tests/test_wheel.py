"""The wheel and the sdist are complete, install one top-level package, and take nothing from foreign ones."""

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
NEEDED = {
    "racnn_cli/__main__.py",
    "racnn_cli/py.typed",
    "racnn_cli/results/report.css",
    "racnn_cli/results/report.html.jinja",
    "racnn_cli/training/loop.py",
    "racnn_cli/data/datasets/fieldguide.py",
    "racnn_cli/backbones/__init__.py",
    "racnn_cli/backbones/vgg.py",
    *(f"racnn_cli/recipes/{name}.toml" for name in recipes.names()),
}
WHERE = "import racnn_cli.backbones as b; from racnn_cli import recipe as r; print(b.__file__); print(r.RECIPES)"


def build(folder: Path, target: str, out: Path) -> Path:
    """Build the wheel or the sdist of a source tree."""
    pytest.importorskip("hatchling", reason="the build backend is not installed (extra dev)")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A folder with packages of other people that have the names of ours in the repository."""
    folder = tmp_path / "foreign"
    for name in ("backbones", "recipes", "tests"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('a foreign package was imported')\n")
    (folder / "recipes" / "broken.toml").write_text("no toml at all\n")
    (folder / "recipes" / "demo.toml").write_text('about = "foreign"\n')
    return folder


def python(*words: str, cwd: Path, path: list[Path]) -> str:
    """Run Python in a folder; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_one_package_and_nothing_else(wheel) -> None:
    names = names_in(wheel)
    assert names >= NEEDED
    assert {name.split("/")[0] for name in names} == {"racnn_cli"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".safetensors", ".onnx"))]
    for module in (ROOT / "racnn_cli").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in names
    for module in (ROOT / "backbones").glob("*.py"):
        assert f"racnn_cli/backbones/{module.name}" in names


def test_the_wheel_says_what_it_needs(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(about).decode()
        (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "racnn = racnn_cli.__main__:main" in archive.read(entry).decode()
        assert any(".dist-info/" in name and "LICENSE" in name for name in archive.namelist())
    for requirement in (
        "torch>=2.10",
        "timm",
        "typer",
        "rich",
        "albumentations==2.0.8",
        "pydantic",
        "jinja2",
        "onnxruntime",
    ):
        assert f"Requires-Dist: {requirement}" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_the_sdist_holds_the_sources_and_builds_the_same_wheel(sdist, wheel, tmp_path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert names >= {
        "backbones/vgg.py",
        "recipes/demo.toml",
        "docs/design.md",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "constraints.txt",
        "tests/conftest.py",
    }
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert names_in(build(unpacked, "wheel", tmp_path / "again")) == names_in(wheel)


def test_foreign_packages_do_not_reach_an_installed_wheel(wheel, foreign, tmp_path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # In the current folder, and first on the path.
    path = [foreign, site]
    for line in python("-c", WHERE, cwd=foreign, path=path).splitlines():
        assert line.startswith(str(site / "racnn_cli"))
    listed = python("-m", "racnn_cli", "recipes", "ls", cwd=foreign, path=path)
    assert [line.split()[0] for line in listed.splitlines()] == recipes.names()
    assert "plankton" in python("-m", "racnn_cli", "recipes", "show", "demo", cwd=foreign, path=path)


def test_foreign_packages_do_not_reach_a_checkout(foreign) -> None:
    """As in an editable install, which is the checkout on the path."""
    where = python("-c", WHERE, cwd=foreign, path=[foreign, ROOT]).splitlines()
    assert where == [str(ROOT / "backbones" / "__init__.py"), str(ROOT / "recipes")]
    listed = python("-m", "racnn_cli", "recipes", "ls", cwd=foreign, path=[foreign, ROOT])
    assert [line.split()[0] for line in listed.splitlines()] == recipes.names()


@pytest.mark.parametrize(
    "launcher",
    [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]],
    ids=["python", "torchrun"],
)
def test_it_runs_inside_the_checkout_beside_an_installed_wheel(launcher, wheel, foreign, tmp_path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    words = [*launcher, "-m", "racnn_cli", "recipes", "ls"]
    listed = python(*words, cwd=ROOT, path=[foreign, site])
    assert [line.split()[0] for line in listed.splitlines()] == recipes.names()
