"""Images as tensors: the square source image or a variant of it for training, and batches of them."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from racnn_cli import recipe
from racnn_cli.data.decode import read_image
from racnn_cli.data.square import load_source
from racnn_cli.errors import RacnnError

if TYPE_CHECKING:
    from racnn_cli.data.index import Item

Key = tuple[int, int]
"""epoch and position: which variant of which image."""


class ImageDataset(Dataset[dict[str, torch.Tensor]]):
    """The images of one split.

    Args:
        items: of the split.
        data: the recipe's `data`.
        side: of the square source, in pixels.
        seed: of the variants.
        augment: True for training: an image is varied as `data.augment` says.
    """

    def __init__(
        self, items: Sequence[Item], data: recipe.Data, side: int, *, seed: int, augment: bool
    ) -> None:
        self.items, self.data, self.side, self.seed = list(items), data, side, seed
        self._vary = None
        if augment:
            from racnn_cli.data.transforms import Augmentation  # slow to import, and only training needs it

            self._vary = Augmentation(data, side)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        """One image, a pure function of (seed, epoch, position).

        Returns:
            `image` (3, side, side) uint8; `label` () int64; `index` () int64: the position; `box` (4,)
            float32: x0, y0, x1, y1 in source units, NaN where the data has none, where it lies outside the
            source, and for every varied image.

        Raises:
            RacnnError: the file cannot be read any more.
        """
        epoch, position = key
        item = self.items[position]
        box = (math.nan,) * 4
        if self._vary is not None:
            pixels = self._vary(self._whole(item.path), seed=self.seed, epoch=epoch, position=position)
        else:
            pixels, geometry = load_source(item.path, self.data.fit, self.side)
            if item.box is not None:
                x0, y0, x1, y1 = geometry.from_file(item.box)
                box = (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else box
        return {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),  # (3, side, side)
            "label": torch.tensor(item.label),
            "box": torch.tensor(box, dtype=torch.float32),
            "index": torch.tensor(position),
        }

    def __getitems__(self, keys: list[Key]) -> dict[str, torch.Tensor] | RacnnError:
        """A whole batch; a error travels as a value, because a worker would wrap it in a traceback."""
        try:
            samples = [self[key] for key in keys]
        except RacnnError as error:
            return error
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _whole(self, path: Path) -> np.ndarray:
        """What a random crop is cut from, a little larger than needed: (H, W, 3) uint8."""
        share = math.sqrt(self.data.augment.scale)
        if share == 1.0 or self.data.fit != "crop":
            return load_source(path, self.data.fit, math.ceil(self.side / share))[0]
        return read_image(path, least=math.ceil(self.side / share)).pixels


def plan(
    count: int,
    *,
    batch: int,
    epoch: int,
    seed: int,
    shuffle: bool,
    rank: int = 0,
    world: int = 1,
) -> list[list[int]]:
    """Which positions each step of an epoch sees on one process: a pure function of its arguments.

    The order of all `count` images is cut into global batches of `batch * world`; a process takes its
    strided share of each. With `shuffle` every process has the same number of steps: a last global batch with
    fewer images than processes is filled up from the start of the order, so that each has one. Without
    `shuffle` every image is seen exactly once over all processes, and a process may have one step fewer
    than another.
    """
    order = np.arange(count)
    if shuffle:
        order = np.random.default_rng((seed, epoch)).permutation(count)
    size = batch * world
    chunks = [order[start : start + size] for start in range(0, count, size)]
    if shuffle and chunks and len(chunks[-1]) < world:
        chunks[-1] = np.concatenate([chunks[-1], np.resize(order, world - len(chunks[-1]))])
    shares = [[int(position) for position in chunk[rank::world]] for chunk in chunks]
    return [share for share in shares if share]


def batches(
    images: ImageDataset,
    *,
    batch: int,
    epoch: int,
    seed: int,
    shuffle: bool,
    workers: int,
    skip: int = 0,
    rank: int = 0,
    world: int = 1,
    device_pin: bool = False,
) -> DataLoader[dict[str, torch.Tensor]]:
    """One epoch of a split, in the order that `plan` gives, without its first `skip` batches.

    Args:
        images: the split.
        batch: images a step on each process.
        epoch: counts from 0; names the order (with `shuffle`) and the variants.
        seed: of the order.
        shuffle: True for training.
        workers: processes that read; 0 reads in this one. Their number never changes what is read.
        skip: batches that this epoch has seen already.
        rank: of this process.
        world: number of processes.
        device_pin: put batches in page-locked memory, for a GPU.

    Returns:
        A loader of dicts as from `ImageDataset`, stacked: `image` (B, 3, side, side) uint8, `label` (B,),
        `box` (B, 4), `index` (B,). Its length is the number of batches left.

    Raises:
        RacnnError: while it is read, when a file cannot be read any more.
    """
    steps = plan(
        len(images),
        batch=batch,
        epoch=epoch,
        seed=seed,
        shuffle=shuffle,
        rank=rank,
        world=world,
    )
    return _Loader(
        images,
        batch_sampler=[[(epoch, position) for position in step] for step in steps[skip:]],
        num_workers=workers if len(steps) > skip else 0,
        collate_fn=identity_collate,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator().manual_seed(0),  # else the loader would draw from the global stream
        pin_memory=device_pin,
    )


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, RacnnError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise _worker_error(str(error), self.num_workers) from None


def _worker_error(text: str, workers: int) -> RacnnError:
    """What torch says of a process that reads images and died, as a person would."""
    again = "then `racnn train --resume` goes on from the last checkpoint"
    if "shared memory" in text or "</torch_" in text:
        return RacnnError(
            f"the {workers} processes that read images (data.workers) ran out of shared memory",
            f"a larger /dev/shm (of a container: --shm-size), or --set data.workers=0; {again}",
            failure=True,
        )
    said = re.search(r"DataLoader worker.*", text)
    return RacnnError(
        f"one of the {workers} processes that read images (data.workers) died: {said[0] if said else text}",
        f"if the machine ran out of memory, --set data.workers={workers // 2}; {again}",
        failure=True,
    )


def identity_collate(batch: Any) -> Any:
    return batch


def _start_worker(_number: int) -> None:
    # Ctrl-C and a scheduler signal the whole group of processes: this one is still read from until all is saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    info = get_worker_info()
    if info is not None and info.dataset._vary is not None:  # type: ignore[attr-defined]
        from racnn_cli.data.transforms import limit_threads

        limit_threads()
