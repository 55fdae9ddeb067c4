"""README's commands work as typed, in their order, in a folder that holds nothing but `my-images`.

The two commands at its top install the package; `.ci/run` executes those two, word for word. Here, a command that
starts a run gets `--quick` and small views added, so that it ends in seconds; nothing else is changed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

import racnn_cli
from racnn_cli import recipe as recipes
from racnn_cli.bench import NAMES
from racnn_cli.cli import main
from racnn_cli.data.datasets import write

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SMALL = ["--quick", "--set", "model.sizes=[64,64,64]", "--set", "data.source=96", "--set", "data.workers=0"]


def blocks(language: str) -> list[str]:
    """README's code blocks in a language, without the two that install."""
    found = re.findall(rf"(<!-- [\w-]+ -->\n)?```{language}\n(.*?)```", README, flags=re.S)
    return [text for marker, text in found if not marker]


def run(words: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, f"{shlex.join(words)}: exit {end.value.code}\n{capsys.readouterr().err}"
    return capsys.readouterr().out


def test_commands_and_python_as_typed(here, monkeypatch, capsys) -> None:
    write("fieldguide", here / "drawn", recipes.Sample(images=64, size=96), seed=0)
    # A folder a class, as users have them, instead of the drawn set's splits and boxes.
    for image in sorted((here / "drawn").glob("*/*/*.png")):
        target = here / "my-images" / image.parent.name / f"{image.parent.parent.name}-{image.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.rename(target)
    commands = [
        shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line.startswith("racnn")
    ]
    assert len(commands) >= 10
    for words in commands:
        if words[1] == "bench":  # minutes each: `test_bench.py` runs them small
            assert words[2] in NAMES
            continue
        starts = words[1] in ("train", "pretrain-cnn") and "--resume" not in words
        two = words[-2:] == ["--scales", "2"]
        small = [word.replace("64,64,64", "64,64" if two else "64,64,64") for word in SMALL]
        run([*words, *(small if starts else [])], monkeypatch, capsys)
    newest = here / "runs" / "latest"
    assert (newest / "eval.json").is_file()
    for made in ("report.html", "model.onnx"):
        assert list((here / "runs").glob(f"*/{made}")), made
    assert len(list((here / "looked").glob("*.jpg"))) == 64
    answer_alone(next((here / "runs").glob("*/model.onnx")), here / "my-images", here / "bare")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("my-images")]) == 64


def answer_alone(file: Path, images: Path, bare: Path) -> None:
    """README's script, in a new environment `bare` that holds onnxruntime, numpy, Pillow and nothing of ours."""
    marked = re.search(r"<!-- alone -->\n```python\n(.*?)```", README, flags=re.S)
    assert marked
    assert len(marked[1].splitlines()) <= 20
    venv.create(bare, with_pip=True)
    python = bare / "bin" / "python"
    script = bare / "answer.py"
    script.write_text(marked[1], encoding="utf-8")

    def run(*words: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        options = {"cwd": images.parent, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([*map(str, words)], check=False, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pins = Path(__file__).resolve().parent.parent / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", pins, "onnxruntime", "numpy", "pillow")
    held = {entry["name"] for entry in json.loads(run(python, "-m", "pip", "list", "--format", "json"))}
    assert {"onnxruntime", "numpy", "pillow"} <= held
    assert not held & {"torch", "timm", "racnn", "onnx", "rich", "scipy", "opencv-python-headless"}
    some = sorted(images.rglob("*.png"))[:6]
    said = run(python, script, file.resolve(), *some)
    assert said == run(sys.executable, script, file.resolve(), *some)  # not a digit differs
    for line, answer in zip(said.splitlines(), racnn_cli.load(file).predict(some), strict=True):
        name, label, probability, boxes = line.split(maxsplit=3)
        assert (name, label) == (answer.path, answer.label)
        assert float(probability) == pytest.approx(answer.probability, abs=0.01)
        assert np.allclose(json.loads(boxes), answer.boxes, atol=1.0)


def test_the_two_commands_are_marked_for_ci() -> None:
    for marker, word in (("tests", "pytest"), ("main-job", "racnn train demo")):
        found = re.search(rf"<!-- {marker} -->\n```sh\n(.*?)\n```", README)
        assert found, marker
        assert word in found[1]
        assert "pip install -c constraints.txt" in found[1]


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_named_or_listed(name) -> None:
    assert f"`{name}`" in README or f"train {name}" in README
