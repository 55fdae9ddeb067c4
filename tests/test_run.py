"""Run folders: atomic writes, nothing overwritten, clear errors for damaged files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from racnn_cli import recipe as recipes
from racnn_cli.core.store import save_tensors
from racnn_cli.errors import RecipeError, RunError
from racnn_cli.events import StageEvent, TestEvent
from racnn_cli.run import Run, write_atomic, write_json, write_text

RECIPE = recipes.load("tiny")
CLASSES = ["<b>", "wren & co", "Zaunkönig"]


def error(call, *args: object, code: int = 2, **keys: object) -> RunError:
    with pytest.raises(RunError) as caught:
        call(*args, **keys)
    assert caught.value.exit_code == code
    assert caught.value.hint
    return caught.value


# ---- writes


def test_a_write_replaces_the_old_file_and_creates_its_folders(tmp_path) -> None:
    file = tmp_path / "a" / "b" / "x.json"
    write_json(file, {"one": 1})
    write_json(file, {"two": "ü"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"two": "ü"}
    assert os.listdir(file.parent) == ["x.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_write_keeps_the_old_file(tmp_path, error) -> None:
    file = tmp_path / "x.txt"
    write_text(file, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        assert file.read_text() == "old"
        raise error

    with pytest.raises(type(error)):
        write_atomic(file, write)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_full_disk_is_a_failure_in_two_lines(tmp_path) -> None:
    file = tmp_path / "x.txt"
    write_text(file, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    caught = error(write_atomic, file, write, code=1)
    assert str(file) in caught.message
    assert "No space left on device" in caught.message
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_weights_larger_than_the_disk_are_a_failure(tmp_path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "w.safetensors"
    save_tensors(file, {"x": torch.ones(4)}, {})
    old = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        caught = error(save_tensors, file, {"x": torch.ones(100_000)}, {}, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(file) in caught.message
    assert file.read_bytes() == old
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_folder_that_cannot_be_created_is_a_failure(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    caught = error(write_text, tmp_path / "file" / "sub" / "x.txt", "new", code=1)
    assert "x.txt could not be written" in caught.message


def test_a_written_file_has_the_permissions_of_any_other(tmp_path) -> None:
    write_text(tmp_path / "x", "1")
    (tmp_path / "y").write_text("1")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "y").stat().st_mode)


def test_json_is_never_nan(tmp_path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


# ---- a new run


def test_a_new_run_holds_its_recipe_and_classes_and_is_the_latest(here) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    assert run.folder == Path("runs/tiny")
    assert run.recipe() == RECIPE
    assert run.classes() == CLASSES
    assert Run.open(None).folder.resolve() == run.folder.resolve()
    assert os.readlink("runs/latest") == "tiny"


def test_runs_are_numbered_and_latest_is_the_newest(here) -> None:
    folders = [Run.create(RECIPE, CLASSES, None).folder.name for _ in range(3)]
    assert folders == ["tiny", "tiny-2", "tiny-3"]
    assert Run.open(None).folder.name == "tiny-3"
    Run.create(RECIPE, CLASSES, None, latest=False)
    assert Run.open(None).folder.name == "tiny-3"
    Run.create(RECIPE, CLASSES, here / "elsewhere" / "mine")
    assert Run.open(None).folder == here / "elsewhere" / "mine"


def test_a_recipe_named_latest_does_not_replace_the_link(here) -> None:
    run = Run.create(RECIPE.override({"name": "latest"}), CLASSES, None)
    assert run.folder == Path("runs/latest-2")
    assert Run.open(None).folder.name == "latest-2"


def test_out_in_use_is_refused_and_nothing_changes(here) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("precious")
    caught = error(Run.create, RECIPE, CLASSES, here / "mine")
    assert "nothing was overwritten" in caught.message
    assert "--resume" in caught.hint
    assert "--out" in caught.hint
    assert os.listdir(here / "mine") == ["thesis.txt"]
    assert not (here / "runs").exists()
    (here / "file").write_text("x")
    error(Run.create, RECIPE, CLASSES, here / "file")
    assert (here / "file").read_text() == "x"


def test_an_empty_out_folder_is_used(here) -> None:
    (here / "mine").mkdir()
    assert Run.create(RECIPE, CLASSES, here / "mine").classes() == CLASSES


def test_out_below_a_file_is_a_failure_and_not_a_traceback(here) -> None:
    (here / "file").write_text("x")
    caught = error(Run.create, RECIPE, CLASSES, here / "file" / "run", code=1)
    assert "another folder" in caught.hint


def test_latest_is_a_text_file_where_links_are_not_allowed(here, monkeypatch) -> None:
    def refuse(*args: object, **keys: object) -> None:
        raise OSError("links are not allowed")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    Run.create(RECIPE, CLASSES, None)
    Run.create(RECIPE, CLASSES, None)
    assert not (here / "runs" / "latest").is_symlink()
    assert Run.open(None).folder.resolve() == here / "runs" / "tiny-2"
    assert sorted(os.listdir("runs")) == ["latest", "tiny", "tiny-2"]


# ---- an old run


def test_no_run_yet_says_how_to_start_one(here) -> None:
    caught = error(Run.open, None)
    assert "no run yet" in caught.message
    assert "racnn train demo" in caught.hint
    assert "--run" in caught.hint


def test_latest_that_points_nowhere(here) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    run.folder.rename(here / "away")
    caught = error(Run.open, None)
    assert "points to tiny, which no longer exists" in caught.message
    assert "runs/" not in caught.hint
    (here / "away").rename(here / "runs" / "birds")
    assert "runs/birds" in error(Run.open, None).hint
    os.unlink("runs/latest")
    assert "no run yet" in error(Run.open, None).message


def test_latest_may_be_a_text_file_but_not_a_pipe(here) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    latest = here / "runs" / "latest"
    latest.unlink()
    latest.write_text("tiny\n")
    assert Run.open(None).folder == run.folder
    latest.write_bytes(b"\xff")
    assert "does not name a run" in error(Run.open, None).message
    latest.unlink()
    os.mkfifo(latest)
    assert "does not name a run" in error(Run.open, None).message


def test_out_may_be_a_link_but_not_the_current_folder(here) -> None:
    assert "current folder" in error(Run.create, RECIPE, CLASSES, Path()).message
    assert not list(here.iterdir())
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    Run.create(RECIPE, CLASSES, Path("link"))
    assert (here / "link").is_symlink()
    assert (here / "empty" / "recipe.toml").is_file()


def test_a_folder_that_is_not_a_run(here) -> None:
    caught = error(Run.open, here)
    assert "recipe.toml" in caught.message
    assert str(here) in caught.message
    error(Run.open, here / "none")


@pytest.mark.parametrize("text", ["", "[1, 2", '{"a": 1}', "[1, 2]", '"wren"', "\udcff"])
def test_damaged_classes_are_a_failure_that_names_the_file(here, text) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    run.classes_file.write_bytes(text.encode("utf-8", "surrogateescape"))
    caught = error(run.classes, code=1)
    assert "classes.json" in caught.message
    run.classes_file.unlink()
    error(run.classes, code=1)


def test_a_damaged_recipe_names_the_file(here) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    run.recipe_file.write_text("name = ")
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        run.recipe()


def test_the_log_skips_damaged_lines(here) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    assert run.read_log() == []
    events = [StageEvent(stage="pretrain-cnn"), TestEvent(moment="pretrain-cnn", test={"top1": 0.5})]
    for event in events:
        run.append_log(event)
    with run.log.open("a") as file:
        file.write('{"event": "round", "round": "one"}\n{"event": "epoch"}\n{"event": "stage", "stage": 7}\n')
        file.write('[{"event": "stage"}]\n' + "[" * 10_000 + '\n{"event": "epo')
    assert run.read_log() == events
