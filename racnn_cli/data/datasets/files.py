"""Write a data set to a folder: completely or not at all, images with their labels and boxes."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from racnn_cli import fetch
from racnn_cli.errors import DataError

Record = tuple[str, str, str, np.ndarray, tuple[float, ...]]
"""Split, class, file name, pixels (H, W, 3) uint8, and the box x, y, width, height in pixels."""


def cached(name: str, fill: Callable[[Path], object]) -> Path:
    """Return the cache's folder `name`; `fill` writes it if it does not exist.

    The folder appears completely or not at all, also if several processes write it at once.

    Raises:
        DataError: the cache cannot be written.
    """
    folder = fetch.cache() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.", ignore_cleanup_errors=True) as parent:
            temporary = Path(parent) / name
            temporary.mkdir()
            fill(temporary)
            os.rename(temporary, folder)
    except OSError as error:
        if folder.is_dir():  # another process was first, with the same content
            return folder
        raise DataError(
            f"{folder} could not be written: {error.strerror or error}",
            "free some space, or set the environment variable RACNN_CACHE to another folder",
            failure=True,
        ) from error
    return folder


def save(folder: Path, records: Iterable[Record]) -> Path:
    """Write `folder`/SPLIT/CLASS/FILE for each record, and `folder`/labels.csv at the end.

    Returns:
        The path of labels.csv: path (relative to it), label, split, and the box x, y, w, h in pixels.
    """
    rows = []
    for split, label, name, pixels, box in records:
        file = folder / split / label / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, compress_level=3)
        rows.append([file.relative_to(folder).as_posix(), label, split, *(f"{value:.2f}" for value in box)])
    table = folder / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "split", "x", "y", "w", "h"])
        writer.writerows(sorted(rows))
    return table
