"""Recipe values that were given explicitly and change nothing with the other values, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from racnn_cli.data.datasets import find_builtin
from racnn_cli.data.types import Index
from racnn_cli.recipe import Recipe

DRAWN = ("fieldguide", "clutter")
"""Built-in data sets whose images are drawn as `data.sample` says."""
BOX_KEYS = ("model.zoom", "model.floor", "model.ceiling", "model.side", "model.apn_hidden")
APN_KEYS = ("alternate.apn_lr", "alternate.apn_gradient")
PERTURB_KEYS = ("alternate.boxes", "alternate.spread")
GRADIENT_KEYS = ("model.k", "model.gradient")
QUICK_KEYS = (
    "data.images",
    "pretrain_cnn.epochs",
    "pretrain_apn.epochs",
    "alternate.rounds",
    "alternate.cnn_epochs",
    "alternate.first_epochs",
    "alternate.apn_epochs",
    "fusion.epochs",
)


@dataclass(frozen=True)
class Context:
    """What the effect of a recipe value depends on.

    Attributes:
        recipe: as used.
        index: of the images.
        device: type of the device that trains.
        world: number of processes.
    """

    recipe: Recipe
    index: Index
    device: str
    world: int

    @property
    def builtin(self) -> str:
        """Name of the built-in data set, if it is one."""
        builtin = find_builtin(self.recipe.data)
        return builtin[0].name if builtin else ""

    @property
    def backprop(self) -> bool:
        """Whether the APNs learn through the crop."""
        alternate = self.recipe.alternate
        return self.recipe.model.scales > 1 and alternate.apn_gradient == "backprop" and alternate.apn_epochs > 0


RULES: tuple[tuple[tuple[str, ...], Callable[[Context], bool], str], ...] = (
    (
        ("alternate.*", "pretrain_apn.*", "fusion.*", "train.span", "model.fuse", *BOX_KEYS, *GRADIENT_KEYS),
        lambda context: context.recipe.model.scales == 1,
        "the network has one scale and no APN (model.scales = 1)",
    ),
    (
        ("fusion.*",),
        lambda context: context.recipe.model.fuse == "weights",
        "the fusion has no layer to train (model.fuse = weights)",
    ),
    (
        ("pretrain_apn.lr",),
        lambda context: context.recipe.pretrain_apn.epochs == 0,
        "the stage is skipped (pretrain_apn.epochs = 0)",
    ),
    (
        (*APN_KEYS, *PERTURB_KEYS),
        lambda context: context.recipe.alternate.apn_epochs == 0,
        "APN phases are skipped (alternate.apn_epochs = 0)",
    ),
    (
        (*APN_KEYS, *PERTURB_KEYS, "alternate.apn_epochs"),
        lambda context: context.recipe.alternate.rounds == 1,
        "the first round, which is the only one, has no APN phase (alternate.rounds = 1)",
    ),
    (
        PERTURB_KEYS,
        lambda context: context.recipe.alternate.apn_gradient != "perturb",
        "no boxes are perturbed (alternate.apn_gradient = backprop)",
    ),
    (
        GRADIENT_KEYS,
        lambda context: not context.backprop,
        "the crop is not differentiated (alternate.apn_gradient = perturb, or alternate.apn_epochs = 0)",
    ),
    (
        ("model.k",),
        lambda context: context.recipe.model.gradient in ("bilinear", "none"),
        "the gradient has no mask (model.gradient = bilinear or none)",
    ),
    (
        ("alternate.ramp",),
        lambda context: context.recipe.alternate.cnn_epochs == 1,
        "no CNN phase is longer than one epoch (alternate.cnn_epochs = 1)",
    ),
    (
        ("alternate.settle",),
        lambda context: (
            context.recipe.alternate.rounds == 1
            or (context.recipe.alternate.jitter, context.recipe.alternate.tighten) == (0, 0)
        ),
        "jitter and tighten do not decrease (alternate.rounds = 1, or both are 0)",
    ),
    (
        ("train.momentum",),
        lambda context: context.recipe.train.optimizer != "sgd",
        "the optimizer is AdamW (train.optimizer = adamw)",
    ),
    (
        ("train.step_epochs",),
        lambda context: context.recipe.train.schedule != "step",
        "the learning rate has no steps (train.schedule = cosine or constant)",
    ),
    (("train.amp",), lambda context: context.device != "cuda", "autocast is used on CUDA only"),
    (
        ("train.batchnorm",),
        lambda context: context.recipe.train.batchnorm == "synced" and context.world == 1,
        "there is one process only, for which synced is train",
    ),
    (("data.sample.*",), lambda context: context.builtin not in DRAWN, "the images are not drawn by racnn"),
    (("data.sample.distance",), lambda context: context.builtin != "clutter", "only the data set clutter has it"),
    (("data.sample.size",), lambda context: context.builtin == "clutter", "clutter is drawn at the size of the source"),
    (
        ("data.skip_bad", "data.fit", "data.limit", "data.images", "data.augment.*"),
        lambda context: context.builtin == "clutter",
        "every image is drawn anew, as a square",
    ),
    (("data.val",), lambda context: "val" in context.index.own_splits, "the data have a val split of their own"),
    (("data.test",), lambda context: "test" in context.index.own_splits, "the data have a test split of their own"),
)
"""Patterns of keys, the condition under which they change nothing, and the reason; the first that applies counts."""


def without_effect(given: Mapping[str, Any], context: Context) -> dict[str, str]:
    """Find the given values that change nothing.

    Args:
        given: dotted keys that were given explicitly, with their values.
        context: what their effect depends on.

    Returns:
        Key to reason.
    """
    reasons = {}
    for key, value in given.items():
        applying = (reason for keys, applies, reason in RULES if _matches(key, keys) and applies(context))
        if reason := next(applying, ""):
            reasons[key] = reason
        elif context.recipe.quick and key in QUICK_KEYS and value != (used := _value(context.recipe, key)):
            reasons[key] = f"quick replaces it by {used}"
    return reasons


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _value(recipe: Recipe, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)
