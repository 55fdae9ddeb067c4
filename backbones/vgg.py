"""VGG-11/13/16/19, with and without batch normalisation, tapped where the paper taps it."""

from __future__ import annotations

from typing import Any

import timm
import torch
from racnn_cli.backbones.contract import Backbone
from torch import Tensor, nn

from racnn_cli.errors import RacnnError

NAMES = tuple(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn"))
SIZE = 448
STRIDE = 16  # the tap lies behind four of the five max-pools


def is_vgg(name: str) -> bool:
    """Whether `name` (with or without timm's tag of a weight set) is one of these."""
    return name.partition(".")[0] in NAMES


class Vgg(Backbone):
    """timm's VGG up to the activation of its last convolution (conv5_4 and ReLU in VGG-19).

    The last max-pool is left out, which keeps the map at 1/16 of the input, and so are the 4096-wide layers:
    the descriptor is the global average pool. Source of the layout: Simonyan and Zisserman, "Very Deep
    Convolutional Networks for Large-Scale Image Recognition", ICLR 2015; of the tap: the RA-CNN paper.
    """

    dropped = ("pre_logits.", "head.", "classifier.")  # of a checkpoint: the layers behind the tap

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
        """Images (B, 3, H, W) to features (B, 512, H/16, W/16)."""
        return self.features(images)


def build(name: str, size: int, *, pretrained: bool = False) -> Vgg:
    """One VGG for images of side `size`, with timm's weights or with random ones.

    Raises:
        RacnnError: the side is no multiple of one position of the map.
    """
    if size < STRIDE or size % STRIDE:
        # Pooling would leave the last rows and columns out in silence, and a box would no longer mean its place.
        lower = max(size // STRIDE, 1) * STRIDE
        raise RacnnError(
            f"{name} does not take images of {size} px: it takes multiples of {STRIDE} px, near it "
            f"{lower} or {lower + STRIDE}",
            f"{lower} instead of {size} in model.sizes",
        )
    # timm builds the 4096-wide layers too, 120 million weights that are thrown away: on the meta device they
    # cost nothing, and only the convolutions are then made and filled.
    with torch.device("cpu" if pretrained else "meta"):
        net = timm.create_model(name, pretrained=pretrained, num_classes=0)
    model = Vgg(name, net, size)
    if not pretrained:
        model.to_empty(device="cpu")
        for module in model.modules():
            _initialise(module)
    return model


def _initialise(module: nn.Module) -> None:
    """The start values of timm's VGG."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        module.reset_parameters()  # weight 1, bias 0, running statistics of a standard normal
