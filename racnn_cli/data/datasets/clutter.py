"""The set `clutter`: one photograph of a garment somewhere on a large canvas, among fragments of others.

Every class looks the same from afar; what tells two apart shows only when the item is enlarged, and where it
is, is known: so attention can be measured. Items are those of Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017),
28×28 px in grey; train and test items are the data set's own.

The lengths below are shares of the canvas' side. With a first view of a fifth of the canvas an item is 4 to 6 px
there. Seen from d times farther away (`data.sample.distance`) the canvas holds d² times the fragments. (Frozen
before any training procedure was chosen; `recipes/NOTES.md` has what true boxes are worth here.)
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
from racnn_cli.data.images import ImageDataset, Key
from racnn_cli.data.index import Index, Item
from racnn_cli.errors import RacnnError

CLASSES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
ITEM = (20 / 160, 33 / 160)  # side of the item: at least, and less than
FRAGMENT = 7 / 160
FRAGMENTS = 40
CANVAS = 160  # px, the side of an image
INK = 12  # grey values above this belong to the item, the rest of its square is see-through
FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts the four IDX files."""
FILES = {"train": "train", "val": "train", "test": "t10k"}
SEEDS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Clutter:
    """Where the bench's images come from, in the form that a `Trainer` takes.

    Args:
        folder: of the IDX files, gzipped or not.
        images: number of images of the splits together, see `data.val` and `data.test`.
        data: the recipe's `data`.
        seed: of the choice of items and of all that is drawn.

    Raises:
        RacnnError: the files are missing or damaged.
    """

    folder: Path
    images: int
    data: recipe.Data
    seed: int

    @cached_property
    def index(self) -> Index:
        """Which item is in which split, as `build_index` would give it for files."""
        counts = {name: round(self.images * share) for name, share in self._shares().items()}
        items: dict[str, list[Item]] = {}
        for split, count in counts.items():
            labels = read_items(self.folder, FILES[split])[1]
            order = np.random.default_rng((self.seed, len(labels))).permutation(len(labels))
            start = counts["train"] if split == "val" else 0
            if start + count > len(labels):
                raise RacnnError(
                    f"{self.folder} has {len(labels)} {FILES[split]} items, {start + count} were asked for",
                    "fewer images",
                )
            items[split] = [
                Item(Path(FILES[split]) / str(n), int(labels[n]), None) for n in order[start : start + count]
            ]
        named = "\0".join(f"{split}/{item.path}" for split, members in items.items() for item in members)
        return Index(list(CLASSES), items, [], [], hashlib.sha256(named.encode()).hexdigest())

    def _shares(self) -> dict[str, float]:
        data = self.data
        return {"train": 1 - data.val - data.test, "val": data.val, "test": data.test}

    def dataset(self, split: str, side: int, *, augment: bool) -> Composites:
        """The images of one split; with `augment` every epoch draws new ones from the same items."""
        return Composites(self, split, side, fresh=augment)


class Composites(ImageDataset):
    """One split of `clutter`; boxes are known for every image, also while training."""

    def __init__(self, source: Clutter, split: str, side: int, *, fresh: bool) -> None:
        super().__init__(source.index.splits[split], source.data, side, seed=source.seed, augment=False)
        self.fresh, self.stream = fresh, SEEDS[split]
        self.photographs = read_items(source.folder, FILES[split])[0]  # (N, 28, 28)

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        """One image, a pure function of (seed, split, epoch, position); as `ImageDataset.__getitem__`, with its box."""
        epoch, position = key
        item = self.items[position]
        rng = np.random.default_rng((self.seed, self.stream, epoch if self.fresh else 0, position))
        number, distance = int(item.path.name), self.data.sample.distance
        canvas, box = compose(self.photographs, number, rng, self.side, distance)
        return {
            "image": torch.from_numpy(canvas).expand(3, -1, -1),
            "label": torch.tensor(item.label),
            "box": torch.tensor(box, dtype=torch.float32),
            "index": torch.tensor(position),
        }


def compose(
    photographs: np.ndarray, number: int, rng: np.random.Generator, canvas: int, distance: int = 1
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """One image.

    Args:
        photographs: (N, 28, 28) uint8, of which fragments are taken.
        number: of the item.
        rng: where it lies, how large it is, and the clutter.
        canvas: side in pixels.
        distance: makes item and fragments so many times smaller, and the fragments more.

    Returns:
        (canvas, canvas) uint8, and the item's box x0, y0, x1, y1 in [0, 1].
    """
    image = np.zeros((canvas, canvas), np.uint8)
    native = photographs.shape[1]
    near, count = canvas / distance, FRAGMENTS * distance**2
    piece, small = max(round(FRAGMENT * CANVAS), 1), max(round(FRAGMENT * near), 1)
    whose = rng.integers(len(photographs), size=count)
    parts = rng.integers(native - piece + 1, size=(count, 2)).tolist()
    places = rng.integers(canvas - small + 1, size=(count, 2)).tolist()
    for who, (row, column), (y, x) in zip(whose, parts, places, strict=True):
        fragment = photographs[who, row : row + piece, column : column + piece]
        image[y : y + small, x : x + small] = resize(fragment, small)
    side = int(rng.integers(round(ITEM[0] * near), round(ITEM[1] * near)))
    y, x = (int(place) for place in rng.integers(canvas - side + 1, size=2))
    item = resize(photographs[number], side)
    np.copyto(image[y : y + side, x : x + side], item, where=item > INK)
    return image, (x / canvas, y / canvas, (x + side) / canvas, (y + side) / canvas)


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """(H, H) uint8 to (side, side): area where it shrinks, bilinear where it grows."""
    if image.shape[0] == side:
        return image
    how = cv2.INTER_AREA if side < image.shape[0] else cv2.INTER_LINEAR
    return cv2.resize(image, (side, side), interpolation=how)


@lru_cache(maxsize=4)
def read_items(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The photographs (N, 28, 28) and labels (N,) of one part, `train` or `t10k`, uint8.

    Raises:
        RacnnError: a file is missing or is no IDX file of bytes.
    """
    photographs = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(photographs) != len(labels):
        raise RacnnError(
            f"{folder}: {len(photographs)} {part} photographs and {len(labels)} labels",
            "four files of one data set",
        )
    return photographs, labels


def _read_idx(folder: Path, name: str, axes: int) -> np.ndarray:
    hint = (
        f"install Debian's package dataset-fashion-mnist, which puts them in {FOLDER}, "
        "or name the folder of the four Fashion-MNIST files with --data"
    )
    for file in (folder / f"{name}.gz", folder / name):
        try:
            raw = file.read_bytes()
            raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        except FileNotFoundError:
            continue
        except (OSError, EOFError, zlib.error) as error:
            raise RacnnError(f"{file} cannot be read: {error}", hint) from None
        # Two zero bytes, 8 for unsigned bytes, the number of axes, then each length in four bytes.
        shape = [int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
        if raw[:4] != bytes((0, 0, 8, axes)) or len(raw) != 4 + 4 * axes + math.prod(shape):
            raise RacnnError(f"{file} is not an IDX file of {axes} axis/axes of bytes", hint)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    raise RacnnError(f"{folder} has no {name}.gz and no {name}", hint)
