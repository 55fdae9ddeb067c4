"""Images to check, calibrate and measure exported files with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from racnn_cli.data.color import as_range
from racnn_cli.data.images import DataSource, ImageDataset
from racnn_cli.data.source import open_source
from racnn_cli.data.square import load_source
from racnn_cli.errors import DataError
from racnn_cli.export.graph import ExportOptions
from racnn_cli.export.onnx_network import as_input
from racnn_cli.run import Run

BATCH = 8


class LabelledImages(NamedTuple):
    """Square images with their classes."""

    squares: np.ndarray  # (n, H, H, 3) uint8
    labels: np.ndarray  # (n,)
    split: str = "val"


def labelled_images(run: Run, split: str, side: int, limit: int | None = None) -> LabelledImages:
    """Read the images of a split.

    Args:
        run: whose data to read.
        split: its name.
        side: of the squares, in pixels.
        limit: read at most this many images, spread evenly over the split.
    """
    dataset = _open(run).dataset(split, side, augment=False)
    positions = range(0, len(dataset), math.ceil(len(dataset) / (limit or len(dataset))))
    labels = [dataset.items[position].label for position in positions]
    return LabelledImages(_squares(dataset, positions), np.array(labels), split)


def held_out_images(run: Run, side: int) -> LabelledImages | None:
    """Read the test images, on which nothing was chosen; None if the run's data have none."""
    return labelled_images(run, "test", side) if _open(run).index.splits["test"] else None


def _open(run: Run) -> DataSource:
    recipe = run.recipe()
    return open_source(recipe.data, seed=recipe.seed, classes=run.classes(), verify=())


def _squares(dataset: ImageDataset, positions: Iterable[int]) -> np.ndarray:
    """Images of a data set that is not augmented, (n, H, H, 3) uint8."""
    return np.stack([dataset[0, position]["image"].permute(1, 2, 0).numpy() for position in positions])


def input_batches(squares: np.ndarray, options: ExportOptions) -> Iterator[np.ndarray]:
    """Yield square images (n, H, H, 3) uint8 in small batches, as the graph takes them."""
    for start in range(0, len(squares), BATCH):
        yield as_input(squares[start : start + BATCH], raw=options.raw)


class CheckImages:
    """The images that an exported file is checked on.

    Args:
        run: the run that was exported.
        side: of the squares that the network was trained on, in pixels.
        files: images to use; None: the run's validation split, or noise if that is missing.

    Attributes:
        source: description of where the images come from.
    """

    def __init__(self, run: Run, side: int, *, files: list[Path] | None = None) -> None:
        self.data, self.side, self.files = run.recipe().data, side, files
        self.source = "images of the folder" if files else "noise"
        self._validation: DataSource | None = None
        if files is None:
            with contextlib.suppress(DataError):
                self._validation = _open(run)
                self.source = "validation images"

    def squares(self, count: int, side: int) -> np.ndarray:
        """(count, side, side, 3) uint8; repeats the images if there are fewer than `count`."""
        if self._validation is not None:
            dataset = self._validation.dataset("val", side, augment=False)
            return _squares(dataset, (number % len(dataset) for number in range(count)))
        if not self.files:
            return np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        squares = [load_source(file, self.data.fit, side, as_range(self.data.range))[0] for file in self.files[:count]]
        return np.stack([squares[number % len(squares)] for number in range(count)])
