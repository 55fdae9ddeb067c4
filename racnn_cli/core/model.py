"""RA-CNN: one backbone per scale, an attention proposal network (APN) between scales, and a fusion of all scales.

Shapes: B images, S scales, N classes, H side of the source, s side of a scale's view;
C, h, w channels, rows and columns of a scale's features, D width of its descriptor.

    images (B, 3, H, H) ─ view ─▶ (B, 3, s, s) ─ backbone ─▶ features (B, C, h, w) ─▶ descriptor (B, D) ─▶ logits (B, N)
                                                              └─ APN ─▶ box (B, 3) ─ zoom ─▶ the next scale's view
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from racnn_cli.backbones import Backbone, build_scales, native_sizes
from racnn_cli.core import attention
from racnn_cli.core.mixture import log_mixture
from racnn_cli.errors import SizeRefused
from racnn_cli.recipe import Model, Recipe

SOURCE_BYTES = 2**30
"""Memory that the normalized source images of a batch may take, if the recipe does not set their side."""


class Output(NamedTuple):
    """Result of a forward pass; boxes and views are ordered from the coarsest scale to the finest."""

    probabilities: Tensor  # (B, N) of the fusion head, calibrated
    fused: Tensor  # (B, N) logits of the fusion head
    logits: tuple[Tensor, ...]  # S × (B, N)
    boxes: tuple[Tensor, ...]  # S - 1 × (B, 3) on the source image
    proposals: tuple[Tensor, ...]  # S - 1 × (B, 3) on the previous scale's view
    views: tuple[Tensor, ...]  # S × (B, 3, s, s), normalized
    descriptors: tuple[Tensor, ...]  # S × (B, D)


class CoarseOutput(NamedTuple):
    """Result of scale 1, with everything that the finer scales need."""

    view: Tensor  # (B, 3, s, s), normalized
    logits: Tensor  # (B, N)
    descriptor: Tensor  # (B, D)
    proposal: Tensor | None  # (B, 3) on `view`; None without a finer scale


class Scale(nn.Module):
    """One scale: its backbone, its classifier, and the APN that proposes the next scale's box."""

    def __init__(self, backbone: Backbone, classes: int, *, dropout: float, apn: attention.APN | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(backbone.width, classes)
        self.apn = apn
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def classify(self, features: Tensor) -> Tensor:
        """Map features (B, C, h, w) to logits (B, N) (paper, equation 1)."""
        return cast(Tensor, self.classifier(self.dropout(self.backbone.descriptor(features))))

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map a view (B, 3, s, s) to logits (B, N), a descriptor (B, D) and, with an APN, a proposal (B, 3)."""
        features = self.backbone(view)
        descriptor = self.backbone.descriptor(features)
        proposal = None if self.apn is None else self.apn(features)
        return self.classifier(self.dropout(descriptor)), descriptor, proposal


class RACNN(nn.Module):
    """Recurrent attention CNN (Fu, Zheng, Mei, CVPR 2017).

    Args:
        backbones: one backbone per scale, coarse to fine, or the name of a backbone that all scales use.
        classes: number of classes N.
        source: side H in pixels of the square images that `forward` takes; 0: the first scale's input size.
        zoom: what a finer view is cropped from: the source image, or the previous view (`nested`, the paper).
        floor, ceiling: bounds of a box's side, as a fraction of the previous scale's side.
        side: side of the boxes that an untrained APN proposes.
        apn_hidden: number of attention maps in an APN.
        k: steepness of the boxcar mask per pixel of the cropped image; `math.inf` disables it.
        gradient: what a box gets a gradient through, see `attention.zoom`.
        dropout: dropout probability before each classifier.
        fuse: `head` (the paper), a layer over the descriptors of all scales; `weights`, a mixture of the scales; or
            `both`, a mixture of the scales and the head. See `core.mixture`.
        scales: number of scales S; only with a name, as are the following.
        sizes: input side of each scale in pixels; empty: the backbone's native sizes.
        weights: as in `backbones.build`; all scales start from the same weights.
        drop_path: as in `backbones.build`.

    Raises:
        ValueError: arguments that contradict each other.
        BackboneError: unknown backbone, or weights that are missing or do not fit.
        SizeRefused: a backbone does not take its size, or its features are too small for an APN.
    """

    mean: Tensor
    std: Tensor
    temperatures: Tensor  # (S + 2,) of the scales, their average and the fusion head; 1 until they are fitted

    def __init__(
        self,
        backbones: Sequence[Backbone] | str,
        classes: int,
        *,
        source: int = 0,
        zoom: Literal["source", "nested"] = "source",
        floor: float = 1 / 3,
        ceiling: float = 0.95,
        side: float = 0.5,
        apn_hidden: int = 16,
        k: float = 0.5,
        gradient: attention.Gradient = "exact",
        dropout: float = 0.0,
        fuse: Literal["head", "weights", "both"] = "head",
        scales: int = 3,
        sizes: Sequence[int] = (),
        weights: str = "none",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if zoom not in ("source", "nested"):
            raise ValueError(f"zoom must be source or nested, got {zoom!r}")
        if isinstance(backbones, str):
            sizes = tuple(sizes) or native_sizes(backbones, scales)
            if len(sizes) != scales:
                raise ValueError(f"sizes has {len(sizes)} entries for {scales} scales")
            modules: Sequence[Backbone] = build_scales(backbones, sizes, weights=weights, drop_path=drop_path)
        else:
            modules = backbones
        self.classes, self.zoom, self.k, self.gradient = classes, zoom, k, gradient
        self.floor, self.ceiling, self.side = floor, ceiling, side
        self.sizes = tuple(backbone.input_size for backbone in modules)
        self.source = source or self.sizes[0]
        last = len(modules) - 1
        self.scales = nn.ModuleList()
        for number, backbone in enumerate(modules):
            apn = self._apn(backbone, apn_hidden) if number < last else None
            self.scales.append(Scale(backbone, classes, dropout=dropout, apn=apn))
        # A single scale is the plain backbone: a fusion layer would add unused weights.
        has_head, has_mixture = last > 0 and fuse != "weights", last > 0 and fuse != "head"
        self.fusion = nn.Linear(sum(backbone.width for backbone in modules), classes) if has_head else None
        self.mixture: Tensor | None
        self.register_buffer("mixture", self._initial_mixture(fuse) if has_mixture else None)
        self.register_buffer("temperatures", torch.ones(len(modules) + 2))
        self.register_buffer("mean", torch.tensor(modules[0].mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(modules[0].std)[:, None, None], persistent=False)

    def _initial_mixture(self, fuse: str) -> Tensor:
        """Weights and temperatures (2, K) of the mixture: all scales alike, without the head."""
        count = len(self.scales)
        weights = torch.full((count,), 1 / count)
        if fuse == "both":
            weights = torch.cat([weights, torch.zeros(1)])
        return torch.stack([weights, torch.ones_like(weights)])

    def _apn(self, backbone: Backbone, hidden: int) -> attention.APN:
        if backbone.map_size == (1, 1):
            raise SizeRefused(
                f"{backbone.name} has a 1×1 feature map at {backbone.input_size} px, which leaves an APN no positions",
                "larger model.sizes, for a map of at least 2×2 (better 7×7), or --scales 1",
            )
        shape = (backbone.channels, *backbone.map_size)
        return attention.APN(shape, hidden, floor=self.floor, ceiling=self.ceiling, side=self.side)

    def scale(self, number: int) -> Scale:
        """Return scale `number`, counted from 0."""
        return cast(Scale, self.scales[number])

    def normalise(self, images: Tensor) -> Tensor:
        """Normalize images (B, 3, H, H), uint8 or floats in [0, 1], as the backbone expects."""
        if images.dtype == torch.uint8:  # in place: these are the largest tensors of a step
            return images.to(self.mean.dtype).mul_(1 / (255 * self.std)).sub_(self.mean / self.std)
        return (images - self.mean) / self.std

    def first_view(self, source: Tensor) -> Tensor:
        """Resize the normalized source (B, 3, H, H) to the view of scale 1 (B, 3, s, s)."""
        # An exported graph takes a source of any size; at the view's own size the crop is the identity.
        if not torch.compiler.is_compiling() and source.shape[-2:] == (self.sizes[0], self.sizes[0]):
            return source
        return attention.zoom(source, attention.full_box(source), self.sizes[0], k=math.inf, gradient="none")

    def next_view(
        self, number: int, source: Tensor, view: Tensor, parent: Tensor, proposal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Crop the view of a finer scale.

        Args:
            number: the finer scale, counted from 0.
            source: (B, 3, H, H) normalized source images.
            view: (B, 3, s, s) the previous scale's view.
            parent: (B, 3) the box of `view` on the source. It is detached, so that each APN gets a gradient from its
                own crop only.
            proposal: (B, 3) box on `view`.

        Returns:
            the view (B, 3, s, s) and its box (B, 3) on the source.
        """
        box = attention.compose(parent.detach(), proposal)
        image, region = (view, proposal) if self.zoom == "nested" else (source, box)
        return attention.zoom(image, region, self.sizes[number], k=self.k, gradient=self.gradient), box

    def scale_probabilities(self, logits: Sequence[Tensor]) -> Tensor:
        """Map the logits S × (B, N) of the scales to their calibrated probabilities (B, S, N)."""
        pairs = zip(logits, self.temperatures[: len(logits)], strict=True)
        return torch.stack([(values.float() / temperature).softmax(dim=1) for values, temperature in pairs], dim=1)

    def classifiers(self, descriptors: Sequence[Tensor], logits: Sequence[Tensor]) -> list[Tensor]:
        """The logits (B, N) that are mixed: of the scales, and of the fusion head if there is one.

        Args:
            descriptors: S × (B, D).
            logits: S × (B, N).
        """
        head = [] if self.fusion is None else [cast(Tensor, self.fusion(join_descriptors(descriptors)))]
        return [*logits, *head]

    def fuse(self, descriptors: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
        """Map the descriptors S × (B, D) and the logits S × (B, N) of the scales to the fused logits (B, N)."""
        classifiers = self.classifiers(descriptors, logits)
        if self.mixture is None:
            return classifiers[-1]  # of the head, or of the only scale
        return log_mixture(classifiers, *self.mixture)

    def forward(self, images: Tensor, proposals: Sequence[Tensor] | None = None) -> Output:
        """Run all scales.

        Args:
            images: (B, 3, H, H) uint8, or floats in [0, 1].
            proposals: S - 1 boxes (B, 3) to use instead of the APNs' own, such as ground-truth boxes.
        """
        source = self.normalise(images)
        return self.refine(source, self.coarse(source), proposals)

    def coarse(self, source: Tensor) -> CoarseOutput:
        """Run scale 1 on normalized source images (B, 3, H, H)."""
        view = self.first_view(source)
        return CoarseOutput(view, *self.scale(0)(view))

    def refine(self, source: Tensor, coarse: CoarseOutput, proposals: Sequence[Tensor] | None = None) -> Output:
        """Run the finer scales.

        Args:
            source: (B, 3, H, H) normalized source images.
            coarse: the result of scale 1 on them.
            proposals: as in `forward`.
        """
        view, box, proposal = coarse.view, attention.full_box(source), coarse.proposal
        logits, descriptors, views = [coarse.logits], [coarse.descriptor], [view]
        boxes, used = [], []
        for number in range(1, len(self.sizes)):
            if proposals is not None:
                proposal = proposals[number - 1]
            assert proposal is not None
            view, box = self.next_view(number, source, view, box, proposal)
            used.append(proposal)
            boxes.append(box)
            views.append(view)
            scale_logits, descriptor, proposal = self.scale(number)(view)
            logits.append(scale_logits)
            descriptors.append(descriptor)
        fused = self.fuse(descriptors, logits)
        return Output(
            probabilities=(fused / self.temperatures[-1]).softmax(dim=1),
            fused=fused,
            logits=tuple(logits),
            boxes=tuple(boxes),
            proposals=tuple(used),
            views=tuple(views),
            descriptors=tuple(descriptors),
        )


def join_descriptors(descriptors: Sequence[Tensor]) -> Tensor:
    """Normalize the descriptors S × (B, D) to unit length and concatenate them: the fusion head's input (B, S * D)."""
    return torch.cat([F.normalize(descriptor, dim=1) for descriptor in descriptors], dim=1)


def sizes_of(model: Model) -> tuple[int, ...]:
    """Return the input side of each scale in pixels: the recipe's, or the backbone's native sizes."""
    return model.sizes or native_sizes(model.backbone, model.scales)


def choose_source(recipe: Recipe, sizes: Sequence[int], side: int) -> int:
    """Choose the side of the source, from which all crops are cut.

    So large that the boxes of every scale, if they have the side `model.side`, have a pixel of the source for each
    pixel of their view; but no larger than the files, than `SOURCE_BYTES` allow, or, with nested crops, than scale 1.

    Args:
        recipe: with any source.
        sizes: input side of each scale in pixels.
        side: of the files, as `Index.side`; 0 if it is not known.
    """
    if recipe.model.zoom == "nested" or not side:
        return sizes[0]
    wanted = max(math.ceil(size / recipe.model.side**number) for number, size in enumerate(sizes))
    largest = math.isqrt(SOURCE_BYTES // (12 * recipe.train.batch))  # three channels of four bytes
    return max(min(wanted, side, largest), sizes[0])


def resolve(recipe: Recipe, *, side: int | None = None) -> Recipe:
    """Fill in what the recipe leaves to the backbone, its weights and the files.

    These are the sizes, `alternate.ramp`, and with `side` the source (see `choose_source`).

    `train.batchnorm = frozen` becomes `train` with random weights, whose BatchNorm layers have no statistics to keep.
    """
    sizes, ramp, batchnorm = sizes_of(recipe.model), recipe.alternate.ramp, recipe.train.batchnorm
    random = recipe.model.weights == "none"
    return recipe.override(
        {
            "model.sizes": list(sizes),
            "data.source": recipe.data.source or (0 if side is None else choose_source(recipe, sizes, side)),
            "alternate.ramp": random if ramp == "auto" else ramp,
            "train.batchnorm": "train" if random and batchnorm == "frozen" else batchnorm,
        }
    )


def build(model: Model, classes: int, *, source: int = 0, weights: str | None = None) -> RACNN:
    """Build the network of a recipe.

    Args:
        model: the recipe's model section.
        classes: number of classes N.
        source: side of the source images in pixels; 0: the first scale's input size.
        weights: overrides the recipe's, such as `none` when a run's own weights are loaded next.

    Raises:
        BackboneError: unknown backbone, a size that it refuses, or weights that do not fit.
    """
    arguments = model.model_dump(exclude={"backbone", "weights"})  # RACNN takes the same names
    return RACNN(model.backbone, classes, source=source, weights=weights or model.weights, **arguments)
