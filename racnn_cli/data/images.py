"""The images of a split as tensors, augmented for training or not, and batches of them."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from racnn_cli import recipe
from racnn_cli.data.color import as_range
from racnn_cli.data.decode import decode
from racnn_cli.data.geometry import Rect, upright_box
from racnn_cli.data.square import load_source
from racnn_cli.data.types import Index, Item
from racnn_cli.errors import DataError, RunError

Key = tuple[int, int]
"""Epoch and position: which augmentation of which image."""


class ImageDataset(Dataset[dict[str, torch.Tensor]]):
    """The images of one split.

    Args:
        items: of the split.
        data: the recipe's `data`.
        side: of the square source in pixels.
        seed: of the augmentation.
        augment: True for training: augment each image as set in `data.augment`.
    """

    def __init__(self, items: Sequence[Item], data: recipe.Data, side: int, *, seed: int, augment: bool) -> None:
        self.items, self.data, self.side, self.seed = list(items), data, side, seed
        self._range = as_range(data.range)
        self._augmentation = None
        if augment:
            from racnn_cli.data.transforms import Augmentation  # slow to import, and only training needs it

            self._augmentation = Augmentation(data, side)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        """Load one image; a pure function of (seed, epoch, position).

        Returns:
            `image` (3, side, side) uint8; `label` () int64; `index` () int64, the position; `box` (4,) float32, the
            ground-truth box x0, y0, x1, y1 in [0, 1] of the source. The box is NaN if the image has none or if it lies
            outside the source. It is augmented with the image.

        Raises:
            DataError: the file can no longer be read.
        """
        epoch, position = key
        item = self.items[position]
        image, box = self.load(item, epoch=epoch, position=position)
        return {
            "image": image,
            "label": torch.tensor(item.label),
            "box": torch.tensor(box, dtype=torch.float32),
            "index": torch.tensor(position),
        }

    def load(self, item: Item, *, epoch: int, position: int) -> tuple[torch.Tensor, Rect]:
        """Load one image as (3, side, side) uint8, and its box, NaN if unknown."""
        box = (math.nan,) * 4
        seen = None
        if self._augmentation is not None:
            stored = decode(item.path, min_side=2 * self.side, value_range=self._range)
            pixels, placement = self._augmentation(stored, seed=self.seed, epoch=epoch, position=position)
            if item.box is not None:
                seen = placement.apply(upright_box(item.box, stored.stored_size, stored.orientation))
        else:
            pixels, geometry = load_source(item.path, self.data.fit, self.side, self._range)
            if item.box is not None:
                seen = geometry.from_file(item.box)
        if seen is not None and seen[2] > seen[0] and seen[3] > seen[1]:
            box = seen
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), box

    def __getitems__(self, keys: list[Key]) -> dict[str, torch.Tensor] | DataError:
        """Load a batch. An error is returned, because raised in a worker it would be wrapped in a traceback."""
        try:
            samples = [self[key] for key in keys]
        except DataError as error:
            return error
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class DataSource(Protocol):
    """A data set, split and ready to load."""

    @property
    def index(self) -> Index:
        """Its images with their classes and splits."""

    def dataset(self, split: str, side: int, *, augment: bool) -> ImageDataset:
        """The images of one split as squares of `side` pixels; `augment` for training."""


def count_steps(count: int, *, batch: int, world: int) -> int:
    """The number of training steps in an epoch of `count` images, as `plan` cuts it.

    Every step but the last has `batch * world` images, over all processes; the last has the remaining ones.
    """
    size = batch * world
    steps = math.ceil(count / size)
    joined = batch > 1 and steps > 1 and count - (steps - 1) * size < 2 * world
    return steps - joined


def step_after(seen: int, count: int, *, batch: int, world: int) -> int | None:
    """The number of training steps that the first `seen` of an epoch's `count` images take; None if none ends there."""
    steps = count_steps(count, batch=batch, world=world)
    step, rest = divmod(seen, batch * world)
    if seen == count:
        return steps
    return step if not rest and step < steps else None


def plan(
    count: int, *, batch: int, epoch: int, seed: int, shuffle: bool, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """List the positions that one process loads in each step of an epoch; a pure function of the arguments.

    The `count` positions are cut into global batches of `batch * world`; each process takes its strided share of
    every global batch. With `shuffle` all processes have the same number of steps: a last global batch that would give
    a process a single image, over which BatchNorm cannot compute statistics, joins the batch before it (unless `batch`
    is 1), so that the last step has up to 2 * world - 1 images more. A single global batch with fewer images than
    processes is padded from the start of the order. Without `shuffle` every image is loaded exactly once across all
    processes, and a process may have one step fewer than another.
    """
    order = np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)
    size = batch * world
    steps = count_steps(count, batch=batch, world=world) if shuffle else math.ceil(count / size)
    chunks = [order[step * size : (step + 1) * size if step + 1 < steps else count] for step in range(steps)]
    if shuffle and chunks and len(chunks[-1]) < world:
        chunks[-1] = np.concatenate([chunks[-1], np.resize(order, world - len(chunks[-1]))])
    return [share for chunk in chunks if (share := chunk[rank::world].tolist())]


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
    pin_memory: bool = False,
) -> DataLoader[dict[str, torch.Tensor]]:
    """Create a loader for one epoch of a split, in the order of `plan`.

    Args:
        images: the split.
        batch: images per step on each process.
        epoch: counts from 0; selects the order (with `shuffle`) and the augmentation.
        seed: of the order.
        shuffle: True for training.
        workers: worker processes that load images; 0 loads in this process. Does not change what is loaded.
        skip: leave out the first `skip` batches, which this epoch has seen already.
        rank: of this process.
        world: number of processes.
        pin_memory: copy batches to pinned memory, for a GPU.

    Returns:
        A loader of stacked `ImageDataset` samples: `image` (B, 3, side, side) uint8, `label` (B,), `box` (B, 4),
        `index` (B,). Its length is the number of remaining batches.

    Raises:
        DataError: during iteration, if a file can no longer be read.
        RunError: during iteration, if a worker process dies.
    """
    steps = plan(len(images), batch=batch, epoch=epoch, seed=seed, shuffle=shuffle, rank=rank, world=world)
    return _Loader(
        images,
        batch_sampler=[[(epoch, position) for position in step] for step in steps[skip:]],
        num_workers=workers if len(steps) > skip else 0,
        collate_fn=identity_collate,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator().manual_seed(0),  # otherwise the loader draws from the global generator
        pin_memory=pin_memory,
    )


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise _worker_error(str(error), self.num_workers) from None


def _worker_error(text: str, workers: int) -> RunError:
    """Translate torch's error about a dead worker process."""
    resume = "then `racnn train --resume` continues from the last checkpoint"
    if "shared memory" in text or "</torch_" in text:
        return RunError(
            f"the {workers} processes that load images (data.workers) ran out of shared memory",
            f"a larger /dev/shm (in a container: --shm-size), or --set data.workers=0; {resume}",
            failure=True,
        )
    reason = text[text.index("DataLoader worker") :].partition("\n")[0]
    return RunError(
        f"one of the {workers} processes that load images (data.workers) died: {reason}",
        f"if the machine ran out of memory, --set data.workers={workers // 2}; {resume}",
        failure=True,
    )


def identity_collate(batch: Any) -> Any:
    return batch


def _start_worker(_number: int) -> None:
    # Ctrl-C and schedulers signal the whole process group; training still reads from this worker until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    if opencv := sys.modules.get("cv2"):
        opencv.setNumThreads(0)  # a forked thread pool would deadlock
