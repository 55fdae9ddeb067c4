"""Any timm model as a backbone: convolutional, NHWC, or tokens put back into a map.

What differs between two models stands in a `Plan`, which `timm_probe` finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from racnn_cli.backbones.contract import Backbone
from torch import Tensor, nn

from racnn_cli.errors import RacnnError


@dataclass(frozen=True)
class Plan:
    """How one timm model at one size becomes a backbone."""

    name: str
    size: int
    options: tuple[tuple[str, Any], ...] = ()  # for timm.create_model
    layout: Literal["NCHW", "NHWC", "NLC"] = "NCHW"
    prefix: int = 0  # class and register tokens in front of the map's own
    own_head: bool = False  # the descriptor goes through the model's own layers before its classifier
    channels: int = 0
    width: int = 0
    map_size: tuple[int, int] = (0, 0)
    unused: tuple[str, ...] = ()  # modules and parameters that the descriptor does not reach


class TimmBackbone(Backbone):
    """A timm model with its classifier, and whatever else does not reach the descriptor, taken off.

    The descriptor is the global average pool of the features. Where the model has trained layers between its
    last map and its classifier (MobileNetV3's last convolution, ConvNeXt's last norm, attention pooling) they
    are part of the descriptor instead. Prefix tokens (class, distillation, registers) steer the map through
    attention and are then dropped.
    """

    def __init__(self, net: Any, plan: Plan) -> None:
        mean, std = normalisation(net)
        super().__init__(
            plan.name,
            channels=plan.channels,
            width=plan.width,
            input_size=plan.size,
            map_size=plan.map_size,
            mean=mean,
            std=std,
        )
        self.layout, self.prefix, self.own_head = plan.layout, plan.prefix, plan.own_head
        self.net = net
        # The model's head counts on its prefix tokens, which are dropped. Attention pooling is told to take
        # all tokens that it gets; any other pool skips as many as the model has, so zeros take their place.
        attends = getattr(net, "attn_pool", None) is not None
        self.padding = 0 if attends else plan.prefix
        if plan.own_head and hasattr(net, "pool_include_prefix"):
            net.pool_include_prefix = attends
        if plan.own_head and plan.layout == "NLC" and getattr(net, "global_pool", "") == "token":
            net.global_pool = "avg"
        for name in plan.unused:
            remove(net, name)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to features (B, C, h, w)."""
        features = self.net.forward_features(images)
        if self.layout == "NHWC":
            return features.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        if self.layout == "NLC":
            tokens = features[:, self.prefix :].transpose(1, 2)  # (B, L, C) -> (B, C, h * w)
            return tokens.unflatten(2, self.map_size)  # (B, C, h * w) -> (B, C, h, w)
        return features

    def descriptor(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) to (B, D), see the class."""
        if not self.own_head:
            return super().descriptor(features)
        if self.layout == "NHWC":
            features = features.permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        elif self.layout == "NLC":
            features = features.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h * w, C)
            features = nn.functional.pad(features, (0, 0, self.padding, 0))  # (B, padding + h * w, C)
        return self.net.forward_head(features, pre_logits=True)


def own_size(name: str) -> int:
    """The side of the square images that the model was made for.

    Raises:
        RacnnError: its images are not square.
    """
    config = timm.get_pretrained_cfg(name)
    _, height, width = config.input_size if config else (3, 224, 224)
    if height != width:
        raise RacnnError(
            f"{name} is made for images of {height}×{width} px; every scale is a square",
            "a size of your own in model.sizes, or another model.backbone",
        )
    return width


def normalisation(net: nn.Module) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the images that the model was trained on, on a scale of [0, 1]."""
    config: Any = net.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def create(name: str, options: tuple[tuple[str, Any], ...], *, pretrained: bool = False) -> Any:
    """timm's model without its classifier."""
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **dict(options))


def classifiers(net: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of the classifier's weights in a checkpoint of this model."""
    config: Any = net.pretrained_cfg
    names = config["classifier"]
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names or ()))


def remove(net: nn.Module, name: str) -> None:
    """Take one module or parameter out.

    A list of modules becomes empty, any other module lets its input pass, a parameter becomes zero.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = net.get_submodule(owner_name)
    found = getattr(owner, leaf)
    if isinstance(found, nn.Parameter):
        delattr(owner, leaf)
        owner.register_buffer(leaf, torch.zeros_like(found.detach()), persistent=False)
    else:
        setattr(owner, leaf, nn.ModuleList() if isinstance(found, nn.ModuleList) else nn.Identity())
