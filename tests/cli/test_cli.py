"""The command line: answers at once, every error in two lines, nothing overwritten."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blobs import tiny, write_blobs, write_recipe
from command import Said

import racnn_cli
from racnn_cli import recipe as recipes
from racnn_cli.run import Run
from racnn_cli.training import checkpoint
from racnn_cli.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchvision", "timm", "cv2", "albumentations", "onnx", "onnxruntime", "onnxscript")


def plain(text: str) -> str:
    """Without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def is_error(said: Said, *parts: str, hint: str = "", code: int = 2) -> None:
    """Two parts, `error:` and `try:`, with everything in them that is asked for, and no traceback."""
    err = plain(said.err)
    assert said.code == code, said
    assert "Traceback" not in said.err + said.out
    assert "error: " in err
    error, _, hint_said = err[err.index("error: ") :].partition(" try: ")
    assert hint_said, f"no hint: {err}"
    for part in parts:
        assert part in error, f"{part!r} is not in {error!r}"
    assert hint in hint_said, f"{hint!r} is not in {hint_said!r}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data")


@pytest.fixture
def fresh(here, data) -> Run:
    """A run that has begun and trained nothing."""
    return Trainer.start(tiny(data).as_used(), None, quiet=True).context.run


# ---- in a fresh process


def in_new_process(words: list[str], **environment: str) -> tuple[str, list[str], int]:
    """What is printed, which heavy modules it took, and the exit code."""
    script = (
        "import sys\nfrom racnn_cli.cli import main\ncode = 0\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code or 0\n"
        f"print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])\nsys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['racnn'] + sys.argv[1:]\n" + script, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )
    assert "LOADED" in done.stdout, done.stderr
    text, _, loaded = done.stdout.rpartition("LOADED")
    return text, loaded.split(), done.returncode


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--help"], "pretrain-apn"),
        (["train", "--help"], "--resume"),
        (["--version"], racnn_cli.__version__),
        (["recipes", "ls"], "demo"),
        (["recipes", "show", "tiny"], 'backbone = "test_resnet"'),
    ],
    ids=str,
)
def test_what_only_reads_answers_without_torch(words, part) -> None:
    text, loaded, code = in_new_process(words)
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
def test_shell_completion_answers_without_torch(typed, expected) -> None:
    text, loaded, code = in_new_process(
        [], _RACNN_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(typed.split()) - 1)
    )
    assert set(text.split()) == expected
    assert loaded == []
    assert code == 0


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "racnn_cli", "train", "demmo"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    is_error(Said(done.returncode, done.stdout, done.stderr), "did you mean demo")


def test_the_lazy_api_names_what_it_has() -> None:
    for name in racnn_cli.__all__:
        assert callable(getattr(racnn_cli, name))
        assert name in dir(racnn_cli)
    with pytest.raises(AttributeError, match="lode"):
        racnn_cli.lode  # noqa: B018


# ---- recipes


def test_recipes_ls_tells_what_each_is_for(racnn) -> None:
    said = racnn("recipes", "ls")
    for name in recipes.names():
        assert f"{recipes.load(name).about}\n" in said.out
        assert re.search(rf"^{name} ", said.out, re.M)


def test_recipes_show_prints_a_recipe_that_can_be_used(racnn, here) -> None:
    said = racnn("recipes", "show", "tiny", "--set", "train.batch=5", "--quick")
    (here / "mine.toml").write_text(said.out)
    loaded = recipes.load("mine.toml")
    assert loaded.train.batch == 5
    assert loaded.data.limit == 12
    assert loaded.name == "tiny"


# ---- requests that are wrong before anything runs


@pytest.mark.parametrize(
    ("words", "parts", "hint"),
    [
        (["train", "demmo"], ["no recipe 'demmo'", "did you mean demo"], "tiny"),
        (["train", "none.toml"], ["none.toml"], "recipes ls"),
        (["train"], ["which recipe?"], "--resume"),
        (["train", "tiny", "--set", "train.bach=3"], ["'train.bach'", "did you mean train.batch"], "show"),
        (["train", "tiny", "--set", "train.batch=-1", "--seed", "1"], ["train.batch", "-1"], "--set"),
        (["train", "tiny", "--set", "train.batch"], ["key=value"], "--set"),
        (["train", "tiny", "--weights", "none", "--pretrained"], ["--weights", "--pretrained"], "one"),
        (["train", "tiny", "--run", "x"], ["--run"], "--resume"),
        (["train", "tiny", "--resume"], ["--resume"], "--run"),
        (["train", "--resume", "--out", "x"], ["--out"], "--run"),
        (["pretrain-cnn", "tiny", "--run", "x"], ["--run"], "--out"),
        (["pretrain-apn", "--out", "x"], ["--out"], "pretrain-apn RECIPE"),
        (["pretrain-apn", "tiny"], ["cannot start a run"], "`racnn pretrain-cnn` with that recipe"),
        (
            ["alternate", "tiny", "--scales", "3"],
            ["cannot start a run"],
            "`racnn pretrain-cnn` with that recipe",
        ),
        (["export"], ["name one format"], "--onnx"),
        (["export", "--onnx", "--safetensors"], ["name one format"], "--onnx"),
        (["recipes", "show", "tinny"], ["did you mean tiny"], "tiny"),
        (["train", "tiny", "--data", "no/such/place"], ["no/such/place"], "--data"),
        (["train", "tiny", "--set", "model.backbone=test_resnett"], ["test_resnett", "test_resnet"], "model"),
        (["train", "tiny", "--set", "train.device=cuda"], ["cuda", "cpu"], "auto"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request(racnn, here, words, parts, hint) -> None:
    if "train.device=cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    is_error(racnn(*words), *parts, hint=hint)
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    "words",
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
def test_no_run_yet_names_the_command_that_starts_one(racnn, here, words) -> None:
    is_error(racnn(*words), "no run yet", hint="racnn train demo")
    is_error(racnn(*words, "--run", "nowhere"), "nowhere", "recipe.toml", hint="racnn train")


def test_unknown_words_are_refused_by_their_name(racnn, here) -> None:
    for words, part in (
        (["trian"], "trian"),
        (["train", "tiny", "--epochs", "3"], "--epochs"),
        (["train", "tiny", "--scales", "9"], "--scales"),
        (["samples", "fieldguide", "--out", "x", "--images", "3"], "--images"),
    ):
        said = racnn(*words)
        assert said.code == 2
        assert part in plain(said.err)
        assert said.err.startswith("Usage: racnn")
        assert "Traceback" not in said.err


def test_a_size_that_the_backbone_refuses(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data, model__backbone="test_vit", model__sizes=[64, 50])
    said = racnn("train", file)
    is_error(said, "50", hint="model.sizes")
    assert not (here / "runs").exists()


def test_data_without_a_split_of_their_own_and_all_errors_at_once(racnn, here, data) -> None:
    mine = here / "mine"
    for name in ("wren", "robin"):
        (mine / name).mkdir(parents=True)
        for number in range(8):
            (mine / name / f"{number}.png").write_bytes(next(data.rglob("*.png")).read_bytes())
    (mine / "wren" / "bad.jpg").write_bytes(b"")
    (mine / "robin" / "worse.png").write_bytes(b"no image")
    file = write_recipe(here / "r.toml", mine)
    is_error(racnn("train", file), "bad.jpg", "worse.png", hint="--skip-bad")
    assert not (here / "runs").exists()
    said = racnn("pretrain-cnn", file, "--skip-bad", "--set", "pretrain_cnn.epochs=1")
    assert said.code == 0, said.err
    assert "bad.jpg" in said.err


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


def test_scales_that_disagree_with_the_run(racnn, fresh) -> None:
    for command in ("pretrain-cnn", "pretrain-apn", "alternate"):
        said = racnn(command, "--scales", 3)
        is_error(said, "2 scale(s)", "1 APN(s)", "--scales 3", hint="pretrain-cnn RECIPE --scales 3")
    is_error(racnn("train", "--resume", "--scales", 1), "--scales 1", hint="--scales")
    is_error(racnn("alternate", "--set", "model.scales=5"), "--scales 5", hint="leave")


def test_a_stage_without_its_predecessor_names_the_command(racnn, fresh) -> None:
    is_error(racnn("pretrain-apn"), "pretrain-apn needs pretrain-cnn", hint="racnn pretrain-cnn --run")
    is_error(racnn("alternate"), "alternate needs pretrain-cnn", hint="racnn pretrain-cnn --run")


def test_what_needs_weights_says_that_there_are_none(racnn, fresh, data) -> None:
    image = next(data.rglob("*.png"))
    for words in (["eval"], ["export", "--onnx"], ["export", "--safetensors"], ["predict", image]):
        is_error(racnn(*words), "weights.safetensors", hint="stage")


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
def test_a_runs_network_and_data_cannot_change(racnn, fresh, change, key) -> None:
    before = fresh.recipe_file.read_text()
    is_error(racnn("pretrain-cnn", "--set", change), key, "cannot change", hint="--out")
    assert fresh.recipe_file.read_text() == before


def test_a_misspelt_key_for_a_run(racnn, fresh) -> None:
    is_error(racnn("pretrain-cnn", "--set", "train.bach=3"), "did you mean train.batch", hint="show")


def test_one_scale_has_nothing_to_zoom_into(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data)
    assert racnn("pretrain-cnn", file, "--scales", 1, "--set", "pretrain_cnn.epochs=1").code == 0
    is_error(racnn("pretrain-apn"), "one scale", "pretrain-apn", hint="--scales 2")


def test_classes_that_are_not_the_runs(racnn, fresh, data, here) -> None:
    other = write_blobs(here / "other", {"train": 3, "val": 2, "test": 2})
    for split in ("train", "val", "test"):
        (other / split / "red").rename(other / split / "crimson")
    is_error(racnn("pretrain-cnn", "--data", other), "crimson", "red")


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_corrupt_files_of_a_run_are_failures(racnn, here, data, damage) -> None:
    file = write_recipe(here / "mine.toml", data, pretrain_cnn__epochs=1)
    assert racnn("pretrain-cnn", file).code == 0
    run = Run.open(None)
    for broken in (run.weights, *checkpoint.saved(run)):
        whole = broken.read_bytes()
        broken.write_bytes(whole[:1000] if damage == "cut" else b"\x00\x01" * 500)
    is_error(racnn("eval"), "weights.safetensors", "damaged", hint="backup", code=1)
    is_error(racnn("pretrain-apn"), "no checkpoint can be read", "damaged", hint="backup", code=1)
    run.classes_file.write_text("{")
    is_error(racnn("eval"), "classes.json", hint="backup", code=1)
    run.recipe_file.write_text("{")
    is_error(racnn("eval"), "recipe.toml", hint="line")


def test_weights_of_a_file_that_is_not_there_or_no_weights(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data)
    is_error(racnn("train", file, "--weights", "none.safetensors"), "none.safetensors")
    (here / "noise.safetensors").write_bytes(b"\x07" * 100)
    said = racnn("train", file, "--weights", "noise.safetensors")
    is_error(said, "noise.safetensors", code=said.code)
    assert said.code in (1, 2)
    assert not (here / "runs").exists()


def test_eval_of_a_split_that_is_not_there(racnn, fresh) -> None:
    assert racnn("eval", "--split", "holdout").code == 2


def test_markup_in_names_is_printed_as_it_is(racnn, here) -> None:
    is_error(racnn("train", "tiny", "--data", "[red]birds[/]"), "[red]birds[/]")


# ---- samples


def test_samples_writes_a_data_set_to_a_folder(racnn, here, monkeypatch) -> None:
    monkeypatch.setenv("RACNN_CACHE", str(here / "cache"))
    said = racnn("samples", "fieldguide", "--out", "birds", "--images", 24, "--size", 64)
    assert said.code == 0, said.err
    assert "birds" in said.out
    assert len(list((here / "birds").rglob("*.png")) + list((here / "birds").rglob("*.jpg"))) == 24
    is_error(racnn("samples", "fieldguide", "--out", "birds"), "birds")
    is_error(racnn("samples", "fieldguyde", "--out", "other"), "fieldguyde")


# ---- predict as JSON


def test_predict_prints_one_json_line_an_image(racnn, here, data) -> None:
    file = write_recipe(here / "mine.toml", data, pretrain_cnn__epochs=1)
    assert racnn("pretrain-cnn", file).code == 0
    said = racnn("predict", data / "test" / "red", "--format", "jsonl")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert len(lines) == 4
    again = racnn("predict", "runs/latest", data / "test" / "red", "--format", "jsonl")
    assert again.out == said.out
    is_error(racnn("predict", "runs/latest"), "for which images")
    is_error(racnn("predict", "runs/latest", file, "--run", "runs/latest"), "two networks")
    is_error(racnn("predict", "none.onnx", data), "none.onnx does not exist", hint="racnn export")
    is_error(racnn("predict", "https://example.org/a.jpg"), "address")
    (here / "empty").mkdir()
    is_error(racnn("predict", "empty"), "empty")
    is_error(racnn("predict", "nothing.jpg"), "nothing.jpg")
