"""Several processes under torchrun: rank, start, and the few collective operations that the toolkit needs.

Gradients are not averaged here: DistributedDataParallel does that around what a stage trains (`training/loop.py`).
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0; process 0 is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def restarted() -> bool:
    """Whether torchrun has started these processes again after one of them died."""
    return _starts() > 0


def _starts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start(device: torch.device) -> None:
    """Join the other processes that torchrun started; nothing to do when there are none."""
    if world() > 1 and not dist.is_initialized():
        local_device(device)  # NCCL speaks through the current GPU, so it is chosen first
        store, number, processes = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it starts the processes again: without a prefix they may read there
        # where those that have died could be reached.
        store = dist.PrefixStore(f"start {_starts()}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=processes)
        # Left to the interpreter's end, its threads can outlive what they use and abort the process.
        atexit.register(dist.destroy_process_group)


def local_device(device: torch.device) -> torch.device:
    """The device of this process: on a machine with several GPUs, its own."""
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def average_buffers(buffers: Iterable[Tensor]) -> None:
    """Replace each buffer (BatchNorm's statistics) by its mean over the processes, as each saw other images."""
    if world() == 1:
        return
    for values in buffers:
        if values.is_floating_point():
            dist.all_reduce(values)
            values /= world()


def split_work(rows: list[Any], work: Callable[[list[Any]], dict[Any, Any]]) -> dict[Any, Any]:
    """What `work` finds in the rows, each process working on its share of them."""
    if world() == 1:
        return work(rows)
    found: list[dict[Any, Any]] = [{}] * world()
    dist.all_gather_object(found, work(rows[rank() :: world()]))
    every = {key: value for part in found for key, value in part.items()}
    return {row: every[row] for row in rows if row in every}  # in one order, whoever found it


def mean(value: Tensor) -> float:
    """The mean of a scalar over the processes, as a number in each of them."""
    return (total(value.clone()) / world()).item()


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Process 0's value (primitives), in every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values (anything that pickles, tensors on the CPU) of all processes, in the order of their ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag: true in every process if it is true in one."""
    if world() == 1:
        return flags
    return [bool(count) for count in total(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()]


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()
