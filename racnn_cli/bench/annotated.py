"""FileSource whose true box is known for a varied training image too: only a bench trains with true boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from racnn_cli import recipe
from racnn_cli.data.decode import read_image
from racnn_cli.data.geometry import fit_square
from racnn_cli.data.images import ImageDataset, Key
from racnn_cli.data.index import Item
from racnn_cli.data.source import FileSource
from racnn_cli.data.square import load_source


@dataclass(frozen=True)
class AnnotatedFileSource(FileSource):
    """As `FileSource`, with `Annotated` images."""

    def dataset(self, split: str, side: int, *, augment: bool) -> Annotated:
        return Annotated(self.index.splits[split], self.data, side, seed=self.seed, augment=augment)


class Annotated(ImageDataset):
    """The true box goes the way of the image: what is varied with it is a mask, white where the box is.

    The box that comes out is upright, around a turned one; NaN where a random crop left nothing of it.
    """

    def __init__(self, *args: Any, augment: bool, **keys: Any) -> None:
        super().__init__(*args, augment=augment, **keys)
        self._move = None
        if augment:
            from racnn_cli.data.transforms import Augmentation

            self._move = Augmentation(without_colours(self.data), self.side)

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        found, item = super().__getitem__(key), self.items[key[1]]
        if self._move is not None and item.box is not None:
            moved = self._move(self._mask(item), seed=self.seed, epoch=key[0], position=key[1])
            found["box"] = torch.tensor(around(moved[:, :, 0] > 192), dtype=torch.float32)
        return found

    def _mask(self, item: Item) -> np.ndarray:
        """Black with a white box, where `ImageDataset` has the image that it varies: (H, W, 3) uint8."""
        assert item.box is not None
        share = math.sqrt(self.data.augment.scale)
        side = math.ceil(self.side / share)
        if share == 1.0 or self.data.fit != "crop":
            pixels, geometry = load_source(item.path, self.data.fit, side)
        else:
            image = read_image(item.path, min_side=side)
            pixels, geometry = (
                image.pixels,
                fit_square(image.stored_size, image.orientation, "squash", 0),
            )
        height, width = pixels.shape[:2]
        x0, y0, x1, y1 = geometry.from_file(item.box)
        mask = np.zeros_like(pixels)
        mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 255
        return mask


def without_colours(data: recipe.Data) -> recipe.Data:
    """The same variants but for their colours; what a rotation brings in is grey, not a mirror image of the box."""
    augment = data.augment.model_copy(update={"color": 0.0})
    return data.model_copy(update={"augment": augment, "fit": "pad"})


def around(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box x0, y0, x1, y1 in [0, 1] around what is True in (H, W); NaN where nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (math.nan,) * 4
    height, width = mask.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
