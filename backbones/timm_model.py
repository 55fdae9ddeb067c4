"""Any timm model as a backbone: NCHW or NHWC feature maps, or tokens reshaped to a map.

A `Plan`, made by `timm_probe`, describes what is particular to a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from racnn_cli.backbones.contract import Backbone
from racnn_cli.errors import BackboneError


@dataclass(frozen=True)
class Plan:
    """How to turn a timm model into a backbone for one input size."""

    name: str
    size: int
    options: tuple[tuple[str, Any], ...] = ()  # for timm.create_model
    layout: Literal["NCHW", "NHWC", "NLC"] = "NCHW"
    prefix: int = 0  # number of class and register tokens before the map's
    own_head: bool = False  # the descriptor uses the model's trained layers before its classifier
    channels: int = 0
    width: int = 0
    map_size: tuple[int, int] = (0, 0)
    unused: tuple[str, ...] = ()  # modules and parameters that do not affect the descriptor


class TimmBackbone(Backbone):
    """A timm model without its classifier and without any weights that do not affect the descriptor.

    The descriptor is the global average pool of the features. Where the model has trained layers between its last
    map and its classifier (MobileNetV3's last convolution, ConvNeXt's last norm, attention pooling), these compute
    the descriptor instead. Prefix tokens (class, distillation, registers) affect the map through attention and are
    then dropped.
    """

    def __init__(self, net: Any, plan: Plan) -> None:
        config = net.pretrained_cfg
        super().__init__(
            plan.name,
            channels=plan.channels,
            width=plan.width,
            input_size=plan.size,
            map_size=plan.map_size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )
        self.layout, self.prefix, self.own_head = plan.layout, plan.prefix, plan.own_head
        self.net = net
        # The model's head expects its prefix tokens, which are dropped here. Attention pooling is set to use all
        # tokens it gets. Any other pool skips as many tokens as the model has, so zeros are added in their place.
        has_attention_pool = getattr(net, "attn_pool", None) is not None
        self.padding = 0 if has_attention_pool else plan.prefix
        if plan.own_head and hasattr(net, "pool_include_prefix"):
            net.pool_include_prefix = has_attention_pool
        if plan.own_head and plan.layout == "NLC" and getattr(net, "global_pool", "") == "token":
            net.global_pool = "avg"
        for name in plan.unused:
            remove(net, name)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to features (B, C, h, w)."""
        features: Tensor = self.net.forward_features(images)
        if self.layout == "NHWC":
            return features.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        if self.layout == "NLC":
            tokens = features[:, self.prefix :].transpose(1, 2)  # (B, L, C) -> (B, C, h * w)
            return torch.unflatten(tokens, 2, self.map_size)  # (B, C, h * w) -> (B, C, h, w)
        return features

    def descriptor(self, features: Tensor) -> Tensor:
        """Map features (B, C, h, w) to descriptors (B, D), see the class."""
        if not self.own_head:
            return super().descriptor(features)
        if self.layout == "NHWC":
            features = features.permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        elif self.layout == "NLC":
            features = features.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h * w, C)
            features = nn.functional.pad(features, (0, 0, self.padding, 0))  # (B, padding + h * w, C)
        return cast(Tensor, self.net.forward_head(features, pre_logits=True))

    def no_weight_decay(self) -> set[str]:
        """As timm's model says."""
        names = self.net.no_weight_decay() if hasattr(self.net, "no_weight_decay") else ()
        return {f"net.{name}" for name in names}

    def layer_scales(self, decay: float) -> dict[str, float]:
        """By the layers of timm's model (Clark et al., ICLR 2020)."""
        if not hasattr(self.net, "group_matcher"):
            return {}
        groups = param_groups_layer_decay(self.net, layer_decay=decay)
        factors = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
        named = self.net.named_parameters()
        return {f"net.{name}": factors[parameter] for name, parameter in named if parameter in factors}  # if trained


def create(name: str, options: tuple[tuple[str, Any], ...], *, pretrained: bool = False, drop_path: float = 0.0) -> Any:
    """Create timm's model without its classifier.

    Raises:
        BackboneError: the model has no residual branches to skip, and `drop_path` is not 0.
    """
    arguments = dict(options) | ({"drop_path_rate": drop_path} if drop_path else {})
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise BackboneError(f"{name} has no stochastic depth", "model.drop_path = 0") from None
    if drop_path and not any(isinstance(module, DropPath) for module in net.modules()):
        raise BackboneError(f"{name} has no residual branch to skip", "model.drop_path = 0")
    return net


def classifiers(net: nn.Module) -> tuple[str, ...]:
    """Return the name prefixes of the classifier's weights in a checkpoint of this model."""
    config: Any = net.pretrained_cfg
    names = config["classifier"]
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names or ()))


def remove(net: nn.Module, name: str) -> None:
    """Remove a module or a parameter.

    A list of modules becomes empty, any other module becomes the identity, and a parameter becomes a zero buffer.
    """
    path, _, leaf = name.rpartition(".")
    parent = net.get_submodule(path)
    member = getattr(parent, leaf)
    if isinstance(member, nn.Parameter):
        delattr(parent, leaf)
        parent.register_buffer(leaf, torch.zeros_like(member.detach()), persistent=False)
    else:
        setattr(parent, leaf, nn.ModuleList() if isinstance(member, nn.ModuleList) else nn.Identity())
