"""`racnn bench crop`: what the crop costs, against two other ways to cut, forward and backward.

Speeds on a shared machine drift, so the three take turns in one run and the figure is their ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from racnn_cli.bench import Figures, Options
from racnn_cli.core.attention import boxcar, zoom
from racnn_cli.core.device import select_device

BATCH, SOURCE, SIZE, K = 8, 448, 224, 0.5
TURNS = 15


def run(options: Options) -> Figures:
    """Time 3×448² → 224², batch 8; the gradient goes to the boxes."""
    return measure(BATCH, SOURCE, SIZE, TURNS)


def grid_sample(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The same square by affine_grid and grid_sample: no mask, no antialiasing."""
    zero = torch.zeros_like(boxes[:, 0])
    across = torch.stack([2 * boxes[:, 2], zero, 2 * boxes[:, 0] - 1], dim=1)
    down = torch.stack([zero, 2 * boxes[:, 2], 2 * boxes[:, 1] - 1], dim=1)
    shape = [len(images), images.shape[1], size, size]
    grid = F.affine_grid(torch.stack([across, down], dim=1), shape, align_corners=False)  # (B, s, s, 2)
    return F.grid_sample(images, grid, align_corners=False)


def one_by_one(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """A loop over the batch: mask, cut at whole pixels, enlarge. The gradient is that of the mask alone."""
    side, crops = images.shape[-1], []
    for image, box in zip(images, boxes, strict=True):
        across, down = (boxcar(box[axis : axis + 1], box[2:], side, K)[0] for axis in (0, 1))
        masked = image * (down[:, None] * across[None, :])
        x, y = ((box[:2] - box[2]) * side).floor().int().clamp_min(0).tolist()
        wide = max(round(2 * box[2].item() * side), 1)
        cut = masked[None, :, y : y + wide, x : x + wide]
        crops.append(F.interpolate(cut, (size, size), mode="bilinear", align_corners=False))
    return torch.cat(crops)


def measure(batch: int, source: int, size: int, turns: int) -> Figures:
    """Median seconds of each way over so many turns, and the median of the ratios within a turn."""
    device = select_device()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, source, source, generator=generator).to(device)
    values = torch.rand(batch, 3, generator=generator)
    half = 1 / 6 + (0.475 - 1 / 6) * values[:, 2:]  # sides between the bounds that recipes use
    boxes = torch.cat([half + (1 - 2 * half) * values[:, :2], half], dim=1).to(device)
    grown = torch.randn(batch, 3, size, size, generator=generator).to(device)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "zoom": lambda b: zoom(images, b, size, k=K, gradient="exact"),
        "affine_grid + grid_sample, no mask": lambda b: grid_sample(images, b, size),
        "a loop over the batch": lambda b: one_by_one(images, b, size),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name, way in ways.items():
            seconds = _once(way, boxes, grown, device)
            if turn >= 2:  # the first two warm caches and allocators up
                times[name].append(seconds)
    table = Table(
        title=f"Crop, forward and backward: batch {batch}, 3×{source}² to {size}²", title_justify="left"
    )
    for column in ("", "ms", "of zoom"):
        table.add_column(column, justify="right" if column else "left")
    ratios = {}
    for name, own in times.items():
        ratios[name] = statistics.median(a / b for a, b in zip(own, times["zoom"], strict=True))
        table.add_row(name, f"{1000 * statistics.median(own):.1f}", f"{ratios[name]:.2f} ×")
    table.caption = f"medians of {turns} alternating turns; the gradient goes to the boxes"
    table.caption_justify = "left"
    values_out = {
        "batch": batch,
        "source": source,
        "size": size,
        "turns": turns,
        "milliseconds": {name: 1000 * statistics.median(own) for name, own in times.items()},
        "ratio_to_zoom": ratios,
    }
    return Figures([table], values_out)


def _once(way: Callable[[Tensor], Tensor], boxes: Tensor, grown: Tensor, device: torch.device) -> float:
    moving = boxes.clone().requires_grad_()
    _wait(device)
    start = time.perf_counter()
    torch.autograd.grad(way(moving), moving, grown)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
