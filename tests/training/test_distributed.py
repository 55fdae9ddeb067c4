"""Training with several processes under torchrun gives the results of one process with the same total batch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import write_blobs, write_recipe
from command import CommandResult
from processes import call_racnn, launch
from safetensors.torch import load_file

from racnn_cli import api, recipe
from racnn_cli.core import distributed
from racnn_cli.data import checks, index
from racnn_cli.errors import DataError
from racnn_cli.run import Run
from racnn_cli.training import loop, stages

ROOT = Path(__file__).resolve().parents[2]

# No BatchNorm: unless it is synced, its statistics depend on the images of one process. Plain SGD: Adam divides by
# the gradient's size, so a rounding difference in a gradient near 0 becomes a full step.
KEYS: dict[str, Any] = {
    "model__backbone": "test_convnext",
    "model__apn_hidden": 8,
    "train__optimizer": "sgd",
    "pretrain_cnn__lr": 0.02,
    "pretrain_apn__lr": 0.02,
    "pretrain_cnn__patience": 5,
    "alternate__cnn_lr": 0.01,
    "alternate__apn_lr": 0.05,
    "alternate__rounds": 2,
    "fusion__lr": 0.05,
}

LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_jobs(processes: int, function: Callable[..., object], *arguments: Any, folder: Path) -> CommandResult:
    """A function in each of several processes that torchrun's engine starts."""
    return launch(processes, function, *arguments, folder=folder).wait()


def package_frames(stderr: str) -> list[str]:
    """Traceback lines in the package's code; torchrun prints a traceback of its own when a process fails."""
    return [line for line in stderr.splitlines() if re.search(r'File ".*racnn_cli[/\\]', line)]


def validation_figures(run: Run) -> list[dict[str, Any]]:
    return [event.val.to_json() for event in run.read_log() if event.event in ("epoch", "round")]


def numbers(value: Any) -> list[float]:
    """All numbers in nested dictionaries and lists, in a fixed order."""
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [float(value)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with data and recipes `N.toml` for N processes with a total batch of 12."""
    folder = tmp_path_factory.mktemp("processes")
    # 15 validation images in total batches of 12: the last batch has 3, which two processes cannot share evenly.
    data = write_blobs(folder / "data", {"train": 8, "val": 5, "test": 3})
    for processes in (1, 2, 3):
        write_recipe(folder / f"{processes}.toml", data, train__batch=12 // processes, name="blobs", **KEYS)
    return folder


@pytest.fixture(scope="module")
def single(workspace: Path) -> Run:
    """Every stage trained by one process."""
    with contextlib.chdir(workspace):
        api.train("1.toml", out="one", quiet=True)
    return Run(workspace / "one")


@pytest.fixture(scope="module")
def train_with(workspace: Path) -> Callable[[int], tuple[Run, str]]:
    """A function that trains every stage with n processes; it returns the run and the output."""

    @cache
    def train(processes: int) -> tuple[Run, str]:
        name = f"processes-{processes}"
        done = run_jobs(processes, call_racnn, "train", f"{processes}.toml", "--out", name, folder=workspace)
        assert done.code == 0, done.err
        return Run(workspace / name), done.out + done.err

    return train


@pytest.fixture(params=[2, 3])
def runs(single: Run, train_with, request) -> tuple[Run, Run, str]:
    """The run of one process, that of several, and the output of the latter."""
    return (single, *train_with(request.param))


def test_weights_match_those_of_one_process_with_the_same_total_batch(runs) -> None:
    single, several, _ = runs
    expected, weights = load_file(single.weights), load_file(several.weights)
    assert expected.keys() == weights.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_synced_batchnorm_is_refused_on_a_cpu(workspace: Path) -> None:
    """torch.nn.SyncBatchNorm computes on CUDA devices only."""
    file = workspace / "synced.toml"
    changes = KEYS | {"model__backbone": "test_resnet"}
    write_recipe(file, workspace / "data", train__batchnorm="synced", name="synced", **changes)
    done = run_jobs(2, call_racnn, "train", "synced.toml", "--out", "synced", folder=workspace)
    assert done.code != 0
    assert "train.batchnorm = synced needs CUDA devices, not cpu" in done.err
    assert "--set train.batchnorm=train" in done.err
    assert package_frames(done.err) == []
    assert not (workspace / "synced").exists()


def test_every_stage_has_the_same_training_losses(runs) -> None:
    single, several, _ = runs
    losses = [[e.train_loss for e in run.read_log() if e.event == "epoch"] for run in (single, several)]
    assert numbers(losses[0]) == pytest.approx(numbers(losses[1]), rel=1e-3, abs=1e-5)
    names = {name for event in losses[0] for name in event}
    assert names == {"classification 1", "classification 2", "box 2", "rank 1-2", "classification fused"}
    assert [e.stage for e in several.read_log() if e.event == "stage"] == list(stages.NAMES)


def test_validation_counts_every_image_once(runs) -> None:
    single, several, _ = runs
    expected, measured = validation_figures(single), validation_figures(several)
    assert len(expected) == len(measured) > 8
    for number, (a, b) in enumerate(zip(expected, measured, strict=True)):
        assert numbers(b) == pytest.approx(numbers(a), rel=2e-3, abs=5e-4), number
        assert all(scale["top1"] * 15 == pytest.approx(round(scale["top1"] * 15)) for scale in b["scales"])


def test_only_one_process_writes_and_prints(runs) -> None:
    single, several, output = runs

    def events(run: Run) -> list[tuple[str, str, int]]:
        return [(e.event, e.stage, getattr(e, "epoch", 0)) for e in run.read_log()]

    assert events(several) == events(single)
    assert output.count(f"run folder {several.folder.name}") == 1
    assert output.count("next: racnn predict") == 1
    assert sorted(p.name for p in several.folder.iterdir()) == sorted(p.name for p in single.folder.iterdir())
    assert json.loads(several.eval.read_text())["images"] == 9


def test_an_error_ends_all_processes_and_is_printed_once(tmp_path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    data = write_blobs(tmp_path / "data", {"train": 2, "val": 1, "test": 1})
    write_recipe(tmp_path / "mine.toml", data)
    done = run_jobs(2, call_racnn, "train", "mine.toml", "--out", "used", folder=tmp_path)
    assert done.code != 0
    assert done.err.count("nothing was overwritten") == 1
    assert os.listdir(tmp_path / "used") == ["x"]


def share_checking() -> None:
    """Write the number of files that this process checks, and the errors of all."""
    distributed.start(torch.device("cpu"))
    checked, check = list[Path](), checks.check
    checks.check = lambda path: (checked.append(path), check(path))[1]
    try:
        index.build_index(recipe.Data(path="data"), seed=0, share=distributed.split_work)
    except DataError as error:
        Path(f"{distributed.rank()}.txt").write_text(f"{len(checked)}\n{error.message}")


def test_processes_share_the_checking_of_files(tmp_path) -> None:
    data = write_blobs(tmp_path / "data", {"train": 5, "val": 2, "test": 2})
    broken = [data / "train" / "red" / "01.png", data / "train" / "blue" / "02.png", data / "test" / "red" / "00.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    done = run_jobs(2, share_checking, folder=tmp_path)
    assert done.code == 0, done.err
    reports = [(tmp_path / f"{rank}.txt").read_text().split("\n", 1) for rank in range(2)]
    assert [int(count) for count, _ in reports] == [14, 13]  # of 27
    messages = [message for _, message in reports]
    assert messages[0] == messages[1]
    assert "3 error(s)" in messages[0]
    assert all(str(path.relative_to(tmp_path)) in messages[0] for path in broken)


def average_statistics() -> None:
    distributed.start(torch.device("cpu"))
    norm = torch.nn.BatchNorm2d(1)
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    norm.running_mean.fill_(distributed.rank() + 1.0)
    distributed.average_buffers(norm.buffers())
    text = f"{norm.running_mean.item()} {int(norm.num_batches_tracked)}"
    Path(f"{distributed.rank()}.txt").write_text(text)


def test_batchnorm_statistics_are_averaged(tmp_path) -> None:
    """Each process sees different images, but all must validate and save the same network."""
    done = run_jobs(2, average_statistics, folder=tmp_path)
    assert done.code == 0, done.err
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["1.5 0", "1.5 0"]


def train_until_killed(out: str, last: int) -> None:
    """Train, but kill the second process at an update, unless it was restarted."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        update, calls = loop._Fit._update, list[int]()

        def kill_or_update(*arguments: Any) -> None:
            calls.append(0)
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            update(*arguments)

        loop._Fit._update = kill_or_update  # type: ignore[method-assign]
    call_racnn("train", "2.toml", "--out", out)


def assert_identical(first: Run, second: Run) -> None:
    assert validation_figures(second) == validation_figures(first)
    expected, weights = load_file(first.weights), load_file(second.weights)
    assert [name for name in expected if not torch.equal(expected[name], weights[name])] == []


def test_torchrun_restarts_a_killed_process_from_the_last_checkpoint(workspace: Path, train_with) -> None:
    done = launch(2, train_until_killed, "killed", 8, folder=workspace, restarts=1).wait()
    assert done.code == 0, done.err
    assert_identical(train_with(2)[0], Run(workspace / "killed"))
    failed = run_jobs(2, train_until_killed, "not-restarted", 8, folder=workspace)
    assert failed.code != 0
    # The surviving process finds the connection closed, unless torchrun's SIGTERM arrives first.
    messages = ("another process of this training is gone", "closing signal SIGTERM")
    assert any(message in failed.err for message in messages)
    assert package_frames(failed.err) == []


def test_sigterm_to_torchrun_loses_nothing(workspace: Path, train_with) -> None:
    """As SLURM sends it to the launcher shortly before the job's time limit; here with the program as users run it."""
    train = ["train", "2.toml", "--out", "stopped", "--resume", "--set", "data.workers=1"]
    program = ["--standalone", "--nproc-per-node", "2", "-m", "racnn_cli", *train]
    with (workspace / "stopped.txt").open("w") as output:
        launcher = subprocess.Popen(
            [*LAUNCHER, *program], cwd=workspace, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        )
        log = workspace / "stopped" / "log.jsonl"
        while launcher.poll() is None and not (log.is_file() and log.read_text().count("pretrain-apn")):
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) != 0
    assert "stopped by SIGTERM; everything up to this step is saved" in (workspace / "stopped.txt").read_text()
    assert not (workspace / "stopped" / "eval.json").exists()
    done = run_jobs(2, call_racnn, *train, folder=workspace)
    assert done.code == 0, done.err
    assert_identical(train_with(2)[0], Run(workspace / "stopped"))


def test_two_nodes_train_together(workspace: Path) -> None:
    """Two launchers, as on two machines, that rendezvous at an address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    train = ("train", "2.toml", "--out", "nodes")
    nodes = [launch(1, call_racnn, *train, folder=workspace, nodes=2, endpoint=f"127.0.0.1:{port}") for _ in range(2)]
    done = [node.wait() for node in nodes]
    assert [node.code for node in done] == [0, 0], done
    assert sum((node.out + node.err).count("run folder nodes") for node in done) == 1
    assert (workspace / "nodes" / "eval.json").is_file()
