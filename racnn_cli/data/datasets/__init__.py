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

    Both functions take the recipe's `data` and the seed. Where the recipe has `data.path = NAME:PATH`, `open` finds
    PATH alone in `data.path`, otherwise an empty string.

    Attributes:
        name: what `data.path` says.
        about: one sentence.
        path: returns the folder or CSV file, which is created or fetched on first use.
        open: returns the source of the images; exactly one of `path` and `open` is given.
    """

    name: str
    about: str
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
    BuiltinDataset("plankton", "105 microscope photographs of six classes.", path=_locate_plankton),
    BuiltinDataset("fieldguide", "Drawn birds, one small part tells the class.", path=_locate_fieldguide),
    BuiltinDataset("clutter", "A Fashion-MNIST item among fragments of others.", open=_open_clutter),
)
REGISTRY = {entry.name: entry for entry in _ENTRIES}
NAMES = tuple(REGISTRY)


def find_builtin(data: recipe.Data) -> tuple[BuiltinDataset, recipe.Data] | None:
    """The built-in data set that `data.path` = NAME or NAME:PATH names, if any.

    Returns:
        The registry's entry, and `data` with PATH (or nothing) as its `path`, which the entry interprets.

    Raises:
        DataError: a PATH for a data set that takes none.
    """
    name, _, path = data.path.partition(":")
    if name not in REGISTRY:
        return None
    entry = REGISTRY[name]
    if path and entry.open is None:
        raise DataError(f"the built-in data set {name} takes no path (found {data.path!r})", f"write {name} alone")
    return entry, data.model_copy(update={"path": path})


def write(name: str, out: Path, sample: recipe.Sample, seed: int) -> Path:
    """Write a built-in data set to a folder, to view it or to train on it like on any other data.

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
    builtin = find_builtin(recipe.Data(path=name, sample=sample))
    if builtin is None:
        raise DataError(f"there is no built-in data set {name.partition(':')[0]!r}", f"one of {', '.join(NAMES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; nothing was overwritten", "another --out")
    entry, data = builtin
    try:
        if entry.open is not None:
            from racnn_cli.data.datasets import files

            return files.save(out, _records(entry.open(data, seed), sample.size))
        assert entry.path is not None
        source = entry.path(data, seed)
        shutil.copytree(source if source.is_dir() else source.parent, out, dirs_exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} could not be written: {error}", "another --out", failure=True) from error
    return out if source.is_dir() else out / source.name


def _records(source: DataSource, side: int) -> Iterator[Record]:
    for split in source.index.splits:
        images = source.dataset(split, side, augment=False)
        for position in range(len(images)):
            sample = images[0, position]
            label = source.index.classes[int(sample["label"])]
            pixels = sample["image"].permute(1, 2, 0).numpy()
            x0, y0, x1, y1 = (sample["box"] * side).tolist()
            yield split, label, f"{position:05d}.png", pixels, (x0, y0, x1 - x0, y1 - y0)
