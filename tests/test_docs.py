"""README and docs/ are correct: commands, code, names, paths, links, generated pages and layout.

README's commands are run as typed, in their order, in a folder that contains only `my-images`. A command that starts
a run gets `--quick` and small views added, so that it ends in seconds. `.ci/run` executes the two commands that
install the package. Commands of docs/ are parsed: the command, its options and its recipe keys must exist.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import racnn_cli
from racnn_cli import events
from racnn_cli import recipe as recipes
from racnn_cli.bench import NAMES
from racnn_cli.cli import app, main
from racnn_cli.data.datasets import write

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
}
CURRENT = [name for name in PAGES if name != "CHANGELOG.md"]
"""Pages that describe the present state; the changelog also mentions old names."""
SMALL = ["--quick", "--set", "model.sizes=[64,64,64]", "--set", "data.source=96", "--set", "data.workers=0"]
SMALL += [word for stage in ("pretrain_cnn", "pretrain_apn", "fusion") for word in ("--set", f"{stage}.epochs=1")]
NETWORK = ["--set", "model.backbone=test_resnet", "--weights", "none"]
"""For the run that is exported: tracing a network takes seconds per 100 layers."""
COMMAND = typer.main.get_command(app)
CODE = re.compile(r"(?:<!-- ([\w-]+) -->\n)?```(\w*)\n(.*?)```", flags=re.S)
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
INSTALL = ("main-job", "tests")
IMAGES = 24  # the fewest that are drawn


def blocks(page: str, *languages: str) -> list[str]:
    """The code blocks of a page in these languages, without the marked commands that install."""
    code = CODE.findall(PAGES[page])
    return [text for marker, language, text in code if language in languages and marker not in INSTALL]


def marked(page: str, marker: str) -> str:
    """The code block after `<!-- marker -->`."""
    (text,) = (text for name, _, text in CODE.findall(PAGES[page]) if name == marker)
    return text


def inline_code(page: str) -> list[str]:
    return [" ".join(text.split()) for text in INLINE.findall(CODE.sub("", PAGES[page]))]


def racnn_commands(page: str) -> Iterator[list[str]]:
    """The arguments of every `racnn` command in shell blocks and inline code."""
    for block in blocks(page, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["racnn"]:
                yield words[1:]
            elif "racnn_cli" in words and "torchrun" in words:
                yield words[words.index("racnn_cli") + 1 :]
    for text in inline_code(page):
        if text.startswith("racnn ") and not re.search(r"[|…]|\.\.\.", text):
            yield shlex.split(text)[1:]


def run(words: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, f"{shlex.join(words)}: exit {end.value.code}\n{capsys.readouterr().err}"
    return capsys.readouterr().out


def test_readme_commands_and_python_run_as_typed(here, monkeypatch, capsys) -> None:
    write("fieldguide", here / "drawn", recipes.Sample(images=IMAGES, size=96), seed=0)
    # One folder per class, as users have them, instead of the drawn set's splits and boxes.
    for image in sorted((here / "drawn").glob("*/*/*.png")):
        target = here / "my-images" / image.parent.name / f"{image.parent.parent.name}-{image.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.rename(target)
    commands = [shlex.split(line) for block in blocks("README.md", "sh") for line in block.splitlines()]
    assert len(commands) >= 10
    for words in commands:
        assert words[0] == "racnn"
        starts = words[1] in ("train", "pretrain-cnn") and "--resume" not in words
        two_scales = words[-2:] == ["--scales", "2"]
        small = [word.replace("64,64,64", "64,64" if two_scales else "64,64,64") for word in SMALL]
        small += NETWORK if words[1] == "pretrain-cnn" else []
        run([*words, *(small if starts else [])], monkeypatch, capsys)
    assert (here / "runs" / "latest" / "eval.json").is_file()
    for name in ("report.html", "model.onnx"):
        assert list((here / "runs").glob(f"*/{name}")), name
    assert len(list((here / "attended").glob("*.jpg"))) == IMAGES
    check_script(next((here / "runs").glob("*/model.onnx")), here / "my-images", here / "bare")
    for block in blocks("README.md", "python"):
        if "onnxruntime" not in block:  # the standalone script, which has been run
            exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("my-images")]) == IMAGES


def check_script(file: Path, images: Path, bare: Path) -> None:
    """Run the standalone script in a new environment `bare` that has onnxruntime, numpy and Pillow only."""
    text = marked("README.md", "alone")
    assert len(text.splitlines()) <= 30
    venv.create(bare)
    python = bare / "bin" / "python"
    script = bare / "answer.py"
    script.write_text(text, encoding="utf-8")

    def run(*words: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        options = {"cwd": images.parent, "env": environment, "capture_output": True, "text": True}
        process = subprocess.run([*map(str, words)], check=False, **options)
        assert process.returncode == 0, process.stderr
        return process.stdout

    pins = ROOT / "constraints.txt"
    pip = [sys.executable, "-m", "pip", "--python", python]  # this environment's pip, so that none is installed
    run(*pip, "install", "--quiet", "--no-compile", "-c", pins, "onnxruntime", "numpy", "pillow")
    listed = json.loads(run(*pip, "list", "--format", "json"))
    packages = {entry["name"] for entry in listed}
    assert {"onnxruntime", "numpy", "pillow"} <= packages
    assert not packages & {"torch", "timm", "racnn", "onnx", "rich", "scipy", "opencv-python-headless"}
    paths = sorted(images.rglob("*.png"))[:6]
    output = run(python, script, file.resolve(), *paths)
    assert output == run(sys.executable, script, file.resolve(), *paths)  # not a digit differs
    for line, prediction in zip(output.splitlines(), racnn_cli.load(file).predict(paths), strict=True):
        name, label, probability, boxes = line.split(maxsplit=3)
        assert (name, label) == (prediction.path, prediction.label)
        assert float(probability) == pytest.approx(prediction.probability, abs=0.01)
        assert np.allclose(json.loads(boxes), prediction.boxes, atol=1.0)


def test_the_two_commands_are_marked_for_ci() -> None:
    for marker, word in (("tests", "pytest"), ("main-job", "racnn train demo")):
        command = re.search(rf"<!-- {marker} -->\n```sh\n(.*?)\n```", README, flags=re.DOTALL)
        assert command, marker
        assert word in command[1]
        assert "pip install -c constraints.txt" in command[1]
    assert [marker for marker, *_ in CODE.findall(README)][:2] == ["main-job", "tests"]


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_named_or_listed(name) -> None:
    assert f"`{name}`" in README or f"train {name}" in README


@pytest.mark.parametrize("page", CURRENT)
def test_commands_parse(page) -> None:
    for arguments in racnn_commands(page):
        parse(list(arguments))


def parse(arguments: list[str]) -> None:
    """Parse a command without running it: its options, choices, recipes and recipe keys must exist."""
    command: Any = COMMAND
    shown, name = shlex.join(["racnn", *arguments]), "racnn"
    while arguments and hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"{shown}: no such command"
        command = command.commands[name]
    if hasattr(command, "commands") or not arguments:
        return
    try:
        values = command.make_context(name, list(arguments)).params
    except Exception as error:  # click's UsageError, which recent versions of typer bring themselves
        if not hasattr(error, "format_message"):
            raise
        pytest.fail(f"{shown}: {error.format_message()}")
    for text in values.get("sets") or ():
        key = text.partition("=")[0]
        assert key in recipes.key_names() or key == "KEY", shown
    recipe = values.get("recipe")
    assert recipe in (None, "RECIPE", *recipes.names()) or recipe.endswith(".toml"), shown
    if name == "bench":  # of growth, crop and backbones, which were removed, the results are kept
        assert values["name"] in (*NAMES, "NAME", "growth", "crop", "backbones"), shown


@pytest.mark.parametrize("page", CURRENT)
def test_python_compiles_and_its_names_exist(page) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block, page)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name == "openvino" or importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("page", CURRENT)
def test_names_and_paths_exist(page) -> None:
    """Dotted names of the package, recipe keys and repository paths in inline code."""
    sections = {key.partition(".")[0] for key in recipes.key_names() if "." in key}
    for text in inline_code(page):
        if re.fullmatch(r"racnn_cli(\.\w+)+(\(.*\))?", text):
            assert resolves(text.partition("(")[0]), f"{page}: {text}"
        elif (key := re.fullmatch(r"(\w+)\.(\w+)( = .*)?", text)) and key[1] in sections:
            known = key[2] == "onnx" or text.partition(" ")[0] in recipes.key_names()
            assert known or key[2] in recipe_tables(), f"{page}: {text}"
        elif re.fullmatch(r"(racnn_cli|backbones|tests|docs|recipes|\.ci)/[\w./-]*", text):
            assert (ROOT / text).exists() or "NOTES" in text, f"{page}: {text}"


def recipe_tables() -> set[str]:
    return {part for key in recipes.key_names() for part in key.split(".")[:-1]}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_images_resolve(page) -> None:
    text = CODE.sub("", PAGES[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", CODE.sub("", text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert not [line for line in README.splitlines() if len(line) > 100]


@pytest.mark.parametrize("page", PAGES)
def test_pages_wrap_and_begin_with_their_purpose(page) -> None:
    lines = CODE.sub("", PAGES[page]).splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]
    assert lines[0].startswith("# ")
    assert lines[1] == ""
    assert lines[2].startswith("Fine-grained" if page == "README.md" else "This page ")


@pytest.mark.parametrize("page", [name for name in PAGES if name.startswith("docs/")])
def test_readme_links_every_page(page) -> None:
    assert f"]({page})" in README


def test_recipes_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert PAGES["docs/recipes.md"] == generate.page(), "run `python docs/generate.py`"


def test_design_page_names_every_key_of_the_formats() -> None:
    text = PAGES["docs/design.md"]
    for name in vars(events):
        model = getattr(events, name)
        if isinstance(model, type) and issubclass(model, events.Record):
            for key in model.model_fields:
                assert re.search(rf"`(?:\w+\.)?{key}`", text), f"{name}.{key}"
