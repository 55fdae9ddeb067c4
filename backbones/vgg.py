"""VGG-11/13/16/19, with and without batch normalization, up to the layer that the paper uses."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from racnn_cli.backbones.contract import Backbone
from racnn_cli.errors import SizeRefused

NAMES = tuple(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn"))
SIZE = 448  # the paper's input of scale 1
STRIDE = 16  # four of the five max-pools


def is_vgg(name: str) -> bool:
    """Return whether `name`, with or without timm's tag of a weight set, is a VGG."""
    return name.partition(".")[0] in NAMES


class Vgg(Backbone):
    """timm's VGG up to the activation of its last convolution (conv5_4 and ReLU in VGG-19), as in the paper.

    Without the last max-pool the stride is 16, and without the 4096-wide layers the descriptor is the global average
    pool. VGG: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
    """

    dropped = ("pre_logits.", "head.", "classifier.")  # name prefixes of a checkpoint's unused layers

    def __init__(self, name: str, net: Any, size: int) -> None:
        config = net.pretrained_cfg
        super().__init__(
            name,
            channels=net.num_features,
            width=net.num_features,
            input_size=size,
            map_size=(size // STRIDE, size // STRIDE),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )
        self.features = nn.Sequential(*list(net.features)[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, 512, H/16, W/16)."""
        return cast(Tensor, self.features(images))


def build(name: str, size: int, *, pretrained: bool = False) -> Vgg:
    """Build a VGG for images of side `size`, with timm's weights or with random ones.

    Raises:
        SizeRefused: the side is not a multiple of the stride.
    """
    if size < STRIDE or size % STRIDE:
        # Pooling would silently drop the last rows and columns, and boxes would no longer match the image.
        lower = max(size // STRIDE, 1) * STRIDE
        raise SizeRefused(
            f"{name} does not take images of {size} px: it takes multiples of {STRIDE} px, such as "
            f"{lower} or {lower + STRIDE}",
            f"{lower} instead of {size} in model.sizes",
        )
    # timm also builds the 4096-wide layers, whose 120 million weights are not needed. On the meta device they cost
    # nothing, and only the convolutions are then allocated and initialized.
    with torch.device("cpu" if pretrained else "meta"):
        net = timm.create_model(name, pretrained=pretrained, num_classes=0)
    model = Vgg(name, net, size)
    if not pretrained:
        model.to_empty(device="cpu")
        for module in model.modules():
            _initialize(module)
    return model


def _initialize(module: nn.Module) -> None:
    """Initialize one layer as timm does."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()
