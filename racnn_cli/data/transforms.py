"""How a training image is varied: the one module that knows albumentations."""

from __future__ import annotations

import os

# albumentations asks a server for its newest version at import; nothing here may use the network unasked.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np

from racnn_cli.data.geometry import GREY
from racnn_cli.recipe import Data


class Augmentation:
    """Random crop, mirror images, rotation and colours, as `data.augment` asks for.

    Args:
        data: the recipe's `data`.
        side: of the square result, in pixels.
    """

    def __init__(self, data: Data, side: int) -> None:
        self._steps = A.Compose(_steps(data, side))

    def __call__(self, pixels: np.ndarray, *, seed: int, epoch: int, position: int) -> np.ndarray:
        """(H, W, 3) uint8 to (side, side, 3) uint8; a pure function of the image and the three numbers."""
        # Compose.set_random_seed would give every step the SAME stream: the mirror image would then depend
        # on the place of the crop. So each step gets a seed of its own.
        states = np.random.SeedSequence((seed, epoch, position)).generate_state(len(self._steps.transforms))
        for step, state in zip(self._steps.transforms, states, strict=True):
            step.set_random_seed(int(state))
        return self._steps(image=pixels)["image"]


def limit_threads() -> None:
    """For a worker process: OpenCV starts no thread pool of its own (nor waits for one lost in a fork)."""
    cv2.setNumThreads(0)


def _steps(data: Data, side: int) -> list[A.BasicTransform]:
    augment = data.augment
    steps: list[A.BasicTransform] = []
    if augment.scale < 1.0:
        steps.append(
            A.RandomResizedCrop(
                size=(side, side),
                scale=(augment.scale, 1.0),
                ratio=(3 / 4, 4 / 3),
                interpolation=cv2.INTER_CUBIC,
                area_for_downscale="image",
            )
        )
    if augment.flip == "horizontal":
        steps.append(A.HorizontalFlip(p=0.5))
    elif augment.flip == "both":
        steps.append(A.D4(p=1.0))  # the eight symmetries of a square: mirror images and quarter turns
    if augment.rotate:
        border = cv2.BORDER_CONSTANT if data.fit == "pad" else cv2.BORDER_REFLECT_101
        steps.append(A.Rotate(limit=(-augment.rotate, augment.rotate), border_mode=border, fill=GREY, p=1.0))
    if strength := augment.color:
        light = (max(0.2, 1 - strength), 1 + strength)
        steps.append(
            A.ColorJitter(
                brightness=light,
                contrast=light,
                saturation=(1 - strength, 1 + strength),
                hue=(-strength / 4, strength / 4),
                p=1.0,
            )
        )
    return steps
