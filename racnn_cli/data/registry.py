"""Temporary: the registry of built-in data sets, until `racnn_cli.data.datasets` has its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from racnn_cli import recipe
from racnn_cli.data import datasets
from racnn_cli.errors import DataError, RacnnError

if TYPE_CHECKING:
    from racnn_cli.data.source import DataSource


@dataclass(frozen=True)
class BuiltinDataset:
    name: str
    about: str
    boxes: bool
    path: Callable[[recipe.Data, int], Path] | None = None
    open: Callable[[recipe.Data, int], DataSource] | None = None


def _open_clutter(data: recipe.Data, seed: int) -> DataSource:
    from racnn_cli.data.datasets import clutter

    source = clutter.Clutter(Path(data.path or clutter.FOLDER), data.sample.images, data, seed)
    try:
        source.index  # noqa: B018  # missing files are reported here
    except RacnnError as error:
        raise DataError(error.message, error.hint) from None
    return source


def _materialise(name: str) -> Callable[[recipe.Data, int], Path]:
    return lambda data, seed: datasets.materialise(name, data.sample, seed)


REGISTRY = {
    "plankton": BuiltinDataset("plankton", "", False, path=_materialise("plankton")),
    "fieldguide": BuiltinDataset("fieldguide", "", True, path=_materialise("fieldguide")),
    "clutter": BuiltinDataset("clutter", "", True, open=_open_clutter),
}
