"""What a person sees while a network trains: plain lines without a terminal, and where a resumed run continues."""

from __future__ import annotations

from pathlib import Path

import pytest
from blobs import tiny, write_blobs

from racnn_cli.training import console, stages
from racnn_cli.training.checkpoint import Progress
from racnn_cli.training.console import Console, describe_position
from racnn_cli.training.trainer import Trainer


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds that the console reads; a test moves it."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_is_printed_every_30_seconds(clock, capfd) -> None:
    output = Console()
    output.begin("pretrain-cnn", epochs=2, steps=100, done=100)
    output.begin_epoch(1, 2)
    for _ in range(100):
        clock[0] += 2.5
        output.step({"classification 1": 0.5}, images=5)
    output.end()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 8  # 250 seconds
    assert lines[0] == "  pretrain-cnn: step 12 of 100, epoch 2/2  classification 1 0.500  2 img/s"
    assert "step 96 of 100" in lines[-1]


def test_validation_prints_lines_too_and_a_line_restarts_the_interval(clock, capfd) -> None:
    output = Console()
    output.begin("alternate: CNN phase", epochs=1, steps=1, done=0)
    for _ in range(5):
        clock[0] += 20
        output.still_busy("validation")
        if clock[0] == 60:
            output.say("something else")
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["  alternate: CNN phase: validation", "something else", "  alternate: CNN phase: validation"]


def test_a_quiet_console_prints_nothing(clock, capfd) -> None:
    output = Console(quiet=True)
    output.begin("pretrain-cnn", epochs=1, steps=1, done=0)
    output.begin_epoch(0, 1)
    clock[0] += 100
    output.step({}, images=1)
    output.say("nothing")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("progress", "position"),
    [
        (Progress(), "from the start"),
        (Progress(done=["pretrain-cnn"]), "after pretrain-cnn"),
        (Progress(stage="pretrain-cnn", epoch=3, step=7), "in pretrain-cnn, after epoch 3, step 7 of the next one"),
        (
            Progress(stage="alternate", round=1, phase="apn", step=2),
            "in alternate, round 2, APN phase, after epoch 0, step 2 of the next one",
        ),
        (
            Progress(stage="alternate", round=5, phase="fusion", epoch=1),
            "in alternate, round 5, fusion head, after epoch 1, step 0 of the next one",
        ),
    ],
)
def test_the_position_of_a_run_in_words(progress, position) -> None:
    assert describe_position(progress) == position


def test_a_resumed_run_says_where_it_continues(here, capfd) -> None:
    data = write_blobs(here / "data", {"train": 4, "val": 2, "test": 1})
    trainer = Trainer.start(tiny(data, pretrain_cnn__epochs=1), out=Path("mine"), quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    trainer.close()
    Trainer.resume(trainer.run).close()
    assert "resuming mine after pretrain-cnn" in capfd.readouterr().err


@pytest.mark.parametrize(("load", "warned"), [(0.0, False), (50.0, True)])
def test_a_run_warns_of_crowded_cores(here, monkeypatch, capfd, load, warned) -> None:
    data = write_blobs(here / "data", {"train": 4, "val": 2, "test": 1})
    monkeypatch.setattr("racnn_cli.training.trainer.os.cpu_count", lambda: 4)
    monkeypatch.setattr("racnn_cli.training.trainer.os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr("racnn_cli.training.trainer.torch.get_num_threads", lambda: 4)
    Trainer.start(tiny(data), out=here / "mine").close()
    assert ("set OMP_NUM_THREADS=" in capfd.readouterr().err) == warned


def test_a_baseline_does_not_count_its_own_process_as_load(here, monkeypatch, capfd) -> None:
    data = write_blobs(here / "data", {"train": 4, "val": 2, "test": 1})
    monkeypatch.setattr("racnn_cli.training.trainer.os.getloadavg", lambda: (50.0, 50.0, 50.0))
    monkeypatch.setattr("racnn_cli.training.trainer.torch.get_num_threads", lambda: 4)
    Trainer.start(tiny(data), out=here / "mine" / "baseline", parent_run=here / "mine").close()
    assert "OMP_NUM_THREADS" not in capfd.readouterr().err


def test_the_start_of_a_run_says_what_was_left_out_per_class(here, capfd) -> None:
    data = write_blobs(here / "data", {"train": 4, "val": 3, "test": 1})
    for file in ("train/blue/00", "train/blue/01", "train/red/00", "val/green/02"):
        (data / f"{file}.png").write_bytes(b"<html>")
    Trainer.start(tiny(data, data__skip_bad=True), out=here / "mine").close()
    lines = capfd.readouterr().err.splitlines()
    assert "  train: 3 of 12 images could not be read and were left out: blue 2, red 1" in lines
    assert "  val: 1 of 9 images could not be read and were left out: green 1" in lines
