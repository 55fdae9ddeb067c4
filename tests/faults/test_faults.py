"""What can go wrong around a training that is right: each time one clear message, and nothing lost."""

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
from safetensors.torch import load_file, save_file

from racnn_cli import api
from racnn_cli.data import images
from racnn_cli.errors import RacnnError
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.training import checkpoint, stages
from racnn_cli.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data")


@pytest.fixture(scope="module")
def half(tmp_path_factory, data: Path) -> Path:
    """A run whose first stage is finished."""
    folder = tmp_path_factory.mktemp("half") / "run"
    trainer = Trainer.start(tiny(data), out=folder, quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    trainer.close()
    return folder


@pytest.fixture
def mine(half: Path, here: Path) -> Run:
    """A copy of it, to be spoilt."""
    shutil.copytree(half, here / "mine")
    return Run(here / "mine")


def ends_as(run: Run, recipe: Recipe, folder: Path) -> None:
    """The run goes on, and ends as one that nothing happened to."""
    api.resume(run, quiet=True)
    api.train(recipe, out=folder, quiet=True)
    one, two = load_file(run.weights), load_file(folder / "weights.safetensors")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


# ---- checkpoints


def damaged(path: Path, how: str) -> None:
    if how == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit flipped":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif how == "another position":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            told = file.metadata()
        progress = json.loads(told["progress"]) | {"views": 7}
        save_file(load_file(path), path, told | {"progress": json.dumps(progress)})


@pytest.mark.parametrize("how", ["cut short", "empty", "a bit flipped", "another position"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(mine: Run, here, data, capfd, how) -> None:
    newest, before = checkpoint.list_checkpoints(mine)
    damaged(newest, how)
    trainer = Trainer.resume(mine)
    said = " ".join(capfd.readouterr().err.split())
    assert newest.name in said
    assert "damaged" in said
    assert "the one before it is used" in said
    assert trainer.progress.number == int(re.findall(r"\d+", before.name)[0])
    trainer.close()
    ends_as(mine, tiny(data), here / "whole")


def test_with_every_checkpoint_damaged_all_of_them_are_named(mine: Run) -> None:
    for path in checkpoint.list_checkpoints(mine):
        damaged(path, "a bit flipped")
    with pytest.raises(RacnnError, match="no checkpoint can be read") as error:
        Trainer.resume(mine)
    assert all(path.name in error.value.message for path in checkpoint.list_checkpoints(mine))
    assert error.value.exit_code == 1


def test_so_many_checkpoints_are_kept_as_the_recipe_says(here, data) -> None:
    recipe = tiny(data, train__keep=3, train__save_steps=1)
    run, _ = api.train(recipe, out=here / "mine", quiet=True)
    numbers = [int(re.findall(r"\d+", path.name)[0]) for path in checkpoint.list_checkpoints(run)]
    assert numbers == list(range(numbers[0], numbers[0] - 4, -1))
    assert numbers[0] > 40  # one a step


def test_minutes_count_on_a_clock_that_does_not_jump(here, data, monkeypatch) -> None:
    written: list[float] = []
    honest = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (written.append(1), honest(*a, **k)))
    monkeypatch.setattr(time, "time", lambda: 10.0**12 * len(written))  # years forward, at every look
    trainer = Trainer.start(tiny(data, train__save_minutes=60), out=here / "mine", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    assert len(written) == 3  # two epochs and the stage's end
    trainer.close()
    del written[:]
    trainer = Trainer.start(tiny(data, train__save_minutes=1e-9), out=here / "often", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    assert len(written) == 9  # and after the three other steps of each epoch
    trainer.close()


# ---- disks and folders


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for 2 MiB, where the system lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path, here, data) -> None:
    recipe = tiny(data)
    ballast = small_disk / "ballast"
    trainer = Trainer.start(recipe, out=small_disk / "mine", quiet=True)
    run = trainer.run
    free = shutil.disk_usage(small_disk).free
    size = len(json.dumps(1)) + sum(t.numel() * t.element_size() for t in trainer.model.state_dict().values())
    ballast.write_bytes(b"0" * (free - int(2.5 * size)))  # room for one checkpoint with its optimizer, not for two
    with pytest.raises(RacnnError, match=r"could not be written: .*No space left on device") as error:
        stages.run_all(trainer)
    trainer.close()
    assert "free some space" in error.value.hint
    assert error.value.exit_code == 1
    assert not list(run.folder.rglob(".*"))
    ballast.unlink()
    shutil.move(run.folder, here / "moved")
    ends_as(Run(here / "moved"), recipe, here / "whole")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_written_is_named(mine: Run, monkeypatch, number) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = {path: path.read_bytes() for path in mine.folder.rglob("*") if path.is_file()}
    trainer = Trainer.resume(mine, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", refused)
        with pytest.raises(RacnnError, match=f"state.* could not be written: {os.strerror(number)}"):
            stages.run_stage(trainer, "pretrain-apn")
    trainer.close()
    for path, content in before.items():
        if path.suffix == ".safetensors":
            assert path.read_bytes() == content


def test_two_processes_cannot_train_in_one_folder(mine: Run, data) -> None:
    trainer = Trainer.resume(mine, quiet=True)
    words = [sys.executable, "-m", "racnn_cli", "pretrain-apn", "--run", str(mine.folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"another process is training in {mine.folder}" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    trainer.close()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_process_that_was_killed_holds_no_lock(mine: Run) -> None:
    code = "import sys; from pathlib import Path; from racnn_cli.run import Run\n"
    code += "lock = Run(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(mine.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RacnnError, match="another process"):
            mine.lock()
        other.kill()
        other.wait()
    mine.lock().release()


# ---- workers and images


def test_a_reading_process_that_is_killed_is_named(here, data, monkeypatch) -> None:
    recipe = tiny(data, data__workers=2)
    honest = images.ImageDataset.__getitem__

    def shot(self: images.ImageDataset, key: tuple[int, int]) -> Any:
        if torch.utils.data.get_worker_info() is not None and key[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
        return honest(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(images.ImageDataset, "__getitem__", shot)
        with pytest.raises(RacnnError, match=r"one of the 2 processes .* died: DataLoader worker") as error:
            api.train(recipe, out=here / "mine", quiet=True)
    assert "--set data.workers=1" in error.value.hint
    assert "racnn train --resume" in error.value.hint
    ends_as(Run(here / "mine"), recipe, here / "whole")


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: unable to write to file "
        "</torch_12_34>: No space left on device (28)",
    ],
)
def test_too_little_shared_memory_says_what_to_enlarge(text: str) -> None:
    error = images._worker_error(text, 4)
    assert "4 processes" in error.message
    assert "shared memory" in error.message
    assert "/dev/shm" in error.hint
    assert "--set data.workers=0" in error.hint


@pytest.mark.parametrize("workers", [0, 2])
def test_a_images_that_vanishes_is_named_and_can_come_back(here, data, workers) -> None:
    place = here / "data"
    shutil.copytree(data, place)
    recipe = tiny(place, data__workers=workers)
    trainer = Trainer.start(recipe, out=here / "mine", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    gone = next((place / "train").rglob("*.png"))
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(RacnnError, match=re.escape(gone.name)) as error:
        stages.run_all(trainer)
    trainer.close()
    assert "Traceback" not in str(error.value)
    with pytest.raises(RacnnError, match="changed since it was started"):
        api.resume(Run(here / "mine"), quiet=True)
    gone.write_bytes(content)
    ends_as(Run(here / "mine"), recipe, here / "whole")


def test_memory_that_runs_out_says_what_to_lower(mine: Run, monkeypatch) -> None:
    trainer = Trainer.resume(mine, quiet=True)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("racnn_cli.training.loop._Fit._epoch", full)
        with pytest.raises(RacnnError, match=r"ran out of memory with train\.batch = 6") as error:
            stages.run_stage(trainer, "pretrain-apn")
    trainer.close()
    assert "--set train.batch=3 --set train.accumulate=2" in error.value.hint
    assert mine.recipe().train.batch == 6  # never changed in silence


# ---- the log, and folders of other versions


def test_half_a_line_of_the_log_is_written_again(mine: Run, here, data) -> None:
    with mine.log.open("a") as file:
        file.write('{"event": "epo')
    ends_as(mine, tiny(data), here / "whole")
    lines = [json.loads(line) for line in mine.log.read_text().splitlines()]
    assert len(lines) == len((here / "whole" / "log.jsonl").read_text().splitlines())


def test_a_run_of_another_version_is_said_to_be_one(mine: Run) -> None:
    for path in checkpoint.list_checkpoints(mine):
        save_file(load_file(path), path, {"progress": json.dumps({"stage": "polishing"}), "racnn": "9.9"})
    with pytest.raises(RacnnError, match=r"it was written by racnn 9\.9"):
        Trainer.resume(mine)


def test_what_a_killed_process_left_half_written_is_swept_up(mine: Run, here, data) -> None:
    (mine.state / ".racnn-checkpoint-00000009.safetensors.x7.safetensors").write_bytes(b"0" * 100)
    (mine.folder / ".racnn-log.jsonl.abc").write_bytes(b"0")
    (mine.folder / ".gitignore").write_text("*")  # what is a person's own stays
    ends_as(mine, tiny(data), here / "whole")
    assert [path.name for path in mine.folder.rglob(".*")] == [".gitignore"]


def test_a_run_folder_is_there_whole_or_not_at_all(here, data, monkeypatch) -> None:
    file = write_recipe(here / "mine.toml", data)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("racnn_cli.run.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            api.train(str(file), out=here / "mine", quiet=True)
    assert not (here / "mine").exists()
    assert not list(here.glob(".*"))
