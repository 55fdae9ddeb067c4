"""Several processes under torchrun: who am I, and how the processes agree.

Each process runs the same loop on its share of every global batch. After the backward passes of an update the
gradients of the moving parameters are averaged, which is what DistributedDataParallel computes; done by hand
because a stage propagates back once a scale and freezes half of the network.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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


def share(statistics: Iterable[Tensor]) -> None:
    """Give every process the mean of the processes' statistics (BatchNorm buffers), as each saw other images."""
    if world() == 1:
        return
    for values in statistics:
        if values.is_floating_point():
            dist.all_reduce(values)
            values /= world()


def shared_out(rows: list[Any], work: Callable[[list[Any]], dict[Any, Any]]) -> dict[Any, Any]:
    """What `work` finds in the rows, each process looking at its share of them."""
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


def from_first(value: Any) -> Any:
    """Process 0's value (primitives), in every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag: true in every process if it is true in one."""
    if world() == 1:
        return flags
    return [bool(count) for count in total(torch.tensor(flags, dtype=torch.float32, device=device)).tolist()]


@contextmanager
def batchnorm(*, synced: bool) -> Iterator[None]:
    """Within it, BatchNorm layers in training mode normalise over the pictures of all processes if `synced`."""
    if synced and world() > 1:
        with _SyncedBatchNorm():
            yield
    else:
        yield


class _SyncedBatchNorm(TorchFunctionMode):
    """Takes the place of `torch.nn.functional.batch_norm`, which every BatchNorm layer ends in, timm's own too.

    torch.nn.SyncBatchNorm computes the same and refuses to do so on a CPU.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        use = _batch_norm if func is F.batch_norm else func
        return use(*args, **(kwargs or {}))


def _batch_norm(
    images: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of (B, C, ...) with the mean and the variance over all processes."""
    if not training:
        return F.batch_norm(images, running_mean, running_var, weight, bias, False, momentum, eps)
    others = [dim for dim in range(images.ndim) if dim != 1]
    shape = [1, -1, *[1] * (images.ndim - 2)]
    values = images.float()
    count = total(values.new_tensor(float(values.numel() // values.shape[1])))
    average = _Sum.apply(values.sum(others)) / count
    centred = values - average.view(shape)
    variance = _Sum.apply(centred.square().sum(others)) / count
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(average.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    result = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        result = result * weight.view(shape)
    if bias is not None:
        result = result + bias.view(shape)
    return result.to(images.dtype)


class _Sum(torch.autograd.Function):
    """Sum over the processes. Each loss is that of one process, so a gradient is summed over them as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return total(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient.clone())


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()
