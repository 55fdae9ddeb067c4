"""`small_cnn`: four convolutions for images of 32 px and more, registered with timm like any other model.

For benchmarks and experiments that run within minutes on one CPU core; it has no pretrained weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

CONFIG = {"input_size": (3, 32, 32), "mean": (0.1,) * 3, "std": (0.25,) * 3, "num_classes": 0, "classifier": "head"}
default_cfgs = generate_default_cfgs({"small_cnn": CONFIG})
WIDTHS = (16, 32, 64, 96)


class SmallCNN(nn.Module):
    """Four blocks of convolution, BatchNorm and ReLU; the first two end with a max-pool, so the stride is 4."""

    def __init__(self, num_classes: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, width in enumerate(WIDTHS):
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            if number < 2:
                layers.append(nn.MaxPool2d(2))
            channels = width
        self.layers = nn.Sequential(*layers)
        self.num_classes, self.num_features = num_classes, channels
        self.head = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to features (B, 96, S / 4, S / 4)."""
        return cast(Tensor, self.layers(images))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, N)."""
        return cast(Tensor, self.head(torch.mean(self.forward_features(images), dim=(2, 3))))


@register_model
def small_cnn(pretrained: bool = False, **options: Any) -> SmallCNN:
    """Build a `SmallCNN`; timm's entry point.

    Raises:
        RuntimeError: pretrained weights were requested; timm raises the same where it has none.
    """
    if pretrained:
        raise RuntimeError("small_cnn has no pretrained weights")
    config = options.pop("pretrained_cfg", None) or default_cfgs["small_cnn"].default
    options.pop("pretrained_cfg_overlay", None)
    options.pop("cache_dir", None)
    net = SmallCNN(**options)
    net.pretrained_cfg = config.to_dict()
    return net
