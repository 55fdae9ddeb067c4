"""What every backbone promises to the rest of the toolkit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """A feature extractor: images in, one map of features out, and one vector a map.

    `forward(images (B, 3, H, W)) -> features (B, C, h, w)` and `descriptor(features (B, C, h, w)) -> (B, D)`.
    Images are normalised with `mean` and `std` by the caller. Every parameter of the module takes part in
    `descriptor(forward(images))`: there are no weights that a training could not reach.

    Attributes:
        name: the name that `build` takes.
        channels: C.
        width: D.
        input_size: side of the images in pixels that the module was built for.
        map_size: (h, w) at `input_size`.
        mean, std: normalisation of red, green and blue on a scale of [0, 1].
    """

    def __init__(
        self,
        name: str,
        *,
        channels: int,
        width: int,
        input_size: int,
        map_size: tuple[int, int],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.name = name
        self.channels = channels
        self.width = width
        self.input_size = input_size
        self.map_size = map_size
        self.mean = mean
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to features (B, C, h, w)."""
        raise NotImplementedError

    def descriptor(self, features: Tensor) -> Tensor:
        """Features (B, C, h, w) to one vector an image (B, D): here the global average pool."""
        return torch.mean(features, dim=(2, 3))  # (B, C, h, w) -> (B, C)
