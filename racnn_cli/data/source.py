"""Where a run's images come from: files on a disk, unless a caller brings something of the same form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from racnn_cli import recipe
from racnn_cli.data.images import ImageDataset
from racnn_cli.data.index import Index


class DataSource(Protocol):
    """What training asks for: which images there are, and one split of them as tensors."""

    @property
    def index(self) -> Index: ...

    def dataset(self, split: str, side: int, *, augment: bool) -> ImageDataset:
        """The images of one split as squares of `side` pixels; varied, as for training, with `augment`."""
        ...


@dataclass(frozen=True)
class FileSource:
    """The images that a recipe's `data` names, as `build_index` listed them."""

    index: Index
    data: recipe.Data
    seed: int

    def dataset(self, split: str, side: int, *, augment: bool) -> ImageDataset:
        return ImageDataset(self.index.splits[split], self.data, side, seed=self.seed, augment=augment)
