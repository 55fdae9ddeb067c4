"""`clutter`: one photograph of a garment somewhere on a large canvas, among fragments of others.

From a distance every class looks the same; what distinguishes them is visible only when the item is enlarged.
The item's position is known, so attention can be measured. Items are those of Fashion-MNIST (Xiao, Rasul,
Vollgraf, 2017), 28×28 px in gray; training and test items are those of the data set's own split.

The lengths below are shares of the canvas' side. If the first view is a fifth of the canvas' size, an item has
4 to 6 px there. At d times the distance (`data.sample.distance`) the canvas holds d² times the fragments. These
values were fixed before any training procedure was chosen; docs/notes.md says what true boxes are worth here.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch

from racnn_cli import recipe
from racnn_cli.data.geometry import Rect
from racnn_cli.data.images import ImageDataset
from racnn_cli.data.types import SPLITS, Index, Item
from racnn_cli.errors import DataError

CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
ITEM = (20 / 160, 33 / 160)  # side of the item: minimum, and upper limit (exclusive)
FRAGMENT = 7 / 160
FRAGMENTS = 40
CANVAS = 160  # px, the side of an image
INK = 12  # gray values above this belong to the item, the rest of its square is transparent
FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist installs the four IDX files."""
PARTS = {"train": "train", "val": "train", "test": "t10k"}
"""The part of Fashion-MNIST that each split's items come from."""


@dataclass(frozen=True)
class Clutter:
    """A `DataSource` that draws its images when they are used.

    Args:
        folder: of the IDX files, gzipped or not.
        images: number of images, all splits together; `data.val` and `data.test` are shares of it.
        data: the recipe's `data`.
        seed: of the choice of items and of the drawing.

    Raises:
        DataError: the files are missing or damaged.
    """

    folder: Path
    images: int
    data: recipe.Data
    seed: int

    @cached_property
    def index(self) -> Index:
        """The items of each split; `path` is PART/NUMBER, which is not a file."""
        data, splits = self.data, {}
        shares = {"train": 1 - data.val - data.test, "val": data.val, "test": data.test}
        counts = {split: round(self.images * share) for split, share in shares.items()}
        for split, part in PARTS.items():
            labels = read_items(self.folder, part)[1]
            start, count = counts["train"] if split == "val" else 0, counts[split]
            if start + count > len(labels):
                raise DataError(
                    f"{self.folder} has {len(labels)} {part} items, {start + count} are needed",
                    "fewer images (data.sample.images)",
                )
            order = np.random.default_rng((self.seed, len(labels))).permutation(len(labels))
            splits[split] = [Item(Path(part) / str(n), int(labels[n]), None) for n in order[start : start + count]]
        names = "\0".join(f"{split}/{item.path}" for split, items in splits.items() for item in items)
        fingerprint = hashlib.sha256(names.encode()).hexdigest()
        return Index(classes=list(CLASSES), splits=splits, skipped=[], notes=[], fingerprint=fingerprint)

    def dataset(self, split: str, side: int, *, augment: bool) -> Composites:
        """Return the images of one split; with `augment` every epoch draws new ones from the same items."""
        return Composites(self, split, side, redraw=augment)


class Composites(ImageDataset):
    """One split of `clutter`; ground-truth boxes are known for every image, also during training.

    Args:
        source: what to draw.
        split: train, val or test.
        side: of an image in pixels.
        redraw: True to draw a new image in every epoch.
    """

    def __init__(self, source: Clutter, split: str, side: int, *, redraw: bool) -> None:
        super().__init__(source.index.splits[split], source.data, side, seed=source.seed, augment=False)
        self.redraw, self.stream = redraw, SPLITS.index(split)
        self.photographs = read_items(source.folder, PARTS[split])[0]  # (N, 28, 28)

    def load(self, item: Item, *, epoch: int, position: int) -> tuple[torch.Tensor, Rect]:
        """Draw one image, a pure function of (seed, split, epoch, position); see `ImageDataset.load`."""
        rng = np.random.default_rng((self.seed, self.stream, epoch if self.redraw else 0, position))
        number, distance = int(item.path.name), self.data.sample.distance
        canvas, box = compose(self.photographs, number, rng, side=self.side, distance=distance)
        return torch.from_numpy(canvas).expand(3, -1, -1), box


def compose(
    photographs: np.ndarray, number: int, rng: np.random.Generator, *, side: int, distance: int = 1
) -> tuple[np.ndarray, Rect]:
    """Draw one image.

    Args:
        photographs: (N, 28, 28) uint8, which fragments are cut from.
        number: of the item.
        rng: chooses the item's position and size, and the clutter.
        side: of the canvas in pixels.
        distance: item and fragments are this many times smaller, and there are distance² times the fragments.

    Returns:
        (side, side) uint8, and the item's box x0, y0, x1, y1 in [0, 1].
    """
    canvas = np.zeros((side, side), np.uint8)
    scaled, count = side / distance, FRAGMENTS * distance**2
    cut, drawn = max(round(FRAGMENT * CANVAS), 1), max(round(FRAGMENT * scaled), 1)  # px of a fragment
    numbers = rng.integers(len(photographs), size=count)
    corners = rng.integers(photographs.shape[1] - cut + 1, size=(count, 2)).tolist()
    positions = rng.integers(side - drawn + 1, size=(count, 2)).tolist()
    for fragment, (row, column), (y, x) in zip(numbers, corners, positions, strict=True):
        pixels = photographs[fragment, row : row + cut, column : column + cut]
        canvas[y : y + drawn, x : x + drawn] = resize(pixels, drawn)
    size = int(rng.integers(round(ITEM[0] * scaled), round(ITEM[1] * scaled)))
    y, x = (int(offset) for offset in rng.integers(side - size + 1, size=2))
    item = resize(photographs[number], size)
    np.copyto(canvas[y : y + size, x : x + size], item, where=item > INK)
    return canvas, (x / side, y / side, (x + size) / side, (y + size) / side)


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resize (H, H) uint8 to (side, side): by area to a smaller side, bilinearly to a larger one."""
    interpolation = cv2.INTER_AREA if side < image.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(image, (side, side), interpolation=interpolation)


@lru_cache(maxsize=4)
def read_items(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the photographs (N, 28, 28) and labels (N,) of one part, `train` or `t10k`, uint8.

    Raises:
        DataError: a file is missing or is not an IDX file of bytes.
    """
    photographs = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(photographs) != len(labels):
        raise DataError(
            f"{folder} has {len(photographs)} {part} photographs and {len(labels)} labels",
            "four files of the same data set",
        )
    return photographs, labels


def _read_idx(folder: Path, name: str, axes: int) -> np.ndarray:
    hint = (
        f"install Debian's package dataset-fashion-mnist, whose files are in {FOLDER}, or name the folder of "
        "the four Fashion-MNIST files: --data clutter:FOLDER (for a bench, --data FOLDER)"
    )
    for file in (folder / f"{name}.gz", folder / name):
        try:
            raw = file.read_bytes()
            raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        except FileNotFoundError:
            continue
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file} cannot be read: {error}", hint) from None
        # Two zero bytes, 8 for unsigned bytes, the number of axes, then each length in four bytes.
        shape = [int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
        if raw[:4] != bytes((0, 0, 8, axes)) or len(raw) != 4 + 4 * axes + math.prod(shape):
            raise DataError(f"{file} is not an IDX file of {axes}-dimensional byte data", hint)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    raise DataError(f"{folder} has neither {name}.gz nor {name}", hint)
