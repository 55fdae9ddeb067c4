"""Find the data that `data.path` names: a folder, a CSV file or a built-in data set."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from racnn_cli import recipe
from racnn_cli.data.datasets import NAMES, find_builtin
from racnn_cli.data.decode import show
from racnn_cli.errors import DataError


def locate(data: recipe.Data, seed: int) -> Path:
    """The folder or CSV file that `data.path` names; a built-in data set is created or fetched first.

    Raises:
        DataError: no such file (the hint suggests similar names), or a data set without files.
    """
    if not data.path:
        raise DataError(
            "data.path is empty: there are no images to use",
            "--data FOLDER with one folder per class, --data FILE.csv, or a built-in data set: "
            f"--data {' or '.join(NAMES)}",
        )
    if builtin := find_builtin(data):
        entry, data = builtin
        if entry.path is None:
            raise DataError(
                f"data.path = {entry.name}: these images are drawn when they are used, there are no files to read",
                "--data FOLDER, or --data FILE.csv",
            )
        return entry.path(data, seed)
    path = Path(data.path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.casefold() == ".csv"):
        return path
    if path.exists():
        raise DataError(
            f"data.path = {show(path)} is neither a folder nor a .csv file", "--data FOLDER, or --data FILE.csv"
        )
    hint = f"--data FOLDER, --data FILE.csv, or one of the built-in data sets {', '.join(NAMES)}"
    if similar := _similar_names(path):
        hint = f"did you mean {' or '.join(similar)}? Otherwise {hint}"
    raise DataError(f"data.path = {data.path!r} does not exist", hint)


def absolute(data: recipe.Data) -> str:
    """`data.path` so that it names the same images from any folder; names of built-in data sets are kept."""
    builtin = find_builtin(data) if data.path else None
    path = builtin[1].path if builtin else data.path
    if not path:
        return data.path
    full = str(Path(path).expanduser().absolute())
    return f"{builtin[0].name}:{full}" if builtin else full


def _similar_names(path: Path) -> list[str]:
    """Names similar to the first missing part of the path: its existing neighbors and the built-in data sets."""
    missing = path
    while missing.parent != missing and not missing.parent.exists():
        missing = missing.parent
    try:
        neighbors = sorted((name for name in os.listdir(missing.parent) if not name.startswith(".")), reverse=True)
    except OSError:
        neighbors = []
    candidates = {name.casefold(): str(missing.parent / name) for name in neighbors}
    if len(path.parts) == 1:
        candidates |= {name: name for name in NAMES}
    matches = difflib.get_close_matches(missing.name.casefold(), candidates, n=3, cutoff=0.6)
    return [show(candidates[match]) for match in matches]
