"""The run folder: nothing half written, nothing overwritten, and clear words where it is damaged."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from racnn_cli import recipe as recipes
from racnn_cli.core.store import save_tensors
from racnn_cli.errors import RacnnError
from racnn_cli.run import Run, write_atomic, write_json, write_text

RECIPE = recipes.load("tiny")
CLASSES = ["<b>", "wren & co", "Zaunkönig"]


def error(call, *args: object, code: int = 2, **keys: object) -> RacnnError:
    with pytest.raises(RacnnError) as caught:
        call(*args, **keys)
    assert caught.value.exit_code == code
    assert caught.value.hint
    return caught.value


# ---- writes


def test_a_write_replaces_the_old_file_and_makes_its_folders(tmp_path) -> None:
    file = tmp_path / "a" / "b" / "x.json"
    write_json(file, {"one": 1})
    write_json(file, {"two": "ü"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"two": "ü"}
    assert os.listdir(file.parent) == ["x.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path, error) -> None:
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

    wrong = error(write_atomic, file, write, code=1)
    assert str(file) in wrong.message
    assert "No space left on device" in wrong.message
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_weights_that_do_not_fit_the_disk_are_a_failure_too(tmp_path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "w.safetensors"
    save_tensors(file, {"x": torch.ones(4)}, {})
    old = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        wrong = error(save_tensors, file, {"x": torch.ones(100_000)}, {}, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(file) in wrong.message
    assert file.read_bytes() == old
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    wrong = error(write_text, tmp_path / "file" / "sub" / "x.txt", "new", code=1)
    assert "x.txt could not be written" in wrong.message


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


def test_runs_are_numbered_and_latest_moves_on(here) -> None:
    folders = [Run.create(RECIPE, CLASSES, None).folder.name for _ in range(3)]
    assert folders == ["tiny", "tiny-2", "tiny-3"]
    assert Run.open(None).folder.name == "tiny-3"
    Run.create(RECIPE, CLASSES, None, latest=False)
    assert Run.open(None).folder.name == "tiny-3"
    Run.create(RECIPE, CLASSES, here / "elsewhere" / "mine")
    assert Run.open(None).folder == here / "elsewhere" / "mine"


def test_a_recipe_that_is_called_latest_does_not_take_the_link(here) -> None:
    run = Run.create(RECIPE.override({"name": "latest"}), CLASSES, None)
    assert run.folder == Path("runs/latest-2")
    assert Run.open(None).folder.name == "latest-2"


def test_out_in_use_is_refused_and_nothing_changes(here) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("precious")
    wrong = error(Run.create, RECIPE, CLASSES, here / "mine")
    assert "nothing was overwritten" in wrong.message
    assert "--resume" in wrong.hint
    assert "--out" in wrong.hint
    assert os.listdir(here / "mine") == ["thesis.txt"]
    assert not (here / "runs").exists()
    (here / "file").write_text("x")
    error(Run.create, RECIPE, CLASSES, here / "file")
    assert (here / "file").read_text() == "x"


def test_an_empty_out_folder_is_welcome(here) -> None:
    (here / "mine").mkdir()
    assert Run.create(RECIPE, CLASSES, here / "mine").classes() == CLASSES


def test_out_below_a_file_is_a_failure_and_not_a_traceback(here) -> None:
    (here / "file").write_text("x")
    wrong = error(Run.create, RECIPE, CLASSES, here / "file" / "run", code=1)
    assert "another folder" in wrong.hint


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
    wrong = error(Run.open, None)
    assert "no run yet" in wrong.message
    assert "racnn train demo" in wrong.hint
    assert "--run" in wrong.hint


def test_latest_that_points_nowhere_is_no_run(here) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    run.folder.rename(here / "away")
    wrong = error(Run.open, None)
    assert "points to tiny, which is not there any more" in wrong.message
    assert "runs/" not in wrong.hint
    (here / "away").rename(here / "runs" / "birds")
    assert "runs/birds" in error(Run.open, None).hint
    os.unlink("runs/latest")
    assert "no run yet" in error(Run.open, None).message


def test_latest_may_be_a_text_and_nothing_worse(here) -> None:
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


def test_a_run_in_the_folder_where_one_stands_is_refused_and_in_a_link_is_made_behind_it(here) -> None:
    assert "where you stand" in error(Run.create, RECIPE, CLASSES, Path()).message
    assert not list(here.iterdir())
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    Run.create(RECIPE, CLASSES, Path("link"))
    assert (here / "link").is_symlink()
    assert (here / "empty" / "recipe.toml").is_file()


def test_a_folder_that_is_no_run(here) -> None:
    wrong = error(Run.open, here)
    assert "recipe.toml" in wrong.message
    assert str(here) in wrong.message
    error(Run.open, here / "none")


@pytest.mark.parametrize("text", ["", "[1, 2", '{"a": 1}', "[1, 2]", '"wren"', "\udcff"])
def test_damaged_classes_are_a_failure_that_names_the_file(here, text) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    run.classes_file.write_bytes(text.encode("utf-8", "surrogateescape"))
    wrong = error(run.classes, code=1)
    assert "classes.json" in wrong.message
    run.classes_file.unlink()
    error(run.classes, code=1)


def test_a_damaged_recipe_names_the_file(here) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    run.recipe_file.write_text("name = ")
    assert "recipe.toml" in error(run.recipe).message


def test_the_log_is_appended_to_and_what_is_no_event_is_left_out(here) -> None:
    run = Run.create(RECIPE, CLASSES, None)
    assert run.read_log() == []
    events = [{"event": "stage", "stage": "pretrain-cnn"}, {"event": "test", "of": "a bench"}]
    for event in events:
        run.append_log(event)
    with run.log.open("a") as file:
        file.write('{"event": "round", "round": "one"}\n{"event": "epoch"}\n{"event": "stage", "stage": 7}\n')
        file.write('[{"event": "stage"}]\n' + "[" * 10_000 + '\n{"event": "epo')
    assert run.read_log() == events
