"""The stages as data: what moves, on which loss, for how long. The one loop in `loop.py` runs them all.

A stage's losses are a generator: it yields one loss a scale, and the loop propagates each back before it asks
for the next. Where the boxes carry no gradient, the scales are independent, and so each scale's graph is freed
before the next one runs. What is frozen is computed without a graph.

Sources: Fu et al. 2017, section 3.4 (training in three steps) and equations 8 and 9 (losses).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from racnn_cli.core import attention, perturb
from racnn_cli.core.draws import Draws
from racnn_cli.core.losses import classification_loss, rank_loss
from racnn_cli.core.model import RACNN
from racnn_cli.recipe import Recipe

NAMES = ("pretrain-cnn", "pretrain-apn", "alternate")

Batch = Mapping[str, Tensor]
Losses = Callable[[RACNN, Batch], Iterator[tuple[str, Tensor]]]
Guide = Callable[[Batch], Sequence[Tensor]]
"""S - 1 proposals (B, 3) for a batch, to use instead of the APNs': true boxes, or any other."""
Teacher = Callable[[Batch, Tensor, int], Tensor]
"""(batch, box (B, 3) on the source of what a scale sees, the scale's number from 0) to the proposal (B, 3) that its
APN is to make: what annotated boxes would teach it."""


@dataclass(frozen=True)
class Stage:
    """One call of the loop.

    Attributes:
        name: as a person reads it and as the log names it.
        part: which half moves; the other is frozen, parameters and buffers.
        scales: the scales, counted from 0, whose half moves.
        losses: (network, batch with `image` (B, 3, H, H) and `label` (B,)) to (name, loss) pairs.
        epochs, lr, lr_key: how long, how fast, and the recipe key that says so.
        head_lr: learning rate of the classifiers as a multiple of `lr`.
        keep_best: at the end, go back to the epoch with the lowest validation loss (the start counts too
            where `from_start`).
        patience: stop after so many epochs without a better one; 0: never.
    """

    name: str
    part: Literal["cnn", "apn", "fusion"]
    scales: range
    losses: Losses
    epochs: int
    lr: float
    lr_key: str
    head_lr: float = 1.0
    keep_best: bool = False
    from_start: bool = False
    patience: int = 0

    def moving(self, model: RACNN) -> list[nn.Module]:
        """The modules whose parameters this stage trains."""
        chosen = [model.scale(number) for number in self.scales]
        if self.part == "fusion":
            assert model.fusion is not None
            return [model.fusion]
        if self.part == "apn":
            return [scale.apn for scale in chosen if scale.apn is not None]
        return [module for scale in chosen for module in (scale.backbone, scale.dropout, scale.classifier)]

    def heads(self, model: RACNN) -> set[nn.Parameter]:
        """The classifiers' parameters, which start from nothing and may learn faster."""
        return {p for number in self.scales for p in model.scale(number).classifier.parameters()}


def pretrain_cnn(recipe: Recipe) -> Stage:
    """Fine-tune scale 1 on the labels."""
    section = recipe.pretrain_cnn

    def losses(model: RACNN, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        scale = model.scale(0)
        logits = scale.classify(scale.backbone(model.first_view(model.normalise(batch["image"]))))
        yield "classification 1", classification_loss(logits, batch["label"], recipe.train.label_smoothing)

    return Stage(
        "pretrain-cnn",
        "cnn",
        range(1),
        losses,
        section.epochs,
        section.lr,
        "pretrain_cnn.lr",
        head_lr=section.head_lr,
        keep_best=section.patience > 0,
        patience=section.patience,
    )


def pretrain_apn(recipe: Recipe, teacher: Teacher | None = None) -> Stage:
    """Teach every APN the square around the highest response of its scale's features, or what `teacher` says."""
    section, scales = recipe.pretrain_apn, range(recipe.model.scales - 1)
    losses = aim(recipe, teacher)
    return Stage("pretrain-apn", "apn", scales, losses, section.epochs, section.lr, "pretrain_apn.lr")


def aim(recipe: Recipe, teacher: Teacher | None) -> Losses:
    """The distance of each APN's proposal to what it should be."""

    def losses(model: RACNN, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        source = model.normalise(batch["image"])
        view, box = model.first_view(source), attention.full_box(source)
        for number in range(recipe.model.scales - 1):
            scale = model.scale(number)
            assert scale.apn is not None
            with torch.no_grad():
                features = scale.backbone(view)
                if teacher is None:
                    target = attention.peak_target(features, recipe.model.side)
                else:
                    target = teacher(batch, box, number)
            proposal = scale.apn(features)
            yield f"box {number + 2}", F.smooth_l1_loss(proposal, target, beta=0.05)
            if number + 2 < recipe.model.scales:
                with torch.no_grad():
                    view, box = model.next_view(number + 1, source, view, box, proposal)

    return losses


def cnn_phase(recipe: Recipe, guide: Guide | None = None, round_: int = 0) -> Stage:
    """APNs fixed: train every scale's CNN on its own classification loss.

    Args:
        recipe: of the run.
        guide: boxes instead of the APNs'.
        round_: of `alternate`, counted from 0.
    """
    section, bounds = recipe.alternate, (recipe.model.floor, recipe.model.ceiling)
    left = 1 - round_ / max(section.rounds - 1, 1) if section.settle else 1.0
    shake, tighten = section.jitter * left, section.tighten * left

    def losses(model: RACNN, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        source = model.normalise(batch["image"])
        view, box = model.first_view(source), attention.full_box(source)
        given, draws = guide(batch) if guide else None, Draws.of(batch)
        for number in range(recipe.model.scales):
            scale = model.scale(number)
            features = scale.backbone(view)
            loss = classification_loss(scale.classify(features), batch["label"], recipe.train.label_smoothing)
            yield f"classification {number + 1}", loss
            if scale.apn is not None:
                with torch.no_grad():
                    proposal = scale.apn(features.detach()) if given is None else given[number]
                    if shake > 0 or tighten > 0:
                        proposal = attention.jitter(proposal, shake, *bounds, tighten, draws.uniform(3))
                    view, box = model.next_view(number + 1, source, view, box, proposal)

    scales, epochs = range(recipe.model.scales), section.cnn_epochs_of(round_)
    return Stage("alternate: CNN phase", "cnn", scales, losses, epochs, section.cnn_lr, "alternate.cnn_lr")


def apn_phase(recipe: Recipe, teacher: Teacher | None = None) -> Stage:
    """CNNs fixed: train every APN on the pairwise rank loss between its scale and the next.

    Args:
        recipe: of the run.
        teacher: what they learn instead of the rank loss.
    """
    section, scales = recipe.alternate, range(recipe.model.scales - 1)
    losses = aim(recipe, teacher) if teacher else rank_losses(recipe)
    return Stage(
        "alternate: APN phase", "apn", scales, losses, section.apn_epochs, section.apn_lr, "alternate.apn_lr"
    )


def rank_losses(recipe: Recipe) -> Losses:
    """The rank loss of each pair of scales, and its slope in the box between them."""
    section = recipe.alternate

    def losses(model: RACNN, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        source, draws = model.normalise(batch["image"]), Draws.of(batch)
        view, box = model.first_view(source), attention.full_box(source)
        with torch.no_grad():
            features = model.scale(0).backbone(view)
            coarse = model.scale(0).classify(features)
        for number in range(1, recipe.model.scales):
            apn, scale = model.scale(number - 1).apn, model.scale(number)
            assert apn is not None
            proposal = apn(features)

            def rank(fine: Tensor, coarse: Tensor = coarse) -> Tensor:
                return rank_loss(coarse, fine, batch["label"], section.margin, "none")  # (B,)

            if section.apn_gradient == "perturb":
                with torch.no_grad():
                    chance = draws.normal(3 * section.boxes // 2)
                    tried = perturb.neighbours(proposal, section.boxes, section.spread, chance)
                    seen = (model.next_view(number, source, view, box, one)[0] for one in tried)
                    ranks = torch.stack([rank(scale.classify(scale.backbone(one))) for one in seen])
                yield (
                    f"rank {number}-{number + 1}",
                    perturb.perturbed_loss(proposal, tried, ranks, section.spread),
                )
                if number + 1 == recipe.model.scales:
                    return
                proposal = proposal.detach()
            with torch.set_grad_enabled(proposal.requires_grad):
                view, box = model.next_view(number, source, view, box, proposal)
                features = scale.backbone(view)
                fine = scale.classify(features)
            if proposal.requires_grad:
                yield f"rank {number}-{number + 1}", rank(fine).mean()
            view, box, features, coarse = view.detach(), box.detach(), features.detach(), fine.detach()

    return losses


def fusion(recipe: Recipe, guide: Guide | None = None) -> Stage:
    """Everything fixed but the fully connected layer over the normalised descriptors."""
    section = recipe.fusion

    def losses(model: RACNN, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            descriptors = model(batch["image"], guide and guide(batch)).descriptors
        loss = classification_loss(model.fuse(descriptors), batch["label"], recipe.train.label_smoothing)
        yield "classification fused", loss

    return Stage(
        "alternate: fusion head",
        "fusion",
        range(recipe.model.scales),
        losses,
        section.epochs,
        section.lr,
        "fusion.lr",
        keep_best=True,
        from_start=True,
    )


@torch.no_grad()
def start_fusion(model: RACNN, norms: list[float]) -> None:
    """Let the fusion head start as the mean of the scales' logits.

    The descriptors are normalised before they are fused, so each classifier's weights are multiplied by the
    mean length of its descriptors.

    Args:
        model: the network, more than one scale.
        norms: mean Euclidean length of each scale's descriptors on training images.
    """
    assert model.fusion is not None
    count = len(norms)
    heads = [model.scale(number).classifier for number in range(count)]
    blocks = [head.weight * norm / count for head, norm in zip(heads, norms, strict=True)]
    model.fusion.weight.copy_(torch.cat(blocks, dim=1))
    model.fusion.bias.copy_(torch.stack([head.bias for head in heads]).mean(dim=0))
