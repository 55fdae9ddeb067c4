"""Phases as data: what is trained, on which loss, for how long. The one loop in `loop.py` runs them all.

A phase's losses are a generator: it yields one loss per scale, and the loop calls `backward` on each before it asks for
the next. Where the boxes carry no gradient the scales are independent, so each scale's graph is freed before the next
scale runs. What is frozen is computed without a graph.

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
from racnn_cli.core.model import RACNN, Scale, join_descriptors
from racnn_cli.recipe import Recipe

Batch = Mapping[str, Tensor]
"""`image` (B, 3, H, H), `label` (B,), `box` (B, 4), `index` (B,), `key` (B,)."""
Losses = Callable[[RACNN, Sequence[nn.Module], Batch], Iterator[tuple[str, Tensor]]]
"""(network, the trained modules, batch) to (name, loss) pairs. What is trained must be called through its module in the
second argument, which under torchrun is wrapped in DistributedDataParallel; the network is for all that is frozen."""


@dataclass(frozen=True, kw_only=True)
class BoxSource:
    """Where boxes come from instead of the APNs; by default both are the APNs' own.

    Attributes:
        proposals: batch to S - 1 proposals (B, 3) that replace the APNs' in CNN phases, fusion and evaluation.
        targets: (batch, box (B, 3) of what a scale sees on the source, the scale counted from 0) to the proposal
            (B, 3) that its APN is taught, instead of the peak of the features and the rank loss.
    """

    proposals: Callable[[Batch], Sequence[Tensor]] | None = None
    targets: Callable[[Batch, Tensor, int], Tensor] | None = None


LEARNED = BoxSource()
"""The APNs' own boxes."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One call of the loop.

    Attributes:
        stage, name: as the log has them; `name` is empty where a stage is a single phase.
        part: what is trained of each scale; everything else is frozen, parameters and buffers.
        scales: the scales, counted from 0, whose part is trained.
        losses: see `Losses`.
        epochs, lr, lr_key: how long, the learning rate, and the recipe key that sets it.
        head_lr: learning rate of the classifiers as a multiple of `lr`.
        keep_best: at the end, go back to the best epoch on the validation split (the start counts too with
            `from_start`): see `Answer.score`.
        patience: stop after this many epochs without a better one; 0: never.
        epochs_before, span: of the learning rate's schedule, where it covers several phases: epochs of those before
            this one, and of all of them; a span of 0 is this phase alone.
    """

    stage: str
    name: str = ""
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
    epochs_before: int = 0
    span: int = 0

    @property
    def title(self) -> str:
        """Stage and name, for a person."""
        return f"{self.stage}: {self.name}" if self.name else self.stage

    def modules(self, model: RACNN) -> list[nn.Module]:
        """The modules that this phase trains, one per scale (of the fusion head: one)."""
        scales = [model.scale(number) for number in self.scales]
        if self.part == "fusion":
            assert model.fusion is not None
            return [model.fusion]
        if self.part == "apn":
            return [scale.apn for scale in scales if scale.apn is not None]
        return [Classifier(scale) for scale in scales]

    def heads(self, model: RACNN) -> set[nn.Parameter]:
        """The classifiers' parameters, which start untrained and may learn faster."""
        return {parameter for number in self.scales for parameter in model.scale(number).classifier.parameters()}


class Classifier(nn.Module):
    """A scale without its APN: view (B, 3, s, s) to features (B, C, h, w) and logits (B, N)."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.backbone, self.dropout, self.classifier = scale.backbone, scale.dropout, scale.classifier

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(view)
        return features, self.classifier(self.dropout(self.backbone.descriptor(features)))


@torch.no_grad()
def single_value_layer(model: RACNN) -> str:
    """Name a BatchNorm layer that has one value per channel of a single image, so that it cannot train on one.

    Args:
        model: the network, on the CPU.

    Returns:
        Name of the layer and the input size; empty if there is none.
    """
    layers: list[str] = []
    training = model.training
    model.eval()
    for number, size in enumerate(model.sizes):
        classifier = Classifier(model.scale(number))
        handles = [
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: layers.append(name) if inputs[0][0, 0].numel() == 1 else None
            )
            for name, layer in classifier.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]
        if handles:
            classifier(torch.zeros(1, 3, size, size))
        for handle in handles:
            handle.remove()
        if layers:
            break
    model.train(training)
    return f"{layers[0]} at {size} px" if layers else ""


def pretrain_cnn(recipe: Recipe) -> Phase:
    """Fine-tune scale 1 on the labels."""
    section = recipe.pretrain_cnn

    def losses(model: RACNN, trained: Sequence[nn.Module], batch: Batch) -> Iterator[tuple[str, Tensor]]:
        _, logits = trained[0](model.first_view(model.normalise(batch["image"])))
        yield "classification 1", classification_loss(logits, batch["label"], recipe.train.label_smoothing)

    return Phase(
        stage="pretrain-cnn",
        part="cnn",
        scales=range(1),
        losses=losses,
        epochs=section.epochs,
        lr=section.lr,
        lr_key="pretrain_cnn.lr",
        head_lr=section.head_lr,
        keep_best=True,
        patience=section.patience,
    )


def pretrain_apn(recipe: Recipe, boxes: BoxSource = LEARNED) -> Phase:
    """Teach every APN the square around the highest response of its scale's features, or the targets of `boxes`."""
    section = recipe.pretrain_apn
    return Phase(
        stage="pretrain-apn",
        part="apn",
        scales=range(recipe.model.scales - 1),
        losses=target_losses(recipe, boxes),
        epochs=section.epochs,
        lr=section.lr,
        lr_key="pretrain_apn.lr",
    )


def target_losses(recipe: Recipe, boxes: BoxSource) -> Losses:
    """The distance of each APN's proposal to its target."""

    def losses(model: RACNN, trained: Sequence[nn.Module], batch: Batch) -> Iterator[tuple[str, Tensor]]:
        source = model.normalise(batch["image"])
        view, box = model.first_view(source), attention.full_box(source)
        for number, apn in enumerate(trained):
            with torch.no_grad():
                features = model.scale(number).backbone(view)
                if boxes.targets is None:
                    target = attention.peak_target(features, recipe.model.side)
                else:
                    target = boxes.targets(batch, box, number)
            proposal = apn(features)
            yield f"box {number + 2}", F.smooth_l1_loss(proposal, target, beta=0.05)
            if number + 1 < len(trained):
                with torch.no_grad():
                    view, box = model.next_view(number + 1, source, view, box, proposal)

    return losses


def cnn_phase(recipe: Recipe, boxes: BoxSource = LEARNED, *, round_index: int = 0) -> Phase:
    """APNs frozen: train every scale's CNN on its own classification loss.

    Args:
        recipe: of the run.
        boxes: where they come from.
        round_index: round of `alternate`, counted from 0.
    """
    section, bounds = recipe.alternate, (recipe.model.floor, recipe.model.ceiling)
    left = 1 - round_index / max(section.rounds - 1, 1) if section.settle else 1.0
    jitter, tighten = section.jitter * left, section.tighten * left

    def losses(model: RACNN, trained: Sequence[nn.Module], batch: Batch) -> Iterator[tuple[str, Tensor]]:
        source = model.normalise(batch["image"])
        view, box = model.first_view(source), attention.full_box(source)
        given, draws = boxes.proposals(batch) if boxes.proposals else None, Draws.of(batch)
        for number, cnn in enumerate(trained):
            features, logits = cnn(view)
            loss = classification_loss(logits, batch["label"], recipe.train.label_smoothing)
            yield f"classification {number + 1}", loss
            apn = model.scale(number).apn
            if apn is not None:
                with torch.no_grad():
                    proposal = apn(features.detach()) if given is None else given[number]
                    if jitter > 0 or tighten > 0:
                        proposal = attention.jitter(proposal, jitter, *bounds, tighten, draws.uniform(3))
                    view, box = model.next_view(number + 1, source, view, box, proposal)

    return Phase(
        stage="alternate",
        name="CNN phase",
        part="cnn",
        scales=range(recipe.model.scales),
        losses=losses,
        epochs=section.cnn_epochs_of(round_index),
        lr=section.cnn_lr,
        lr_key="alternate.cnn_lr",
        epochs_before=section.cnn_epochs_in(round_index),
        span=section.cnn_epochs_in(section.rounds) if recipe.train.span == "stage" else 0,
    )


def apn_phase(recipe: Recipe, boxes: BoxSource = LEARNED, *, round_index: int = 1) -> Phase:
    """CNNs frozen: train every APN on the rank loss between its scale and the next, or on the targets of `boxes`.

    Args:
        recipe, boxes, round_index: as for `cnn_phase`; the first round (0) has no APN phase.
    """
    section = recipe.alternate
    return Phase(
        stage="alternate",
        name="APN phase",
        part="apn",
        scales=range(recipe.model.scales - 1),
        losses=target_losses(recipe, boxes) if boxes.targets else rank_losses(recipe),
        epochs=section.apn_epochs,
        lr=section.apn_lr,
        lr_key="alternate.apn_lr",
        epochs_before=section.apn_epochs * (round_index - 1),
        span=section.apn_epochs * (section.rounds - 1) if recipe.train.span == "stage" else 0,
    )


def rank_losses(recipe: Recipe) -> Losses:
    """The rank loss of each pair of neighbouring scales, with its slope in the box between them (equation 9)."""
    section = recipe.alternate

    def losses(model: RACNN, trained: Sequence[nn.Module], batch: Batch) -> Iterator[tuple[str, Tensor]]:
        source, draws = model.normalise(batch["image"]), Draws.of(batch)
        view, box = model.first_view(source), attention.full_box(source)
        with torch.no_grad():
            features = model.scale(0).backbone(view)
            coarse = model.scale(0).classify(features)
        for number, apn in enumerate(trained, start=1):
            scale, name = model.scale(number), f"rank {number}-{number + 1}"
            proposal = apn(features)

            def rank(fine: Tensor, coarse: Tensor = coarse) -> Tensor:
                return rank_loss(coarse, fine, batch["label"], section.margin, "none")  # (B,)

            if section.apn_gradient == "perturb":
                with torch.no_grad():
                    noise = draws.normal(3 * section.boxes // 2)
                    tried = perturb.neighbours(proposal, section.boxes, section.spread, noise)
                    views = (model.next_view(number, source, view, box, candidate)[0] for candidate in tried)
                    ranks = torch.stack([rank(scale.classify(scale.backbone(crop))) for crop in views])
                yield name, perturb.perturbed_loss(proposal, tried, ranks, section.spread)
                if number == len(trained):
                    return
                proposal = proposal.detach()
            with torch.set_grad_enabled(proposal.requires_grad):
                view, box = model.next_view(number, source, view, box, proposal)
                features = scale.backbone(view)
                fine = scale.classify(features)
            if proposal.requires_grad:
                yield name, rank(fine).mean()
            view, box, features, coarse = view.detach(), box.detach(), features.detach(), fine.detach()

    return losses


def fusion(recipe: Recipe, boxes: BoxSource = LEARNED) -> Phase:
    """Everything frozen but the fully connected layer over the normalised descriptors."""
    section = recipe.fusion

    def losses(model: RACNN, trained: Sequence[nn.Module], batch: Batch) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            descriptors = model(batch["image"], boxes.proposals and boxes.proposals(batch)).descriptors
        logits = trained[0](join_descriptors(descriptors))
        yield ("classification fused", classification_loss(logits, batch["label"], recipe.train.label_smoothing))

    return Phase(
        stage="alternate",
        name="fusion head",
        part="fusion",
        scales=range(recipe.model.scales),
        losses=losses,
        epochs=section.epochs,
        lr=section.lr,
        lr_key="fusion.lr",
        keep_best=True,
        from_start=True,
    )
