"""Measure which share of a training step two processes spend on averaging their gradients.

    torchrun --standalone --nproc-per-node 2 tests/communication.py

It times steps of the CNN phase of a network with random weights, alternating between three methods: without
communication, with DistributedDataParallel as in training (buckets that overlap the backward pass), and with one flat
all-reduce after the backward pass, which copies every gradient twice. The share is
1 - (seconds without) / (seconds with), from the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from racnn_cli import recipe as recipes
from racnn_cli.core import distributed
from racnn_cli.core.model import build
from racnn_cli.training import phases
from racnn_cli.training.loop import freeze_all_but, set_training_mode


def flat_all_reduce(parameters: list[nn.Parameter]) -> None:
    """Average all gradients with a single all-reduce."""
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=128, help="side of every scale's view, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per process")
    parser.add_argument("--turns", type=int, default=15, help="steps to time per method")
    options = parser.parse_args()
    distributed.start(torch.device("cpu"))
    torch.manual_seed(0)
    changes = {
        "model.backbone": options.backbone,
        "model.weights": "none",
        "model.sizes": [options.size] * 3,
        "data.source": 2 * options.size,
    }
    recipe = recipes.load("own", (), changes)
    model = build(recipe.model, 100, source=recipe.data.source)
    phase = phases.cnn_phase(recipe)
    modules = phase.modules(model)
    parameters = freeze_all_but(model, modules)
    set_training_mode(model, modules, freeze_batchnorm=False)
    wrapped = [DistributedDataParallel(module) for module in modules]
    for module in wrapped:
        module.broadcast_buffers = False  # as in training
    side = recipe.data.source
    batch = {
        "image": torch.rand(options.batch, 3, side, side),
        "label": torch.arange(options.batch),
        "key": torch.arange(options.batch) + 1000 * distributed.rank(),
    }

    def step(trained: list[nn.Module], *, average: bool) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _, loss in phase.losses(model, trained, batch):
            loss.backward()
        if average:
            flat_all_reduce(parameters)
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    methods = {
        "no communication": lambda: step(modules, average=False),
        "DistributedDataParallel": lambda: step(wrapped, average=False),
        "one flat all-reduce": lambda: step(modules, average=True),
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(options.turns + 1):
        for name, run_step in methods.items():
            seconds = run_step()
            if turn:  # the first turn warms up
                times[name].append(seconds)
    if distributed.rank() == 0:
        baseline = statistics.median(times["no communication"])
        count = sum(parameter.numel() for parameter in parameters)
        setting = f"{options.backbone}, 3 scales of {options.size} px, {options.batch} images per process"
        print(f"{setting}, {count:,} gradients")
        for name, seconds in times.items():
            median = statistics.median(seconds)
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            print(f"{name:24} {median:.2f} s per step ({spread}), communication {1 - baseline / median:.1%}")


if __name__ == "__main__":
    main()
