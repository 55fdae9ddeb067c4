"""What resume needs, in one file of tensors and primitives: weights, averaged weights, optimizer, position."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from racnn_cli.core.model import RACNN
from racnn_cli.core.store import fill, read_metadata, read_tensors, save_tensors
from racnn_cli.errors import RacnnError
from racnn_cli.run import Run


@dataclass
class Progress:
    """Where a run stands. Randomness is a function of this and the seed, so that no generator need be kept.

    Attributes:
        done: stages that are finished.
        stage: the stage under way; empty between stages.
        round, phase: of `alternate`: rounds that are finished, and what comes next in this one.
        epoch, step: position in the present call of the loop; `step` counts batches.
        views: epochs since the start of the run: every epoch sees its own augmentations.
        best, stall: of the present call of the loop: lowest validation loss, and epochs since.
        best_round, best_round_loss: of `alternate`: the round that will be restored.
        smoothed, still: of `alternate`: the smoothed losses, and rounds since one of them changed.
    """

    done: list[str] = field(default_factory=list)
    stage: str = ""
    round: int = 0
    phase: str = "cnn"
    epoch: int = 0
    step: int = 0
    views: int = 0
    best: float | None = None
    stall: int = 0
    best_round: int = 0
    best_round_loss: float | None = None
    smoothed: dict[str, float] = field(default_factory=dict)
    still: int = 0


def save(
    run: Run,
    name: str,
    model: RACNN,
    progress: Progress,
    optimizer: torch.optim.Optimizer | None = None,
    averaged: dict[str, Tensor] | None = None,
) -> None:
    """Write `state/NAME.safetensors` in one step."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"averaged.{key}": value for key, value in (averaged or {}).items()}
    if optimizer is not None:
        for number, entries in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{number}.{key}": value for key, value in entries.items() if value is not None
            }
    save_tensors(_file(run, name), tensors, {"progress": json.dumps(asdict(progress))})


def exists(run: Run, name: str) -> bool:
    return _file(run, name).is_file()


def remove(run: Run, name: str) -> None:
    _file(run, name).unlink(missing_ok=True)


@dataclass
class Saved:
    """A checkpoint that was read."""

    progress: Progress
    optimizer: dict[int, dict[str, Tensor]]
    averaged: dict[str, Tensor]


def load(run: Run, name: str, model: RACNN) -> Saved:
    """Read `state/NAME.safetensors` into the network; the rest is returned.

    Raises:
        RacnnError: the file is missing, damaged, or of another network.
    """
    path = _file(run, name)
    tensors, metadata = read_tensors(path)
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimizer": {}}
    for key, value in tensors.items():
        group, _, rest = key.partition(".")
        groups[group][rest] = value
    fill(model, groups["model"], path)
    optimizer: dict[int, dict[str, Tensor]] = {}
    for key, value in groups["optimizer"].items():
        number, _, rest = key.partition(".")
        optimizer.setdefault(int(number), {})[rest] = value
    return Saved(_progress(metadata, path), optimizer, groups["averaged"])


def peek(run: Run) -> Progress:
    """Where the run stands, without reading a tensor into the network; the very start if nothing is saved."""
    path = _file(run, "last")
    return _progress(read_metadata(path), path) if path.is_file() else Progress()


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Give a fresh optimizer the state that was saved."""
    if state:
        groups: Any = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _file(run: Run, name: str) -> Path:
    return run.state / f"{name}.safetensors"


def _progress(metadata: dict[str, str], path: Path) -> Progress:
    try:
        values = json.loads(metadata["progress"])
        return Progress(**{f.name: values[f.name] for f in fields(Progress)})
    except (KeyError, ValueError, TypeError) as fault:
        raise RacnnError(
            f"{path} does not say where the run stood ({fault})",
            "start again with another --out, or take the file from a backup",
            failure=True,
        ) from None
