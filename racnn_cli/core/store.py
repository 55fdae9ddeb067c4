"""Saving and loading trained networks as safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import racnn_cli
from racnn_cli.core.model import RACNN, build
from racnn_cli.errors import RunError, describe_missing
from racnn_cli.run import Run, write_atomic


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata | {"racnn": racnn_cli.__version__})
        except SafetensorError as error:  # raised instead of an OSError, for example for a full disk
            raise OSError(str(error)) from None

    write_atomic(path, write)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        RunError: the file is missing or damaged.
    """
    if not path.is_file():
        raise RunError(
            describe_missing(path),
            "finish a training stage first (`racnn train --resume`), or name another run with --run",
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise RunError(
                f"{path} has a name that is not UTF-8, which safetensors cannot open", "rename that folder"
            ) from None
        raise RunError(
            f"{path} is damaged: {error}", "restore the file from a backup, or train again", failure=True
        ) from None


def save_weights(path: Path, model: RACNN) -> None:
    """Write the weights of a network atomically; equal weights give equal bytes.

    No metadata is added, because safetensors orders several keys differently in each process.
    """
    save_tensors(path, model.state_dict(), {})


def load_weights(path: Path, model: RACNN) -> None:
    """Load the weights of a network from a file.

    Raises:
        RunError: the file is missing, damaged, or does not match the network.
    """
    fill(model, read_tensors(path)[0], path)


def fill(model: RACNN, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy tensors into a network, all of them or none.

    Args:
        model: the network.
        tensors: by their names in the network's state dict.
        path: the file they come from, for messages.

    Raises:
        RunError: names or shapes differ.
    """
    state = model.state_dict()
    tensors = {"temperatures": torch.ones_like(model.temperatures)} | tensors  # files of older versions have none
    mismatches = sorted(state.keys() ^ tensors.keys()) + [
        f"{name}: {tuple(tensors[name].shape)} where {tuple(state[name].shape)} is needed"
        for name in sorted(state.keys() & tensors.keys())
        if state[name].shape != tensors[name].shape
    ]
    if mismatches:
        count = len(mismatches)
        listed = "\n  ".join(mismatches[:8]) + (f"\n  and {count - 8} more" if count > 8 else "")
        raise RunError(
            f"{path} does not hold the weights of this recipe's network; {count} tensors differ:\n  {listed}",
            "use the recipe.toml that the weights were trained with",
        )
    model.load_state_dict(tensors)


def load(folder: Path) -> tuple[RACNN, Run]:
    """Load the trained network, in eval mode, from a run folder or a folder of `racnn export --safetensors`.

    Raises:
        RunError: not such a folder, or a file in it is missing or damaged.
    """
    run = Run.open(folder)
    recipe = run.recipe()
    model = build(recipe.model, len(run.classes()), source=recipe.data.source, weights="none")
    load_weights(run.weights, model)
    return model.eval(), run
