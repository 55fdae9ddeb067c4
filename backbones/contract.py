"""The contract that every backbone keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """A feature extractor: images (B, 3, H, W) → features (B, C, h, w) → descriptor (B, D).

    To add a backbone, subclass this and implement `forward` (and `descriptor`, unless it is the average pool), or
    register a model with timm. `tests/backbones/test_contract.py` checks every family for this contract:

    * Shapes are as the attributes say, in float32 and in float64.
    * The caller normalizes the images with `mean` and `std`.
    * Every parameter gets a gradient from `descriptor(forward(images))`: there are no unused weights.
    * Every cell of the feature map contributes to the descriptor.
    * In eval mode a forward pass changes no parameter and no buffer, and the module exports to ONNX.

    Attributes:
        name: the name that `build` takes.
        channels: C.
        width: D.
        input_size: side in pixels of the square images that the module was built for.
        map_size: (h, w) at `input_size`.
        mean, std: normalization of red, green and blue for pixels in [0, 1].
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
        """Map images (B, 3, H, W) to features (B, C, h, w)."""
        raise NotImplementedError

    def descriptor(self, features: Tensor) -> Tensor:
        """Pool features (B, C, h, w) to one vector per image (B, D); by default the global average pool."""
        return torch.mean(features, dim=(2, 3))  # (B, C, h, w) -> (B, C)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with several dimensions that weight decay must leave alone, such as embeddings."""
        return set()

    def layer_scales(self, decay: float) -> dict[str, float]:
        """Factors of the learning rate by the parameter's name: 1 for the last layer, `decay` for the one below, …

        Empty if the layers have no order.
        """
        return {}
