"""What a resume needs, in files of tensors and primitives: weights, averaged weights, optimizer state, position.

`state/checkpoint-NUMBER.safetensors`: the newest is where the run stands, the ones before it are kept in case it is
damaged. A file gets its name only when all of it is on the disk, and holds a checksum of its contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, TypeAdapter
from torch import Tensor

from racnn_cli.core.model import RACNN
from racnn_cli.core.store import fill, read_tensors, save_tensors
from racnn_cli.errors import RunError
from racnn_cli.events import Answer
from racnn_cli.run import Run

NAME = "checkpoint-{:08d}.safetensors"
PATTERN = "checkpoint-*.safetensors"
HINT = "start again with another --out, or take the folder from a backup"


def _both(losses: dict[str, float]) -> dict[str, float]:
    if losses and losses.keys() != {"classification", "rank"}:
        raise ValueError("not the two losses that end `alternate`")
    return losses


Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Candidate:
    """Weights that may be kept: the number of their epoch or round (0: before the first), and their metrics."""

    number: Count
    val: Answer


@dataclass
class Progress:
    """Where a run stands. Randomness is a function of this and the seed, so no generator's state has to be kept.

    Attributes:
        done: stages that are finished.
        stage: the stage under way; empty between stages.
        round, phase: of `alternate`: rounds that are finished, and the next step of this one. `judge`: measure the
            round and decide whether it was the last one.
        epoch, step: position in the present phase; `step` counts batches.
        images: seen in the present epoch, over all processes; 0 in files of versions that did not store it.
        batch: images per step, over all processes.
        views: epochs since the start of the run: every epoch has its own augmentations.
        sums: every loss of the present epoch, added up over its images so far.
        best, last, stall: of the present phase: best and last epoch, and epochs since the best one.
        best_round, last_round: of `alternate`: the round that will be restored, and the last one.
        smoothed, still: of `alternate`: the smoothed losses, and rounds since one of them changed.
        number: of the checkpoint; each has the next one.
        logged: bytes of log.jsonl that were written before it; what follows them is written again.
    """

    done: list[str] = field(default_factory=list)
    stage: str = ""
    round: Count = 0
    phase: Literal["cnn", "apn", "judge", "fusion"] = "cnn"
    epoch: Count = 0
    step: Count = 0
    images: Count = 0
    batch: Count = 0
    views: Count = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: Candidate | None = None
    last: Candidate | None = None
    stall: Count = 0
    best_round: Candidate | None = None
    last_round: Candidate | None = None
    smoothed: Annotated[dict[str, float], AfterValidator(_both)] = field(default_factory=dict)
    still: Count = 0
    number: Count = 0
    logged: Count = 0


_PROGRESS = TypeAdapter(Progress)


@dataclass
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        progress: where the run stood.
        optimizer: number of a parameter to the entries of its state.
        averages: averaged weights and buffers by name.
        problems: what was wrong with newer checkpoints, which were skipped.
    """

    progress: Progress
    optimizer: dict[int, dict[str, Tensor]]
    averages: dict[str, Tensor]
    problems: list[str] = field(default_factory=list)


def save(
    run: Run,
    model: RACNN,
    progress: Progress,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    averages: dict[str, Tensor] | None = None,
    keep: int,
) -> None:
    """Write where the run stands, and delete all but the newest `keep` checkpoints before it."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"averaged.{name}": value for name, value in (averages or {}).items()}
    if optimizer is not None:
        for number, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in entries.items() if value is not None}
    progress.number += 1
    progress.logged = run.sync_log()
    _write(run.state / NAME.format(progress.number), tensors, progress)
    for path in list_checkpoints(run)[keep + 1 :]:
        path.unlink(missing_ok=True)


def list_checkpoints(run: Run) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(run.state.glob(PATTERN), reverse=True)


def load(run: Run, model: RACNN) -> Checkpoint | None:
    """Read the newest undamaged checkpoint into the network; None where there is none at all.

    Raises:
        RunError: every one of them is damaged, or of another network.
    """
    problems: list[str] = []
    for path in list_checkpoints(run):
        try:
            saved = _read(path, model)
        except RunError as error:
            problems.append(error.message)
        else:
            saved.problems = problems
            return saved
    if problems:
        raise RunError("\n  ".join(["no checkpoint can be read:", *problems]), HINT, failure=True)
    return None


def save_snapshot(run: Run, name: str, model: RACNN, progress: Progress) -> None:
    """Keep the weights as they are under a name, such as `best`, for `restore_snapshot`."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    _write(run.state / f"{name}.safetensors", tensors, progress)


def restore_snapshot(run: Run, name: str, model: RACNN, *, round_: int | None = None) -> None:
    """Read the weights that `save_snapshot` wrote into the network.

    Args:
        run, name, model: as for `save_snapshot`.
        round_: rounds that were finished when it was written; None: any.

    Raises:
        RunError: the file is missing or damaged, or was written in another round.
    """
    path = run.state / f"{name}.safetensors"
    saved = _read(path, model).progress
    if round_ is not None and saved.round != round_:
        raise RunError(f"{path} is of round {saved.round + 1} and not of round {round_ + 1}", HINT, failure=True)


def remove_snapshot(run: Run, name: str) -> None:
    """Delete what `save_snapshot` wrote."""
    (run.state / f"{name}.safetensors").unlink(missing_ok=True)


def restore_training_state(
    *, optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor], saved: Checkpoint, folder: Path
) -> None:
    """Give a fresh optimizer, and the averages of what is trained, the state that was saved.

    Raises:
        RunError: it is that of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Shapes of the entries of each parameter's state; None: the parameter's own.
    shapes: dict[str, torch.Size | None] = {"momentum_buffer": None}
    if isinstance(optimizer, torch.optim.AdamW):
        shapes = {"step": torch.Size(), "exp_avg": None, "exp_avg_sq": None}
    fits = all(
        number < len(parameters)
        and {name: entry.shape for name, entry in entries.items()}
        == {name: parameters[number].shape if shape is None else shape for name, shape in shapes.items()}
        for number, entries in saved.optimizer.items()
    ) and {name: value.shape for name, value in saved.averages.items()} == {
        name: value.shape for name, value in averages.items()
    }
    if not fits:
        raise RunError(
            f"the checkpoint in {folder} is of other parameters than those that {saved.progress.stage} trains",
            HINT,
            failure=True,
        )
    if saved.optimizer:
        groups: Any = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved.optimizer, "param_groups": groups})
    for name, value in saved.averages.items():
        averages[name].copy_(value)


def _write(path: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    position = _PROGRESS.dump_json(progress).decode()
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, flat, {"progress": position, "sha256": _checksum(flat, position)})


def _read(path: Path, model: RACNN) -> Checkpoint:
    tensors, metadata = read_tensors(path)
    progress = _progress(metadata, path)
    if metadata.get("sha256") != _checksum(tensors, metadata["progress"]):
        raise RunError(f"{path} is damaged: its contents do not match their checksum", HINT, failure=True)
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimizer": {}}
    optimizer: dict[int, dict[str, Tensor]] = {}
    try:
        for key, value in tensors.items():
            group, _, rest = key.partition(".")
            groups[group][rest] = value
        for key, value in groups["optimizer"].items():
            number, _, rest = key.partition(".")
            optimizer.setdefault(int(number), {})[rest] = value
    except (KeyError, ValueError):
        raise RunError(f"{path} holds {key!r}, which no checkpoint of racnn does", HINT, failure=True) from None
    fill(model, groups["model"], path)
    return Checkpoint(progress=progress, optimizer=optimizer, averages=groups["averaged"])


def _checksum(tensors: Mapping[str, Tensor], position: str) -> str:
    """SHA-256 over the position and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(position.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """The position as written by versions that kept the epoch and the round with the lowest validation loss."""
    if "best_round_loss" not in values:
        return values

    def candidate(loss: float | None, number: int) -> dict[str, Any] | None:
        return None if loss is None else {"number": number, "val": {"top1": 0.0, "nll": loss}}

    upgraded = {key: value for key, value in values.items() if key != "best_round_loss"}
    upgraded["sums"] = {name: total * values["batch"] for name, total in values["sums"].items()}
    upgraded["best"] = candidate(values["best"], max(values["epoch"] - values["stall"], 0))
    upgraded["best_round"] = candidate(values["best_round_loss"], values["best_round"])
    return upgraded | {"last": upgraded["best"], "last_round": upgraded["best_round"]}


def _progress(metadata: dict[str, str], path: Path) -> Progress:
    try:
        values = _upgrade(json.loads(metadata["progress"]))
        return _PROGRESS.validate_python({f.name: values[f.name] for f in fields(Progress)})
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} does not say where the run stood ({error}); it was written by racnn "
            f"{metadata.get('racnn', 'of an unknown version')}",
            HINT,
            failure=True,
        ) from None
