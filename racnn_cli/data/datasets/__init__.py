"""The built-in data sets, by name. To add one: a file in this folder, and an entry in `REGISTRY`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from racnn_cli import recipe
from racnn_cli.errors import DataError

if TYPE_CHECKING:
    from racnn_cli.data.datasets.files import Record
    from racnn_cli.data.images import DataSource


@dataclass(frozen=True)
class BuiltinDataset:
    """A built-in data set. Its images come from files (`path`) or are drawn when they are used (`open`).

    Both functions take the recipe's `data` and the seed. Where the recipe has `data.path = NAME:PATH`, they
    find PATH alone in `data.path`, otherwise an empty string.

    Attributes:
        name: what `data.path` says.
        about: one sentence.
        boxes: True if the images have ground-truth boxes.
        path: returns the folder or CSV file, which is created or fetched on first use.
        open: returns the source of the images; exactly one of `path` and `open` is given.
    """

    name: str
    about: str
    boxes: bool
    path: Callable[[recipe.Data, int], Path] | None = None
    open: Callable[[recipe.Data, int], DataSource] | None = None


# The data sets are imported on first use: their imports are slow, and a list of names does not need them.
def _locate_plankton(data: recipe.Data, seed: int) -> Path:
    from racnn_cli.data.datasets import plankton

    return plankton.locate()


def _locate_fieldguide(data: recipe.Data, seed: int) -> Path:
    from racnn_cli.data.datasets import fieldguide

    return fieldguide.locate(data.sample, seed)


def _open_clutter(data: recipe.Data, seed: int) -> DataSource:
    from racnn_cli.data.datasets.clutter import FOLDER, Clutter

    return Clutter(Path(data.path or FOLDER).expanduser(), data.sample.images, data=data, seed=seed)


_ENTRIES = (
    BuiltinDataset("plankton", "105 microscope photographs of six classes.", boxes=False, path=_locate_plankton),
    BuiltinDataset("fieldguide", "Drawn birds, one small part tells the class.", boxes=True, path=_locate_fieldguide),
    BuiltinDataset("clutter", "A Fashion-MNIST item among fragments of others.", boxes=True, open=_open_clutter),
)
REGISTRY = {entry.name: entry for entry in _ENTRIES}
NAMES = tuple(REGISTRY)


def write(name: str, out: Path, sample: recipe.Sample, seed: int) -> Path:
    """Write a built-in data set to a folder, to look at it or to train on it like on any other data.

    Args:
        name: NAME or NAME:PATH, as in `data.path`.
        out: the folder to write, new or empty.
        sample: number and side of the images, for the drawn data sets.
        seed: of the drawn images.

    Returns:
        `out` if it has one folder per class, otherwise its CSV file.

    Raises:
        DataError: no such data set, `out` is not empty, or the images cannot be fetched, read or written.
    """
    key, _, path = name.partition(":")
    if key not in REGISTRY:
        raise DataError(f"there is no built-in data set {key!r}", f"one of {', '.join(NAMES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; nothing was overwritten", "another --out")
    entry, data = REGISTRY[key], recipe.Data(path=path, sample=sample)
    try:
        if entry.path is None:
            from racnn_cli.data.datasets import files

            return files.save(out, _records(entry, data, seed))
        source = entry.path(data, seed)
        shutil.copytree(source if source.is_dir() else source.parent, out, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise DataError(f"{out} could not be written: {error}", "another --out", failure=True) from error
    return out if source.is_dir() else out / source.name


def _records(entry: BuiltinDataset, data: recipe.Data, seed: int) -> Iterator[Record]:
    assert entry.open is not None
    source, side = entry.open(data, seed), data.sample.size
    for split in source.index.splits:
        images = source.dataset(split, side, augment=False)
        for position in range(len(images)):
            sample = images[0, position]
            label = source.index.classes[int(sample["label"])]
            pixels = sample["image"].permute(1, 2, 0).numpy()
            x0, y0, x1, y1 = (sample["box"] * side).tolist()
            yield split, label, f"{position:05d}.png", pixels, (x0, y0, x1 - x0, y1 - y0)
