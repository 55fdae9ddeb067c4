"""How good the network is on held-out images, in the few figures that training looks at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from racnn_cli.core import metrics
from racnn_cli.core.losses import classification_loss, rank_loss
from racnn_cli.core.model import RACNN
from racnn_cli.training import distributed
from racnn_cli.training.stages import Guide

BOX = ("side", "square", "at_floor", "at_ceiling", "truth", "iou", "hit", "coverage", "x", "xx", "y", "yy")


class Sums:
    """Named sums over images, added up over batches and processes.

    Args:
        names: all of them, so that a process without a batch takes part with zeros.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.values = dict.fromkeys(["images", *names], 0.0)

    def add(self, name: str, value: Tensor | float) -> None:
        self.values[name] += float(value)

    def means(self, device: torch.device) -> dict[str, float]:
        """Every sum divided by the sum named `images`."""
        names = sorted(self.values)
        # MPS has no float64; counts of images are exact in float32 up to 16 million.
        kind = torch.float32 if device.type == "mps" else torch.float64
        totals = distributed.total(torch.tensor([self.values[n] for n in names], dtype=kind, device=device))
        sums = dict(zip(names, totals.tolist(), strict=True))
        return {name: sums[name] / max(sums["images"], 1.0) for name in names if name != "images"}


@torch.no_grad()
def validate(
    model: RACNN,
    loader: Iterable[dict[str, Tensor]],
    device: torch.device,
    *,
    scales: int,
    margin: float,
    guide: Guide | None = None,
) -> dict[str, Any]:
    """Run the first `scales` scales over images that they were not trained on, in eval mode.

    Returns:
        `scales` (a list of `top1` and `nll`), and with more than one scale `average` and `fused` (the same),
        `rank` (mean rank loss over the pairs of scales) and `boxes` (a list of `side_mean`, `side_std`,
        `centre_std`, `at_floor`, `at_ceiling`, relative to the scale before, and where the data has true boxes
        `iou_mean`, `hit_rate`, `coverage_mean`).
    """
    model.eval()
    names = [f"scale {number}" for number in range(scales)]
    answered = [*names, "average", "fused"] if scales > 1 else names
    sums = Sums(
        [f"{name} {figure}" for name in answered for figure in ("top1", "nll")]
        + (["rank"] if scales > 1 else [])
        + [f"{number} {figure}" for number in range(scales - 1) for figure in BOX]
    )
    for batch in loader:
        batch = {name: value.to(device) for name, value in batch.items()}
        images, labels = batch["image"], batch["label"]
        count = len(labels)
        sums.add("images", count)
        if scales == 1:
            scale = model.scale(0)
            answers = {names[0]: scale.classify(scale.backbone(model.first_view(model.normalise(images))))}
        else:
            output = model(images, guide and guide(batch))
            mean = torch.stack([logits.softmax(1) for logits in output.logits]).mean(0)
            answers = dict(zip(names, output.logits, strict=True))
            answers |= {"average": mean.clamp_min(1e-12).log(), "fused": output.fused}
            for coarse, fine in zip(output.logits, output.logits[1:], strict=False):
                sums.add("rank", rank_loss(coarse, fine, labels, margin) * count / (scales - 1))
            for number, (proposal, found) in enumerate(zip(output.proposals, output.boxes, strict=True)):
                _add_boxes(sums, number, proposal, model.options.floor, model.options.ceiling)
                _add_truth(sums, number, found, batch["box"])
        for name, logits in answers.items():
            sums.add(f"{name} top1", (logits.argmax(1) == labels).sum())
            sums.add(f"{name} nll", classification_loss(logits, labels) * count)
    means = sums.means(device)

    def entry(name: str) -> dict[str, float]:
        return {"top1": means[f"{name} top1"], "nll": means[f"{name} nll"]}

    result: dict[str, Any] = {"scales": [entry(name) for name in names]}
    if scales > 1:
        result |= {"average": entry("average"), "fused": entry("fused"), "rank": means["rank"]}
        result["boxes"] = [_box_entry(means, number) for number in range(scales - 1)]
    return result


def _add_boxes(sums: Sums, number: int, proposals: Tensor, floor: float, ceiling: float) -> None:
    sides = 2 * proposals[:, 2]
    at_floor, at_ceiling = metrics.at_bounds(sides, floor, ceiling)
    sums.add(f"{number} side", sides.sum())
    sums.add(f"{number} square", sides.square().sum())
    for axis, name in enumerate("xy"):
        sums.add(f"{number} {name}", proposals[:, axis].sum())
        sums.add(f"{number} {name * 2}", proposals[:, axis].square().sum())
    sums.add(f"{number} at_floor", at_floor.sum())
    sums.add(f"{number} at_ceiling", at_ceiling.sum())


def _add_truth(sums: Sums, number: int, boxes: Tensor, truth: Tensor) -> None:
    """Boxes (B, 3) on the source against the true ones (B, 4), where there are any."""
    found = metrics.against(boxes, truth)  # (B', 3)
    sums.add(f"{number} truth", len(found))
    for name, total in zip(("iou", "hit", "coverage"), found.sum(dim=0), strict=True):
        sums.add(f"{number} {name}", total)


def _box_entry(means: dict[str, float], number: int) -> dict[str, float]:
    side = means[f"{number} side"]
    spread = max(means[f"{number} square"] - side * side, 0.0) ** 0.5
    apart = sum(max(means[f"{number} {name * 2}"] - means[f"{number} {name}"] ** 2, 0.0) for name in "xy")
    truth = means[f"{number} truth"]
    found = {"iou_mean": "iou", "hit_rate": "hit", "coverage_mean": "coverage"} if truth else {}
    return {name: means[f"{number} {figure}"] / truth for name, figure in found.items()} | {
        "side_mean": side,
        "side_std": spread,
        "centre_std": (apart / 2) ** 0.5,
        "at_floor": means[f"{number} at_floor"],
        "at_ceiling": means[f"{number} at_ceiling"],
    }
