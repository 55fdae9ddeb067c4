"""Several processes under torchrun are one process with their batches together."""

from __future__ import annotations

import contextlib
import json
import os
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
from safetensors.torch import load_file

from racnn_cli import api
from racnn_cli.run import Run
from racnn_cli.training import stages

ROOT = Path(__file__).resolve().parents[2]

# No BatchNorm: its statistics are those of the images that a process sees itself, unless they are synced. Plain
# gradient descent: Adam divides by the gradient's size, which turns the last bit of a gradient near 0 into a step.
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


def torchrun(folder: Path, processes: int, *program: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    options = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    return subprocess.run(
        [*LAUNCHER, *options, *program], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def figures(run: Run) -> list[dict[str, Any]]:
    return [event.val.to_json() for event in run.read_log() if event.event in ("epoch", "round")]


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [float(value)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data, and a recipe for each number of processes that share a batch of 12."""
    folder = tmp_path_factory.mktemp("several")
    # 15 validation images over two processes with batches of 6: 12 and 3, so the shares are uneven.
    data = write_blobs(folder / "data", {"train": 8, "val": 5, "test": 3})
    for number in (1, 2, 3):
        write_recipe(folder / f"{number}.toml", data, train__batch=12 // number, name="blobs", **KEYS)
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> Run:
    """The whole way by one process."""
    with contextlib.chdir(place):
        api.train("1.toml", out="one", quiet=True)
    return Run(place / "one")


@pytest.fixture(scope="module")
def by(place: Path) -> Callable[[int], tuple[Run, str]]:
    """The whole way by so many processes, and what they said."""

    @cache
    def run(number: int) -> tuple[Run, str]:
        done = torchrun(place, number, "-m", "racnn_cli", "train", f"{number}.toml", "--out", f"by-{number}")
        assert done.returncode == 0, done.stderr
        return Run(place / f"by-{number}"), done.stdout + done.stderr

    return run


@pytest.fixture(params=[2, 3])
def runs(alone: Run, by, request) -> tuple[Run, Run, str]:
    """The whole way by one process, by several, and what these said."""
    return (alone, *by(request.param))


def test_the_weights_are_those_of_one_process_with_the_doubled_batch(runs) -> None:
    one, two, _ = runs
    first, second = load_file(one.weights), load_file(two.weights)
    assert first.keys() == second.keys()
    for name, expected in first.items():
        torch.testing.assert_close(second[name], expected, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_synced_batchnorm_is_refused_on_a_cpu(place: Path) -> None:
    """torch.nn.SyncBatchNorm computes on CUDA devices only."""
    file = place / "synced.toml"
    changes = KEYS | {"model__backbone": "test_resnet"}
    write_recipe(file, place / "data", train__batchnorm="synced", name="synced", **changes)
    done = torchrun(place, 2, "-m", "racnn_cli", "train", "synced.toml", "--out", "synced")
    assert done.returncode != 0
    assert "train.batchnorm = synced needs CUDA devices, not cpu" in done.stderr
    assert "--set train.batchnorm=train" in done.stderr
    assert "Traceback" not in done.stderr.replace("torch/distributed", "")
    assert not (place / "synced").exists()


def test_every_stage_was_trained_by_both_alike(runs) -> None:
    one, two, _ = runs
    losses = [[e.train_loss for e in r.read_log() if e.event == "epoch"] for r in (one, two)]
    assert numbers(losses[0]) == pytest.approx(numbers(losses[1]), rel=1e-3, abs=1e-5)
    names = {name for event in losses[0] for name in event}
    assert names == {"classification 1", "classification 2", "box 2", "rank 1-2", "classification fused"}
    assert [e.stage for e in two.read_log() if e.event == "stage"] == list(stages.NAMES)


def test_validation_counts_every_images_once(runs) -> None:
    one, two, _ = runs
    expected, found = figures(one), figures(two)
    assert len(expected) == len(found) > 8
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert numbers(b) == pytest.approx(numbers(a), rel=2e-3, abs=5e-4), number
        assert all(scale["top1"] * 15 == pytest.approx(round(scale["top1"] * 15)) for scale in b["scales"])


def test_only_one_process_writes_and_speaks(runs) -> None:
    one, two, said = runs

    def events(run: Run) -> list[tuple[str, str, int]]:
        return [(e.event, e.stage, getattr(e, "epoch", 0)) for e in run.read_log()]

    assert events(two) == events(one)
    assert said.count(f"run folder {two.folder.name}") == 1
    assert said.count("next: racnn predict") == 1
    assert sorted(p.name for p in two.folder.iterdir()) == sorted(p.name for p in one.folder.iterdir())
    assert json.loads(two.eval.read_text())["images"] == 9


def test_a_errors_ends_all_processes_with_its_message(tmp_path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    data = write_blobs(tmp_path / "data", {"train": 2, "val": 1, "test": 1})
    write_recipe(tmp_path / "mine.toml", data)
    done = torchrun(tmp_path, 2, "-m", "racnn_cli", "train", "mine.toml", "--out", "used")
    assert done.returncode != 0
    assert done.stderr.count("nothing was overwritten") == 1
    assert os.listdir(tmp_path / "used") == ["x"]


def test_processes_share_the_first_look_at_the_files(tmp_path) -> None:
    data = write_blobs(tmp_path / "data", {"train": 5, "val": 2, "test": 2})
    broken = [data / "train" / "red" / "01.png", data / "train" / "blue" / "02.png", data / "test" / "red" / "00.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "job.py").write_text(
        "import os, torch\n"
        "from pathlib import Path\n"
        "from racnn_cli import recipe\n"
        "from racnn_cli.data import checks, index\n"
        "from racnn_cli.errors import RacnnError\n"
        "from racnn_cli.core import distributed\n"
        "distributed.start(torch.device('cpu'))\n"
        "looked, honest = [], checks.check\n"
        "checks.check = lambda path: looked.append(path) or honest(path)\n"
        "try:\n"
        "    index.build_index(recipe.Data(path='data'), seed=0, share=distributed.split_work)\n"
        "except RacnnError as error:\n"
        "    Path(f'{distributed.rank()}.txt').write_text(f'{len(looked)}\\n{error.message}')\n"
    )
    done = torchrun(tmp_path, 2, "job.py")
    assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"{rank}.txt").read_text().split("\n", 1) for rank in range(2)]
    assert [int(count) for count, _ in told] == [14, 13]  # of 27
    assert told[0][1] == told[1][1]
    assert "3 error(s)" in told[0][1]
    assert all(str(path.relative_to(tmp_path)) in told[0][1] for path in broken)


def test_batchnorm_statistics_are_shared(tmp_path) -> None:
    """Each process saw other images; what is validated and saved is the same network on all of them."""
    (tmp_path / "job.py").write_text(
        "import torch\n"
        "from racnn_cli.core import distributed\n"
        "distributed.start(torch.device('cpu'))\n"
        "norm = torch.nn.BatchNorm2d(1)\n"
        "norm.running_mean.fill_(distributed.rank() + 1.0)\n"
        "distributed.average_buffers(norm.buffers())\n"
        "text = f'{norm.running_mean.item()} {int(norm.num_batches_tracked)}'\n"
        "open(f'{distributed.rank()}.txt', 'w').write(text)\n"
    )
    done = torchrun(tmp_path, 2, "job.py")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["1.5 0", "1.5 0"]


KILLED = """
import os, signal, sys
from racnn_cli.training import loop
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    honest, made, at = loop._Fit._update, [], int(sys.argv[2])
    def shot(*words):
        made.append(0)
        if len(made) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        honest(*words)
    loop._Fit._update = shot
sys.argv = ["racnn", "train", "2.toml", "--out", sys.argv[1]]
from racnn_cli.cli import main
main()
"""


def ended_alike(one: Run, two: Run) -> None:
    assert figures(two) == figures(one)
    first, second = load_file(one.weights), load_file(two.weights)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_process_that_is_killed_is_started_again_from_the_last_checkpoint(place: Path, by) -> None:
    (place / "killed.py").write_text(KILLED)
    done = torchrun(place, 2, "killed.py", "killed", "8", restarts=1)
    assert done.returncode == 0, done.stderr
    ended_alike(by(2)[0], Run(place / "killed"))
    again = torchrun(place, 2, "killed.py", "killed-for-good", "8")
    assert again.returncode != 0
    # The survivor finds the connection closed, or torchrun's SIGTERM is faster.
    assert any(said in again.stderr for said in ("another process of this training is gone", "closing signal SIGTERM"))
    assert "racnn_cli/training" not in again.stderr  # no traceback but torchrun's own


def test_a_scheduler_that_stops_torchrun_loses_nothing(place: Path, by) -> None:
    """SIGTERM at the launcher, as SLURM sends it before a job's time is up."""
    train = ["-m", "racnn_cli", "train", "2.toml", "--out", "stopped", "--resume", "--set", "data.workers=1"]
    program = ["--standalone", "--nproc-per-node", "2", *train]
    with (place / "stopped.txt").open("w") as said:
        launcher = subprocess.Popen(
            [*LAUNCHER, *program], cwd=place, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT
        )
        log = place / "stopped" / "log.jsonl"
        while launcher.poll() is None and not (log.is_file() and log.read_text().count("pretrain-apn")):
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) != 0
    assert "stopped by SIGTERM; everything up to this step is saved" in (place / "stopped.txt").read_text()
    assert not (place / "stopped" / "eval.json").exists()
    done = torchrun(place, 2, *train)
    assert done.returncode == 0, done.stderr
    ended_alike(by(2)[0], Run(place / "stopped"))


def test_two_nodes_meet(place: Path) -> None:
    """Two launchers, as on two machines, that find each other at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7"]
    program = ["-m", "racnn_cli", "train", "2.toml", "--out", "nodes"]
    nodes = [
        subprocess.Popen(
            [*LAUNCHER, "--nnodes", "2", "--nproc-per-node", "1", *meeting, *program],
            cwd=place,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(text.count("run folder nodes") for text in said) == 1
    assert (place / "nodes" / "eval.json").is_file()
