"""Augment training images. The only module that imports albumentations."""

from __future__ import annotations

import os

# albumentations checks for a newer version at import; do not use the network without being asked to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np

from racnn_cli.data.geometry import GREY
from racnn_cli.recipe import Data


class Augmentation:
    """Random crop, flip, rotation and color jitter, as set in `data.augment`.

    Args:
        data: the recipe's `data`.
        side: of the square output in pixels.
    """

    def __init__(self, data: Data, side: int) -> None:
        self._compose = A.Compose(_transforms(data, side))

    def __call__(self, pixels: np.ndarray, *, seed: int, epoch: int, position: int) -> np.ndarray:
        """Augment (H, W, 3) uint8 to (side, side, 3) uint8; a pure function of the image and the three numbers."""
        # Compose.set_random_seed gives every transform the SAME stream, so that the flip would depend on the
        # position of the crop. Seed each transform separately instead.
        transforms = self._compose.transforms
        states = np.random.SeedSequence((seed, epoch, position)).generate_state(len(transforms))
        for transform, state in zip(transforms, states, strict=True):
            transform.set_random_seed(int(state))
        return self._compose(image=pixels)["image"]


def _transforms(data: Data, side: int) -> list[A.BasicTransform]:
    augment = data.augment
    transforms: list[A.BasicTransform] = []
    if augment.scale < 1.0:
        transforms.append(
            A.RandomResizedCrop(
                size=(side, side),
                scale=(augment.scale, 1.0),
                ratio=(3 / 4, 4 / 3),
                interpolation=cv2.INTER_CUBIC,
                area_for_downscale="image",
            )
        )
    if augment.flip == "horizontal":
        transforms.append(A.HorizontalFlip(p=0.5))
    elif augment.flip == "both":
        transforms.append(A.D4(p=1.0))  # the eight symmetries of a square
    if augment.rotate:
        border = cv2.BORDER_CONSTANT if data.fit == "pad" else cv2.BORDER_REFLECT_101
        transforms.append(A.Rotate(limit=(-augment.rotate, augment.rotate), border_mode=border, fill=GREY, p=1.0))
    if strength := augment.color:
        brightness = (max(0.2, 1 - strength), 1 + strength)
        transforms.append(
            A.ColorJitter(
                brightness=brightness,
                contrast=brightness,
                saturation=(1 - strength, 1 + strength),
                hue=(-strength / 4, strength / 4),
                p=1.0,
            )
        )
    return transforms
