"""A trained network on disk and back: one safetensors file beside recipe.toml and classes.json."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import racnn_cli
from racnn_cli.core.model import RACNN, build
from racnn_cli.errors import RacnnError, describe_missing
from racnn_cli.run import Run, write_atomic


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as one safetensors file, in one step."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(flat, temporary, metadata | {"racnn": racnn_cli.__version__})
        except SafetensorError as error:  # a full disk, said by safetensors in its own way
            raise OSError(str(error)) from None

    write_atomic(path, write)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        RacnnError: the file is missing or damaged.
    """
    if not path.is_file():
        raise RacnnError(
            describe_missing(path),
            "finish a training stage first (`racnn train --resume`), or name another run with --run",
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise RacnnError(
                f"{path} has a name that is not UTF-8, which safetensors does not open", "rename that folder"
            ) from None
        raise RacnnError(
            f"{path} is damaged: {error}", "take the file from a backup, or train again", failure=True
        ) from None


def save_weights(path: Path, model: RACNN) -> None:
    """Write the weights of a network, in one step; the same weights are the same bytes.

    (safetensors writes metadata of more than one key in an order that changes from process to process.)
    """
    save_tensors(path, model.state_dict(), {})


def load_weights(path: Path, model: RACNN) -> None:
    """Read the weights of a network.

    Raises:
        RacnnError: the file is missing, damaged, or of another network.
    """
    fill(model, read_tensors(path)[0], path)


def fill(model: RACNN, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy tensors into a network, all of them or none.

    Raises:
        RacnnError: names or shapes differ.
    """
    own = model.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) + [
        f"{name}: {tuple(tensors[name].shape)} where {tuple(own[name].shape)} is needed"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if wrong:
        listed = "\n  ".join(wrong[:8]) + (f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise RacnnError(
            f"{path} does not hold the weights of this recipe's network; {len(wrong)} tensors differ:\n  {listed}",
            "use the recipe.toml that the weights were trained with",
        )
    model.load_state_dict(tensors)


def load(folder: Path) -> tuple[RACNN, Run]:
    """The trained network of a run folder, or of a folder that `racnn export --safetensors` wrote, in eval mode.

    Raises:
        RacnnError: it is no such folder, or a file in it is missing or damaged.
    """
    run = Run.open(folder)
    recipe = run.recipe()
    model = build(recipe.model, len(run.classes()), source=recipe.data.source, weights="none")
    load_weights(run.weights, model)
    return model.eval(), run
