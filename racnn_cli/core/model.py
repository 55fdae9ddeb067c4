"""RA-CNN: a CNN a scale, an attention proposal network between two scales, a fusion of all.

Shapes: B images, S scales, N classes, H source side in pixels, s side of a scale's view,
C, h, w channels, rows and columns of a scale's features, D width of its descriptor.

    images (B, 3, H, H) ─ view ─▶ (B, 3, s, s) ─ backbone ─▶ features (B, C, h, w) ─▶ descriptor (B, D) ─▶ logits (B, N)
                                                              └─ APN ─▶ box (B, 3) ─ zoom ─▶ the next scale's view
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from racnn_cli import backbones, recipe
from racnn_cli.backbones import Backbone
from racnn_cli.core import attention
from racnn_cli.errors import RacnnError


class Output(NamedTuple):
    """What a forward pass of all scales gives; boxes and views are listed from the coarse scale to the fine."""

    probabilities: Tensor  # (B, N): the final answer
    fused: Tensor  # (B, N) logits of the fusion head
    logits: tuple[Tensor, ...]  # S × (B, N)
    boxes: tuple[Tensor, ...]  # S - 1 × (B, 3) on the source image
    proposals: tuple[Tensor, ...]  # S - 1 × (B, 3) on the view of the scale before
    views: tuple[Tensor, ...]  # S × (B, 3, s, s), normalised
    descriptors: tuple[Tensor, ...]  # S × (B, D)


class CoarseOutput(NamedTuple):
    """What scale 1 makes of an image, and all that the finer scales need of it."""

    view: Tensor  # (B, 3, s, s), normalised
    logits: Tensor  # (B, N)
    descriptor: Tensor  # (B, D)
    proposal: Tensor | None  # (B, 3) on `view`; None where there is no finer scale


class Scale(nn.Module):
    """One scale: its backbone, its classifier, and the APN that proposes the next scale's box."""

    def __init__(self, backbone: Backbone, classes: int, dropout: float, apn: attention.APN | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(backbone.width, classes)
        self.apn = apn
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) to logits (B, N)."""
        return self.classifier(self.dropout(self.backbone.descriptor(features)))

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What it sees (B, 3, s, s) to logits (B, N), descriptor (B, D) and, if it has an APN, proposal (B, 3)."""
        features = self.backbone(view)
        descriptor = self.backbone.descriptor(features)
        proposal = None if self.apn is None else self.apn(features)
        return self.classifier(self.dropout(descriptor)), descriptor, proposal


class RACNN(nn.Module):
    """The recurrent attention CNN.

    Args:
        backbones: one a scale, coarse to fine, each with its own weights.
        classes: number of classes N.
        source: side H in pixels of the square images that `forward` takes.
        model: the recipe's model section: zoom, bounds of the boxes, k, gradient, dropout.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbones: Sequence[Backbone], classes: int, source: int, model: recipe.Model) -> None:
        super().__init__()
        self.source, self.classes, self.options = source, classes, model
        self.sizes = tuple(backbone.input_size for backbone in backbones)
        last = len(backbones) - 1
        self.scales = nn.ModuleList(
            Scale(backbone, classes, model.dropout, None if number == last else self._apn(backbone))
            for number, backbone in enumerate(backbones)
        )
        # A single scale is the plain backbone: there is nothing to fuse, and no unused weights.
        self.fusion = nn.Linear(sum(b.width for b in backbones), classes) if last else None
        self.register_buffer("mean", torch.tensor(backbones[0].mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(backbones[0].std)[:, None, None], persistent=False)

    def _apn(self, backbone: Backbone) -> attention.APN:
        shape, model = (backbone.channels, *backbone.map_size), self.options
        if backbone.map_size == (1, 1):
            raise RacnnError(
                f"{backbone.name} has features of one cell at {backbone.input_size} px: an APN has nothing to point at",
                "larger model.sizes, for a map of at least 2×2 (better 7×7), or --scales 1",
            )
        return attention.APN(shape, model.apn_hidden, model.floor, model.ceiling, model.side)

    def scale(self, number: int) -> Scale:
        """Scale `number`, counted from 0."""
        scale = self.scales[number]
        assert isinstance(scale, Scale)
        return scale

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, H) in [0, 1], or uint8 in 0..255, to the backbone's own range."""
        if images.dtype == torch.uint8:  # in place: these are the largest tensors of a step
            return images.to(self.mean.dtype).mul_(1 / (255 * self.std)).sub_(self.mean / self.std)
        return (images - self.mean) / self.std

    def first_view(self, source: Tensor) -> Tensor:
        """What scale 1 sees (B, 3, s, s): the whole of the normalised source (B, 3, H, H)."""
        # An exported graph takes a source of any size; where it is the view's own, the crop is the identity.
        if not torch.compiler.is_compiling() and source.shape[-2:] == (self.sizes[0], self.sizes[0]):
            return source
        return attention.zoom(source, attention.whole(source), self.sizes[0], k=math.inf, gradient="none")

    def next_view(
        self, number: int, source: Tensor, view: Tensor, parent: Tensor, proposal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What scale `number` (from 1) sees, given the box proposed on the scale before it.

        Args:
            number: the finer scale, counted from 0.
            source: (B, 3, H, H) normalised source images.
            view: (B, 3, s, s) what the coarser scale saw.
            parent: (B, 3) where that was on the source. A constant: an APN answers for its own zoom only, so
                that no gradient of a finer pair of scales reaches it.
            proposal: (B, 3) box on `view`.

        Returns:
            the view (B, 3, s, s) and its box (B, 3) on the source.
        """
        box = attention.compose(parent.detach(), proposal)
        size, k, gradient = self.sizes[number], self.options.k, self.options.gradient
        if self.options.zoom == "nested":
            return attention.zoom(view, proposal, size, k=k, gradient=gradient), box
        return attention.zoom(source, box, size, k=k, gradient=gradient), box

    def fuse(self, descriptors: Sequence[Tensor]) -> Tensor:
        """Descriptors S × (B, D), each normalised on its own, to the fused logits (B, N)."""
        assert self.fusion is not None
        return self.fusion(join_descriptors(descriptors))

    def forward(self, images: Tensor, given: Sequence[Tensor] | None = None) -> Output:
        """Images (B, 3, H, H) in [0, 1] (or uint8) through all scales.

        Args:
            images: as above.
            given: S - 1 proposals (B, 3) to use instead of the APNs' own, such as true boxes.
        """
        source = self.normalise(images)
        return self.refine(source, self.coarse(source), given)

    def coarse(self, source: Tensor) -> CoarseOutput:
        """Normalised source images (B, 3, H, H) through scale 1."""
        view = self.first_view(source)
        return CoarseOutput(view, *self.scale(0)(view))

    def refine(self, source: Tensor, coarse: CoarseOutput, given: Sequence[Tensor] | None = None) -> Output:
        """From what scale 1 made of them to the answer of all scales.

        Args:
            source: (B, 3, H, H) normalised source images.
            coarse: of the same.
            given: as in `forward`.
        """
        view, box = coarse.view, attention.whole(source)
        logits, descriptors, proposal = [coarse.logits], [coarse.descriptor], coarse.proposal
        boxes, proposals, views = [], [], [view]
        for number in range(1, len(self.sizes)):
            if given is not None:
                proposal = given[number - 1]
            assert proposal is not None
            view, box = self.next_view(number, source, view, box, proposal)
            proposals.append(proposal)
            boxes.append(box)
            views.append(view)
            answer, descriptor, proposal = self.scale(number)(view)
            logits.append(answer)
            descriptors.append(descriptor)
        fused = logits[0] if self.fusion is None else self.fuse(descriptors)
        return Output(
            fused.softmax(dim=1),
            fused,
            tuple(logits),
            tuple(boxes),
            tuple(proposals),
            tuple(views),
            tuple(descriptors),
        )


def join_descriptors(descriptors: Sequence[Tensor]) -> Tensor:
    """Descriptors S × (B, D), each normalised on its own, side by side: the input (B, S * D) of the fusion head."""
    return torch.cat([F.normalize(descriptor, dim=1) for descriptor in descriptors], dim=1)


def sizes_of(model: recipe.Model) -> tuple[int, ...]:
    """Input side of each scale in pixels: the recipe's, or the backbone's own."""
    return model.sizes or backbones.native_sizes(model.backbone, model.scales)


def resolve(whole: recipe.Recipe) -> recipe.Recipe:
    """The recipe with the sizes and the source that it leaves to the backbone spelt out."""
    sizes = sizes_of(whole.model)
    return whole.override({"model.sizes": list(sizes), "data.source": whole.data.source or sizes[0]})


def build(model: recipe.Model, classes: int, *, source: int = 0, weights: str | None = None) -> RACNN:
    """The network that a recipe describes.

    Args:
        model: the recipe's model section.
        classes: number of classes N.
        source: side of the source images in pixels; 0: the first scale's input size.
        weights: instead of the recipe's, such as `none` when a run's own weights are loaded next.

    Raises:
        RacnnError: no such backbone, a size that it refuses, weights that do not fit.
    """
    sizes = sizes_of(model)
    first = backbones.build(model.backbone, size=sizes[0], weights=weights or model.weights)
    rest = [backbones.build(model.backbone, size=size, weights="none") for size in sizes[1:]]
    for backbone in rest:
        backbones.copy_weights(first, backbone)
    return RACNN([first, *rest], classes, source or sizes[0], model)
