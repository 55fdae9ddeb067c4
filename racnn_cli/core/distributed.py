"""Processes under torchrun: rank, process group, and the collective operations that the toolkit needs.

Gradients are averaged by DistributedDataParallel in `training/loop.py`, not here.
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
    """Rank of this process; rank 0 writes all files."""
    return int(os.environ.get("RANK", "0"))


def restarted() -> bool:
    """Whether torchrun restarted these processes after one of them died."""
    return _starts() > 0


def _starts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start(device: torch.device) -> None:
    """Join the process group; a no-op for a single process."""
    if world() > 1 and not dist.is_initialized():
        local_device(device)  # NCCL uses the current GPU, so it is selected first
        store, process, processes = next(dist.rendezvous("env://"))
        # torchrun keeps its store across restarts: without a prefix, processes may read addresses of dead ones.
        store = dist.PrefixStore(f"start {_starts()}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=process, world_size=processes)
        # Without this, its threads can outlive the interpreter and abort the process.
        atexit.register(dist.destroy_process_group)


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process; under torchrun, each process has its own GPU."""
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def average_buffers(buffers: Iterable[Tensor]) -> None:
    """Average buffers (BatchNorm's statistics) over the processes, in place."""
    for values in buffers:
        if values.is_floating_point():
            total(values).div_(world())


def split_work(rows: list[Any], work: Callable[[list[Any]], dict[Any, Any]]) -> dict[Any, Any]:
    """Apply `work` to the rows, each process to its share, and return the merged results in every process."""
    results = {key: value for part in gather(work(rows[rank() :: world()])) for key, value in part.items()}
    return {row: results[row] for row in rows if row in results}  # in the order of the rows


def mean(value: Tensor) -> float:
    """Return the mean of a scalar over the processes."""
    return (total(value.clone()) / world()).item()


def total(values: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Return the value of rank 0 in every process."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Collect a picklable value (tensors on the CPU) from every process, ordered by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """Return each flag: True in every process if it is True in any."""
    if world() == 1:
        return flags
    return [bool(count) for count in total(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()]


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()
