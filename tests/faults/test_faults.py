"""Damaged files, full disks, killed processes and the like: training gives one clear message and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import tiny, write_blobs, write_recipe
from processes import run_racnn
from safetensors.torch import load_file, save_file

from racnn_cli import api
from racnn_cli.data import images
from racnn_cli.errors import DataError, RunError
from racnn_cli.run import Run
from racnn_cli.training import checkpoint, stages
from racnn_cli.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data")


@pytest.fixture(scope="module")
def started(tmp_path_factory, data: Path) -> Path:
    """A run whose first stage is finished."""
    folder = tmp_path_factory.mktemp("started") / "mine"
    trainer = Trainer.start(tiny(data), out=folder, quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    trainer.close()
    return folder


@pytest.fixture
def run(started: Path, here: Path) -> Run:
    """A copy of that run, for a test to damage."""
    shutil.copytree(started, here / "mine")
    return Run(here / "mine")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data: Path) -> Run:
    """The run of `tiny(data)` without an interruption."""
    return api.train(tiny(data), out=tmp_path_factory.mktemp("uninterrupted") / "mine", quiet=True)[0]


def check_resume(run: Run, uninterrupted: Run) -> None:
    """Resume the run and check that its weights are those of the run that was not interrupted."""
    api.resume(run, quiet=True)
    weights, expected = load_file(run.weights), load_file(uninterrupted.weights)
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


# ---- checkpoints


def damage(path: Path, kind: str) -> None:
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a bit flipped":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif kind == "another position":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        progress = json.loads(metadata["progress"]) | {"views": 7}
        save_file(load_file(path), path, metadata | {"progress": json.dumps(progress)})


@pytest.mark.parametrize("kind", ["cut short", "empty", "a bit flipped", "another position"])
def test_a_damaged_checkpoint_is_skipped_and_the_one_before_it_is_used(run: Run, uninterrupted, capfd, kind) -> None:
    newest, previous = checkpoint.list_checkpoints(run)
    damage(newest, kind)
    trainer = Trainer.resume(run)
    err = " ".join(capfd.readouterr().err.split())
    assert newest.name in err
    assert "damaged" in err
    assert "the one before it is used" in err
    assert trainer.progress.number == int(re.findall(r"\d+", previous.name)[0])
    trainer.close()
    check_resume(run, uninterrupted)


def test_if_every_checkpoint_is_damaged_all_are_named(run: Run) -> None:
    for path in checkpoint.list_checkpoints(run):
        damage(path, "a bit flipped")
    with pytest.raises(RunError, match="no checkpoint can be read") as error:
        Trainer.resume(run)
    assert all(path.name in error.value.message for path in checkpoint.list_checkpoints(run))
    assert error.value.exit_code == 1


def test_the_recipe_sets_how_many_checkpoints_are_kept(here, data) -> None:
    recipe = tiny(data, train__keep=3, train__save_steps=1)
    run, _ = api.train(recipe, out=here / "mine", quiet=True)
    numbers = [int(re.findall(r"\d+", path.name)[0]) for path in checkpoint.list_checkpoints(run)]
    assert numbers == list(range(numbers[0], numbers[0] - 4, -1))
    assert numbers[0] > 40  # one per step


def test_save_minutes_do_not_depend_on_the_system_clock(here, data, monkeypatch) -> None:
    saves: list[int] = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args, **options: (saves.append(1), save(*args, **options)))
    monkeypatch.setattr(time, "time", lambda: 10.0**12 * len(saves))  # jumps forward by years at every call
    trainer = Trainer.start(tiny(data, train__save_minutes=60), out=here / "mine", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    assert len(saves) == 4  # after two epochs, and twice at the end of the stage
    trainer.close()
    saves.clear()
    trainer = Trainer.start(tiny(data, train__save_minutes=1e-9), out=here / "often", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    assert len(saves) == 10  # also after the three other steps of each epoch
    trainer.close()


# ---- disks and folders


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 2 MiB, if the system permits it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path, here, data, uninterrupted) -> None:
    recipe = tiny(data)
    ballast = small_disk / "ballast"
    trainer = Trainer.start(recipe, out=small_disk / "mine", quiet=True)
    run = trainer.run
    free = shutil.disk_usage(small_disk).free
    size = len(json.dumps(1)) + sum(t.numel() * t.element_size() for t in trainer.model.state_dict().values())
    ballast.write_bytes(b"0" * (free - int(2.5 * size)))  # for one checkpoint with its optimizer, not for two
    with pytest.raises(RunError, match=r"could not be written: .*No space left on device") as error:
        stages.run_all(trainer)
    trainer.close()
    assert "free some space" in error.value.hint
    assert error.value.exit_code == 1
    assert not list(run.folder.rglob(".*"))
    ballast.unlink()
    shutil.move(run.folder, here / "moved")
    check_resume(Run(here / "moved"), uninterrupted)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_written_is_named(run: Run, monkeypatch, number) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    trainer = Trainer.resume(run, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", fail)
        with pytest.raises(RunError, match=f"state.* could not be written: {os.strerror(number)}"):
            stages.run_stage(trainer, "pretrain-apn")
    trainer.close()
    for path, content in before.items():
        if path.suffix == ".safetensors":
            assert path.read_bytes() == content


def test_two_processes_cannot_train_in_one_folder(run: Run, data) -> None:
    trainer = Trainer.resume(run, quiet=True)
    command = ("pretrain-apn", "--run", run.folder)
    done = run_racnn(*command, folder=run.folder.parent)
    assert done.code == 2
    assert f"another process is training in {run.folder}" in " ".join(done.err.split())
    assert "Traceback" not in done.err
    trainer.close()
    done = run_racnn(*command, folder=run.folder.parent)
    assert done.code == 0, done.err


def test_a_killed_process_releases_its_lock(run: Run) -> None:
    code = "import sys; from pathlib import Path; from racnn_cli.run import Run\n"
    code += "lock = Run(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process"):
            run.lock()
        process.kill()
        process.wait()
    run.lock().release()


# ---- workers and images


def test_a_killed_worker_process_is_named(here, data, uninterrupted, monkeypatch) -> None:
    recipe = tiny(data, data__workers=2)
    getitem = images.ImageDataset.__getitem__

    def killed_getitem(self: images.ImageDataset, key: tuple[int, int]) -> Any:
        if torch.utils.data.get_worker_info() is not None and key[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
        return getitem(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(images.ImageDataset, "__getitem__", killed_getitem)
        with pytest.raises(RunError, match=r"one of the 2 processes .* died: DataLoader worker") as error:
            api.train(recipe, out=here / "mine", quiet=True)
    assert "--set data.workers=1" in error.value.hint
    assert "racnn train --resume" in error.value.hint
    check_resume(Run(here / "mine"), uninterrupted)  # the number of workers changes nothing


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: unable to write to file "
        "</torch_12_34>: No space left on device (28)",
    ],
)
def test_a_lack_of_shared_memory_names_what_to_enlarge(text: str) -> None:
    error = images._worker_error(text, 4)
    assert "4 processes" in error.message
    assert "shared memory" in error.message
    assert "/dev/shm" in error.hint
    assert "--set data.workers=0" in error.hint


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_image_is_named_and_can_be_restored(here, data, uninterrupted, workers) -> None:
    folder = here / "data"
    shutil.copytree(data, folder)
    recipe = tiny(folder, data__workers=workers)
    trainer = Trainer.start(recipe, out=here / "mine", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    image = next((folder / "train").rglob("*.png"))
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(DataError, match=re.escape(image.name)) as error:
        stages.run_all(trainer)
    trainer.close()
    assert "Traceback" not in str(error.value)
    with pytest.raises(RunError, match="changed since the run was started"):
        api.resume(Run(here / "mine"), quiet=True)
    image.write_bytes(content)
    check_resume(Run(here / "mine"), uninterrupted)


def test_a_lack_of_memory_names_what_to_lower(run: Run, monkeypatch) -> None:
    trainer = Trainer.resume(run, quiet=True)

    def run_out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("racnn_cli.training.loop._Fit._epoch", run_out_of_memory)
        with pytest.raises(RunError, match=r"ran out of memory with train\.batch = 6") as error:
            stages.run_stage(trainer, "pretrain-apn")
    trainer.close()
    assert "--set train.batch=3 --set train.accumulate=2" in error.value.hint
    assert run.recipe().train.batch == 6  # never changed silently


# ---- the log, and folders of other versions


def test_an_incomplete_line_of_the_log_is_written_again(run: Run, uninterrupted) -> None:
    with run.log.open("a") as file:
        file.write('{"event": "epo')
    check_resume(run, uninterrupted)
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert len(lines) == len(uninterrupted.log.read_text().splitlines())


def test_the_version_that_wrote_a_checkpoint_is_named(run: Run) -> None:
    for path in checkpoint.list_checkpoints(run):
        save_file(load_file(path), path, {"progress": json.dumps({"stage": "polishing"}), "racnn": "9.9"})
    with pytest.raises(RunError, match=r"it was written by racnn 9\.9"):
        Trainer.resume(run)


def test_temporary_files_of_a_killed_process_are_removed(run: Run, uninterrupted) -> None:
    (run.state / ".racnn-checkpoint-00000009.safetensors.x7.safetensors").write_bytes(b"0" * 100)
    (run.folder / ".racnn-log.jsonl.abc").write_bytes(b"0")
    (run.folder / ".gitignore").write_text("*")  # a user's own file is kept
    check_resume(run, uninterrupted)
    assert [path.name for path in run.folder.rglob(".*")] == [".gitignore"]


def test_a_run_folder_is_created_completely_or_not_at_all(here, data, monkeypatch) -> None:
    file = write_recipe(here / "mine.toml", data)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("racnn_cli.run.write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            api.train(str(file), out=here / "mine", quiet=True)
    assert not (here / "mine").exists()
    assert not list(here.glob(".*"))
