"""Several processes under torchrun: who am I, and how the processes agree.

Each process runs the same loop on its share of every global batch. After the backward passes of an update the
gradients of the moving parameters are averaged, which is what DistributedDataParallel computes; done by hand
because a stage propagates back once a scale and freezes half of the network.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in one message."""
    if world() == 1:
        return
    # A parameter without a gradient takes part with zeros: the other processes may have one.
    trained = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for parameter, part in zip(trained, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def share_buffers(modules: Iterable[nn.Module]) -> None:
    """Give every process the mean of the processes' buffers (BatchNorm statistics), as each saw other images."""
    if world() == 1:
        return
    for module in modules:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world()


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def from_first(value: Any) -> Any:
    """Process 0's value (primitives), in every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_process(flag: bool, device: torch.device) -> bool:
    """True in every process if it is true in one."""
    if world() == 1:
        return flag
    return bool(total(torch.tensor(float(flag), device=device)).item())


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()
