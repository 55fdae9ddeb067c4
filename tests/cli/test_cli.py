"""The command line: fast help, two-line errors, nothing overwritten."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import tiny, write_blobs, write_recipe
from command import CommandResult
from PIL import Image

import racnn_cli
from racnn_cli import backbones
from racnn_cli import recipe as recipes
from racnn_cli.errors import BackboneError
from racnn_cli.run import Run
from racnn_cli.training import checkpoint
from racnn_cli.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "timm", "cv2", "albumentations", "onnx", "onnxruntime", "onnxscript")


def plain(text: str) -> str:
    """Strip colors and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def is_error(result: CommandResult, *parts: str, hint: str = "", code: int = 2) -> None:
    """Check for `error:` and `try:` with the expected parts, and no traceback."""
    err = plain(result.err)
    assert result.code == code, result
    assert "Traceback" not in result.err + result.out
    assert "error: " in err
    error, _, found_hint = err[err.index("error: ") :].partition(" try: ")
    assert found_hint, f"no hint: {err}"
    for part in parts:
        assert part in error, f"{part!r} is not in {error!r}"
    assert hint in found_hint, f"{hint!r} is not in {found_hint!r}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data")


@pytest.fixture
def fresh(here, data) -> Run:
    """A new run before its first stage."""
    return Trainer.start(tiny(data).as_used(), quiet=True).run


# ---- in a fresh process


def in_new_process(arguments: list[str], **environment: str) -> tuple[str, list[str], int]:
    """Run a command; returns its output, the heavy modules that it imported, and the exit code."""
    script = (
        "import sys\nfrom racnn_cli.cli import main\ncode = 0\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    code = exit.code or 0\n"
        f"print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])\nsys.exit(code)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['racnn'] + sys.argv[1:]\n" + script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )
    assert "LOADED" in process.stdout, process.stderr
    text, _, loaded = process.stdout.rpartition("LOADED")
    return text, loaded.split(), process.returncode


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--help"], "pretrain-apn"),
        (["train", "--help"], "--resume"),
        (["--version"], racnn_cli.__version__),
        (["recipes", "ls"], "demo"),
        (["recipes", "show", "tiny"], 'backbone = "test_resnet"'),
    ],
    ids=str,
)
def test_light_commands_do_not_import_torch(arguments, part) -> None:
    text, loaded, code = in_new_process(arguments)
    assert part in text
    assert loaded == []
    assert code == 0


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("racnn pretrain-", {"pretrain-cnn", "pretrain-apn"}),
        ("racnn train d", {name for name in recipes.names() if name.startswith("d")}),
        ("racnn train demo --set alternate.cnn_", {"alternate.cnn_epochs=", "alternate.cnn_lr="}),
        ("racnn train --pre", {"--pretrained"}),
    ],
)
def test_shell_completion_does_not_import_torch(typed, expected) -> None:
    text, loaded, code = in_new_process(
        [], _RACNN_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(typed.split()) - 1)
    )
    assert set(text.split()) == expected
    assert loaded == []
    assert code == 0


def test_python_m_is_the_same_command() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "racnn_cli", "train", "demmo"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    is_error(CommandResult(process.returncode, process.stdout, process.stderr), "did you mean demo")


def test_the_lazy_api_has_every_name() -> None:
    for name in racnn_cli.__all__:
        assert callable(getattr(racnn_cli, name))
        assert name in dir(racnn_cli)
    with pytest.raises(AttributeError, match="lode"):
        racnn_cli.lode  # noqa: B018


# ---- recipes


def test_recipes_ls_prints_the_purpose_of_each(racnn) -> None:
    result = racnn("recipes", "ls")
    for name in recipes.names():
        assert f"{recipes.load(name).about}\n" in result.out
        assert re.search(rf"^{name} ", result.out, re.M)


def test_recipes_show_prints_a_usable_recipe(racnn, here) -> None:
    result = racnn("recipes", "show", "tiny", "--set", "train.batch=5", "--quick")
    (here / "mine.toml").write_text(result.out)
    loaded = recipes.load("mine.toml")
    assert loaded.train.batch == 5
    assert loaded.data.images == 48
    assert loaded.name == "tiny"


# ---- wrong requests, refused before anything runs


@pytest.mark.parametrize(
    ("arguments", "parts", "hint"),
    [
        (["train", "demmo"], ["unknown recipe 'demmo'", "did you mean demo"], "tiny"),
        (["train", "none.toml"], ["none.toml"], "recipes ls"),
        (["train"], ["RECIPE or --data"], "--resume"),
        (["train", "tiny", "--set", "train.bach=3"], ["'train.bach'", "did you mean train.batch"], "recipes keys"),
        (["train", "tiny", "--set", "train.batch=-1", "--seed", "1"], ["train.batch", "-1"], "--set"),
        (["train", "tiny", "--set", "train.batch"], ["key=value"], "--set"),
        (["train", "tiny", "--weights", "none", "--pretrained"], ["--weights none", "--pretrained"], "one"),
        (["train", "tiny", "--run", "x"], ["--run"], "--resume"),
        (["train", "tiny", "--resume"], ["--resume"], "--run"),
        (["train", "--resume", "--out", "x"], ["--out"], "--run"),
        (["pretrain-cnn", "tiny", "--run", "x"], ["--run"], "--out"),
        (["pretrain-apn", "--out", "x"], ["--out"], "pretrain-cnn RECIPE --out DIR"),
        (["pretrain-apn", "tiny"], ["cannot start a run"], "`racnn pretrain-cnn` with that recipe"),
        (["alternate", "tiny", "--scales", "3"], ["cannot start a run"], "`racnn pretrain-cnn` with that recipe"),
        (["export"], ["needs a format"], "--onnx"),
        (["export", "--onnx", "--safetensors"], ["--onnx", "--safetensors", "contradict"], "one"),
        (["export", "--onnx", "--format", "torch"], ["--onnx", "--format torch", "contradict"], "one"),
        (["export", "--half", "--precision", "int8"], ["--half", "--precision int8", "contradict"], "one"),
        (["export", "--check", "x", "--half"], ["--check writes nothing"], "omit"),
        (["train", "--data", "x"], ["default recipe", "model.weights: missing"], "--pretrained"),
        (["pretrain-cnn", "--data", "x"], ["model.weights: missing"], "recipe `own`"),
        (["train", "--data", "x", "--weights", "none"], ["'x' does not exist"], "--data"),
        (["pretrain-cnn", "--weights", "none"], ["data.path is empty"], "--data"),
        (["train", "--out", "x"], ["RECIPE or --data"], "--resume"),
        (["pretrain-cnn", "--out", "x"], ["--out"], "pretrain-cnn RECIPE --out DIR"),
        (["recipes", "show", "tinny"], ["did you mean tiny"], "tiny"),
        (["train", "tiny", "--data", "no/such/place"], ["no/such/place"], "--data"),
        (["train", "tiny", "--set", "model.backbone=test_resnett"], ["test_resnett", "test_resnet"], "model"),
        (["train", "tiny", "--set", "train.device=cuda"], ["cuda", "cpu"], "auto"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request(racnn, here, arguments, parts, hint) -> None:
    if "train.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    is_error(racnn(*arguments), *parts, hint=hint)
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain-cnn"],
        ["pretrain-apn"],
        ["alternate"],
        ["eval"],
        ["export", "--onnx"],
        ["predict", "bird.jpg"],
        ["report"],
        ["train", "--resume"],
    ],
    ids=" ".join,
)
def test_no_run_yet_names_the_command_that_starts_one(racnn, here, arguments) -> None:
    is_error(racnn(*arguments), "no run yet", hint="racnn train demo")
    is_error(racnn(*arguments, "--run", "nowhere"), "nowhere", "recipe.toml", hint="racnn train")


def test_unknown_arguments_are_named(racnn, here) -> None:
    for arguments, part in (
        (["trian"], "trian"),
        (["train", "tiny", "--epochs", "3"], "--epochs"),
        (["train", "tiny", "--scales", "9"], "--scales"),
        (["samples", "fieldguide", "--out", "x", "--images", "3"], "--images"),
    ):
        result = racnn(*arguments)
        assert result.code == 2
        assert part in plain(result.err)
        assert result.err.startswith("Usage: racnn")
        assert "Traceback" not in result.err


def test_a_size_that_the_backbone_refuses(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data, model__backbone="test_vit", model__sizes=[64, 50])
    result = racnn("train", file)
    is_error(result, "50", hint="model.sizes")
    assert not (here / "runs").exists()


def test_all_unreadable_files_are_listed_at_once(racnn, here, data) -> None:
    mine = here / "mine"
    for name in ("wren", "robin"):
        (mine / name).mkdir(parents=True)
        for number in range(8):
            noise = np.random.default_rng((len(name), number)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(mine / name / f"{number}.png")
    (mine / "wren" / "bad.jpg").write_bytes(b"")
    (mine / "robin" / "worse.png").write_bytes(b"no image")
    file = write_recipe(here / "r.toml", mine)
    is_error(racnn("train", file), "bad.jpg", "worse.png", hint="--skip-bad")
    assert not (here / "runs").exists()
    result = racnn("pretrain-cnn", file, "--skip-bad", "--set", "pretrain_cnn.epochs=1")
    assert result.code == 0, result.err
    assert "bad.jpg" in result.err


# ---- runs


def test_out_in_use_is_refused(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data)
    (here / "used").mkdir()
    (here / "used" / "thesis.txt").write_text("precious")
    is_error(racnn("train", file, "--out", "used"), "used", "nothing was overwritten", hint="--out")
    assert os.listdir(here / "used") == ["thesis.txt"]
    assert not (here / "runs").exists()


def test_out_that_cannot_be_made_is_a_failure(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data)
    is_error(racnn("train", file, "--out", file / "sub"), "mine.toml", hint="another folder", code=1)


def test_scales_that_differ_from_the_run(racnn, fresh) -> None:
    for command in ("pretrain-cnn", "pretrain-apn", "alternate"):
        result = racnn(command, "--scales", 3)
        is_error(result, "2 scale(s)", "1 APN(s)", "--scales 3", hint="pretrain-cnn RECIPE --scales 3")
    is_error(racnn("train", "--resume", "--scales", 1), "--scales 1", hint="--scales")
    is_error(racnn("alternate", "--set", "model.scales=5"), "--scales 5", hint="omit")


def test_a_stage_without_its_predecessor_names_the_command(racnn, fresh) -> None:
    is_error(racnn("pretrain-apn"), "pretrain-apn needs pretrain-cnn", hint="racnn pretrain-cnn --run")
    is_error(racnn("alternate"), "alternate needs pretrain-cnn", hint="racnn pretrain-cnn --run")


def test_missing_weights(racnn, fresh, data) -> None:
    image = next(data.rglob("*.png"))
    for arguments in (["eval"], ["export", "--onnx"], ["export", "--safetensors"], ["predict", image]):
        is_error(racnn(*arguments), "weights.safetensors", hint="stage")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("model.backbone=vgg11", "model.backbone"),
        ("model.sizes=[64, 32]", "model.sizes"),
        ("data.source=128", "data.source"),
        ("seed=9", "seed"),
        ("data.augment.scale=0.9", "data.augment.scale"),
    ],
)
def test_network_and_data_of_a_run_cannot_change(racnn, fresh, change, key) -> None:
    before = fresh.recipe_file.read_text()
    is_error(racnn("pretrain-cnn", "--set", change), key, "cannot change", hint="--out")
    assert fresh.recipe_file.read_text() == before


def test_a_misspelt_key_for_a_run(racnn, fresh) -> None:
    is_error(racnn("pretrain-cnn", "--set", "train.bach=3"), "did you mean train.batch", hint="recipes keys")


def test_one_scale_has_no_apn(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data)
    assert racnn("pretrain-cnn", file, "--scales", 1, "--set", "pretrain_cnn.epochs=1").code == 0
    is_error(racnn("pretrain-apn"), "one scale", "pretrain-apn", hint="--scales 2")


def test_classes_that_differ_from_the_run(racnn, fresh, data, here) -> None:
    renamed = write_blobs(here / "renamed", {"train": 3, "val": 2, "test": 2})
    for split in ("train", "val", "test"):
        (renamed / split / "red").rename(renamed / split / "crimson")
    is_error(racnn("pretrain-cnn", "--run", "runs/latest", "--data", renamed), "crimson", "red")


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_corrupt_files_of_a_run_are_failures(racnn, here, data, damage) -> None:
    file = write_recipe(here / "mine.toml", data, pretrain_cnn__epochs=1)
    assert racnn("pretrain-cnn", file).code == 0
    run = Run.open(None)
    for broken in (run.weights, *checkpoint.list_checkpoints(run)):
        whole = broken.read_bytes()
        broken.write_bytes(whole[:1000] if damage == "cut" else b"\x00\x01" * 500)
    is_error(racnn("eval"), "weights.safetensors", "damaged", hint="backup", code=1)
    is_error(racnn("pretrain-apn"), "no checkpoint can be read", "damaged", hint="backup", code=1)
    run.classes_file.write_text("{")
    is_error(racnn("eval"), "classes.json", hint="backup", code=1)
    run.recipe_file.write_text("{")
    is_error(racnn("eval"), "recipe.toml", hint="line")


def test_missing_or_damaged_weight_files(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data)
    is_error(racnn("train", file, "--weights", "none.safetensors"), "none.safetensors")
    (here / "noise.safetensors").write_bytes(b"\x07" * 100)
    result = racnn("train", file, "--weights", "noise.safetensors")
    is_error(result, "noise.safetensors", code=result.code)
    assert result.code in (1, 2)
    assert not (here / "runs").exists()


def test_eval_of_an_unknown_split(racnn, fresh) -> None:
    assert racnn("eval", "--split", "holdout").code == 2


def test_markup_in_names_is_printed_verbatim(racnn, here) -> None:
    is_error(racnn("train", "tiny", "--data", "[red]birds[/]"), "[red]birds[/]")


def test_export_options_that_a_format_does_not_have(racnn, fresh) -> None:
    is_error(racnn("export", "--torch", "--int8"), "--int8", hint="--format onnx")
    is_error(racnn("export", "--safetensors", "--raw"), "--raw", hint="omit")
    is_error(racnn("export", "--onnx", "--opset", 19), "--opset 19", hint="18 or 20")


# ---- runs without a recipe


def test_data_alone_starts_a_run_named_after_them(racnn, here, data) -> None:
    small = ["--backbone", "test_resnet", "--weights", "none", "--scales", 2]
    small += ["--set", "pretrain_cnn.epochs=1", "--set", "train.device=cpu"]
    result = racnn("pretrain-cnn", "--data", data, *small)
    assert result.code == 0, result.err
    recipe = Run(here / "runs" / "data").recipe()
    assert (recipe.name, recipe.model.backbone, recipe.model.scales) == ("data", "test_resnet", 2)
    assert "next: racnn pretrain-apn" in result.out
    again = racnn("pretrain-cnn", "--data", data, *small)
    assert again.code == 0, again.err
    assert Run.open(None).folder.name == "data-2"
    # With --run, or without any of these options, a run continues.
    assert "finished in runs/data;" in racnn("pretrain-cnn", "--run", "runs/data", "--data", data).out
    assert "data-2; next" in racnn("pretrain-cnn").out
    assert sorted(os.listdir(here / "runs")) == ["data", "data-2", "latest"]


def test_run_and_another_backbone_contradict(racnn, fresh) -> None:
    result = racnn("pretrain-cnn", "--run", fresh.folder, "--backbone", "vgg11")
    is_error(result, "model.backbone", "cannot change", hint="--out")


# ---- lists


def test_recipes_keys_describes_every_key(racnn) -> None:
    lines = racnn("recipes", "keys").out.splitlines()
    keys = [line.partition(" = ")[0] for line in lines[::2]]
    assert keys == recipes.key_names()
    assert all(line.startswith("    ") and len(line) > 12 for line in lines[1::2])
    assert "model.floor = 0.333" in racnn("recipes", "keys", "model.f*").out


def test_backbones_lists_names_sizes_and_fixed_sizes(racnn) -> None:
    from racnn_cli import backbones

    if not hasattr(backbones, "list_models"):
        pytest.skip("the package has no list of models")
    result = racnn("backbones", "vgg")
    assert result.code == 0, result.err
    assert re.search(r"^vgg19 +\d+ px", result.out, re.M)


# ---- Ctrl-C


@pytest.mark.parametrize("module", ["typer", "rich", "pydantic", "torch"])
def test_ctrl_c_during_the_imports_is_one_line(module, here) -> None:
    """SIGINT at the moment when the process imports a module."""
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["racnn", "train", "tiny"]
from racnn_cli.__main__ import main
main()
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert process.returncode == 130
    assert process.stderr == "error: stopped by SIGINT\n"
    assert os.listdir(here) == []


def test_a_real_ctrl_c_in_the_first_moment(here) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "racnn_cli", "train", "tiny"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # importtime prints a line per module as soon as it is imported
            if line.endswith(" typing_extensions\n"):
                process.send_signal(signal.SIGINT)
                break
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 130
    assert rest == ["error: stopped by SIGINT\n"]


# ---- samples


def test_samples_writes_a_data_set_to_a_folder(racnn, here, monkeypatch) -> None:
    monkeypatch.setenv("RACNN_CACHE", str(here / "cache"))
    result = racnn("samples", "fieldguide", "--out", "birds", "--images", 24, "--size", 64)
    assert result.code == 0, result.err
    assert "birds" in result.out
    assert len(list((here / "birds").rglob("*.png")) + list((here / "birds").rglob("*.jpg"))) == 24
    is_error(racnn("samples", "fieldguide", "--out", "birds"), "birds")
    is_error(racnn("samples", "fieldguyde", "--out", "renamed"), "fieldguyde")


# ---- predict as JSON


def test_predict_prints_one_json_line_per_image(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data, pretrain_cnn__epochs=1)
    assert racnn("pretrain-cnn", file).code == 0
    result = racnn("predict", data / "test" / "red", "--format", "jsonl")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert len(lines) == 4
    again = racnn("predict", "runs/latest", data / "test" / "red", "--format", "jsonl")
    assert again.out == result.out
    is_error(racnn("predict", "runs/latest"), "no images were given")
    is_error(racnn("predict", "runs/latest", file, "--run", "runs/latest"), "both name a network")
    is_error(racnn("predict", "none.onnx", data), "none.onnx does not exist", hint="racnn export")
    is_error(racnn("predict", "https://example.org/a.jpg"), "URL")
    (here / "empty").mkdir()
    is_error(racnn("predict", "empty"), "empty")
    is_error(racnn("predict", "nothing.jpg"), "nothing.jpg")


def test_class_names_are_printed_as_they_are(here, racnn) -> None:
    """By default rich replaces :cat: by an emoji and takes [bold] for markup."""
    names = ("sea:cat:x", "land[bold]bee")
    for label, name in enumerate(names):
        (here / "p" / name).mkdir(parents=True)
        for number in range(8):
            noise = np.random.default_rng((label, number)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(here / "p" / name / f"{number}.png")
    result = racnn("pretrain-cnn", "tiny", "--data", "p", "--out", "r:cat:")
    assert result.code == 0, result.err
    assert "run folder r:cat:" in result.err
    result = racnn("train", "--resume", "--run", "r:cat:")
    assert result.code == 0, result.err
    assert "metrics r:cat:/eval.json" in result.out
    result = racnn("predict", *(f"p/{name}/0.png" for name in names), "--run", "r:cat:")
    assert "p/sea:cat:x/0.png" in result.out
    assert "p/land[bold]bee/0.png" in result.out
    assert any(f"  {name}" in result.out for name in names)
    result = racnn("eval", "--run", "r:cat:", "--data", "no:cat:where")
    assert "no:cat:where" in result.err


def test_a_run_that_may_only_be_read_is_measured(here, racnn, monkeypatch) -> None:
    images = here / "p"
    for label in ("a", "b"):
        (images / label).mkdir(parents=True)
        for number in range(8):
            noise = np.random.default_rng((ord(label), number)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(images / label / f"{number}.png")
    assert racnn("train", "tiny", "--data", "p", "--out", "r", "--quick").code == 0
    written = (here / "r" / "eval.json").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", fail)
    result = racnn("eval", "--run", "r")
    assert result.code == 0, result.err
    assert "fused" in result.out
    assert "the figures are not in eval.json" in result.out
    assert (here / "r" / "eval.json").read_bytes() == written
    # The weights of a run are recognized, also with other classes.
    monkeypatch.undo()
    monkeypatch.chdir(here)
    Path("p/a").rename("p/c")
    for weights in ("r", "r/weights.safetensors"):
        result = racnn("pretrain-cnn", "tiny", "--data", "p", "--weights", weights, "--set", "pretrain_cnn.epochs=1")
        assert result.code == 0, result.err
        assert "holds a trained racnn network: the backbone of its scale 1 is used" in result.err


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k", "hf_hub:timm/resnet18.a1_in1k"]
)
def test_a_name_of_the_hub_is_answered_with_the_one_to_type(name) -> None:
    with pytest.raises(BackboneError) as caught:
        backbones.build(name)
    assert caught.value.hint == "--backbone resnet18.a1_in1k --pretrained"


# ---- options without effect


def test_options_without_effect_are_errors_or_notes(racnn, here, data, fresh) -> None:
    is_error(racnn("export", "--onnx", "--max-drop", 1), "--max-drop needs --precision half or int8, or --early-exit")
    is_error(racnn("export", "--safetensors", "--top", 5), "--raw, --crops and --top need --format onnx or torch")
    for option in (["--top", 5], ["--max-drop", 1], ["--half"], ["--precision", "float32"]):
        is_error(racnn("export", "--check", data, *option), "--check writes nothing and takes only --run and --out")
    result = racnn("samples", "plankton", "--out", "plankton", "--images", 24, "--seed", 1)
    assert result.code == 0
    assert "note: --images, --seed: no effect, because the images of plankton are not drawn" in result.err
