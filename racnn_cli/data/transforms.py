"""Augment training images. The only module that imports albumentations."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

# albumentations checks for a newer version at import; do not use the network without being asked to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from PIL import Image

from racnn_cli.data.decode import StoredImage, upright
from racnn_cli.data.geometry import GREY, Rect
from racnn_cli.data.square import to_square
from racnn_cli.recipe import Augment, Data

ASPECT = 4 / 3  # largest ratio of the sides of a random crop
LARGEST = 16_000  # side in pixels of what is rotated; OpenCV's limit is 32,767
TRIES = 10  # to fit a random crop into the image


@dataclass(frozen=True)
class Placement:
    """Where an augmented image lies in the upright image: a box, rotated about its center and then mirrored.

    Attributes:
        center: of the box, x and y in pixels of the upright image.
        size: width and height of the box in pixels; the output is square, so different values stretch it.
        angle: of the rotation of the content, in radians.
        flip: mirror the columns.
        turns: quarter turns counterclockwise, after the flip.
    """

    center: tuple[float, float]
    size: tuple[float, float]
    angle: float = 0.0
    flip: bool = False
    turns: int = 0

    @property
    def rect(self) -> Rect:
        """The box before its rotation."""
        (x, y), (width, height) = self.center, self.size
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2

    def apply(self, box: Rect) -> Rect:
        """Map a box in pixels of the upright image to the upright box around it in the output, in [0, 1], clipped."""
        x0, y0, x1, y1 = box
        points = (np.array([(x0, y0), (x1, y0), (x0, y1), (x1, y1)]) - self.center) / self.size
        points = points @ _rotation(self.angle).T
        if self.flip:
            points[:, 0] *= -1
        for _ in range(self.turns):  # counterclockwise, with y down: x becomes -y
            points = np.stack([points[:, 1], -points[:, 0]], axis=1)
        low, high = (np.clip(extreme(points, axis=0) + 0.5, 0, 1) for extreme in (np.min, np.max))
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])


class Augmentation:
    """Random crop, rotation, mirroring and color jitter, as set in `data.augment`.

    Crop, rotation and scale are one resampling with the kernel of evaluation, so that training and evaluation see
    equally sharp images. Half of the images are not rotated.

    Args:
        data: the recipe's `data`.
        side: of the square output in pixels.
    """

    def __init__(self, data: Data, side: int) -> None:
        self.data, self.side = data, side
        self._color = _color_transforms(data.augment)

    def __call__(self, stored: StoredImage, *, seed: int, epoch: int, position: int) -> tuple[np.ndarray, Placement]:
        """Augment a decoded image; a pure function of the image and the three numbers.

        Returns:
            (side, side, 3) uint8, and where it lies in the upright image at the size of the file.
        """
        geometry_seed, color_seed = np.random.SeedSequence((seed, epoch, position)).spawn(2)
        width, height = stored.stored_size if stored.orientation < 5 else stored.stored_size[::-1]
        placement = self.place((width, height), np.random.default_rng(geometry_seed))
        if self.data.augment.scale == 1.0 and not placement.angle:
            pixels = to_square(stored, self.data.fit, self.side)[0]
        else:
            pixels = self._resample(upright(stored.image, stored.orientation), placement, stored.reduction)
        if placement.flip:
            pixels = pixels[:, ::-1]
        pixels = np.ascontiguousarray(np.rot90(pixels, placement.turns))
        for transform, state in zip(self._color, color_seed.generate_state(2), strict=False):
            transform.set_random_seed(int(state))
            pixels = transform(image=pixels)["image"]
        return pixels, placement

    def place(self, size: tuple[int, int], generator: np.random.Generator) -> Placement:
        """Draw where the output lies in an upright image of this width and height in pixels."""
        augment = self.data.augment
        width, height = size
        frame_w, frame_h = float(width), float(height)
        if self.data.fit == "pad" or (self.data.fit == "crop" and augment.scale == 1.0):
            frame_w = frame_h = float(max(size) if self.data.fit == "pad" else min(size))
        stretch = (frame_w, frame_h) if self.data.fit == "squash" else (1.0, 1.0)
        share_w, share_h, x, y = _random_crop(frame_w / stretch[0], frame_h / stretch[1], augment.scale, generator)
        box = share_w * stretch[0], share_h * stretch[1]
        left, top = (width - frame_w) / 2, (height - frame_h) / 2
        center = left + box[0] / 2 + x * (frame_w - box[0]), top + box[1] / 2 + y * (frame_h - box[1])
        turned, angle = generator.random() < 0.5, generator.uniform(-1, 1) * math.radians(augment.rotate)
        flip, turns = generator.random() < 0.5, int(generator.integers(4))
        return Placement(
            center=center,
            size=box,
            angle=angle if turned else 0.0,
            flip=flip and augment.flip != "none",
            turns=turns if augment.flip == "both" else 0,
        )

    def _resample(self, image: Image.Image, placement: Placement, reduction: int) -> np.ndarray:
        """Cut the placement out of an image that is `reduction` times smaller than the file, without mirroring."""
        x0, y0, x1, y1 = (value / reduction for value in placement.rect)
        if placement.angle:
            image = self._rotate(image, (x0, y0, x1, y1), placement.angle)
            x0, y0, x1, y1 = 0.0, 0.0, float(image.width), float(image.height)
        elif min(x0, y0, image.width - x1, image.height - y1) < -1e-6:
            image, (left, top) = _with_border(image, (x0, y0, x1, y1))
            x0, y0, x1, y1 = x0 + left, y0 + top, x1 + left, y1 + top
        resized = image.resize(
            (self.side, self.side),
            Image.Resampling.BICUBIC,  # antialiased, as in `to_square`
            box=(max(x0, 0.0), max(y0, 0.0), min(x1, image.width), min(y1, image.height)),
            reducing_gap=3.0,
        )
        return np.array(resized)

    def _rotate(self, image: Image.Image, rect: Rect, angle: float) -> Image.Image:
        """Cut a rotated box out of an image, at the image's own resolution, where interpolation costs no sharpness.

        Args:
            image: RGB.
            rect: the box in pixels of the image before its rotation.
            angle: by which the content turns, in radians.
        """
        x0, y0, x1, y1 = rect
        # First halve, third, … what is far too large, as `resize` does with a reducing gap.
        factors = [max(int(length / self.side / 3), math.ceil(length / LARGEST), 1) for length in (x1 - x0, y1 - y0)]
        if max(factors) > 1:
            image = image.reduce((factors[0], factors[1]))
            x0, y0, x1, y1 = x0 / factors[0], y0 / factors[1], x1 / factors[0], y1 / factors[1]
        # Keep what the box and the reflection at the image's border can reach.
        center = np.array([x0 + x1, y0 + y1]) / 2
        reach = math.hypot(x1 - x0, y1 - y0) + 8
        left, top = (max(math.floor(value - reach), 0) for value in center)
        right, bottom = (min(math.ceil(v + reach), n) for v, n in zip(center, image.size, strict=True))
        image, center = image.crop((left, top, right, bottom)), center - (left, top)
        size = np.array([x1 - x0, y1 - y0])
        width, height = (max(round(length), 1) for length in size)
        # From pixels of the result to those of the image. The first pixel's center is at 1/2 here, at 0 for OpenCV.
        linear = np.diag(size) @ _rotation(angle).T @ np.diag([1 / width, 1 / height])
        offset = center - linear @ np.array([width, height]) / 2 + linear @ [0.5, 0.5] - 0.5
        pixels = cv2.warpAffine(
            np.asarray(image),
            np.column_stack([linear, offset]),
            (width, height),
            flags=cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT if self.data.fit == "pad" else cv2.BORDER_REFLECT_101,
            borderValue=GREY,
        )
        return Image.fromarray(pixels)


def _random_crop(
    width: float, height: float, smallest: float, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw width, height and relative position of a crop: of `smallest` to all of the area, ratio up to `ASPECT`."""
    x, y = generator.random(2)
    if smallest == 1.0:
        return width, height, x, y
    for _ in range(TRIES):
        area = generator.uniform(smallest, 1.0) * width * height
        ratio = math.exp(generator.uniform(-1, 1) * math.log(ASPECT))
        crop_w, crop_h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if crop_w <= width and crop_h <= height:
            return crop_w, crop_h, x, y
    return min(width, height * ASPECT), min(height, width * ASPECT), 0.5, 0.5


def _rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _with_border(image: Image.Image, rect: Rect) -> tuple[Image.Image, tuple[int, int]]:
    """Surround an image with gray as far as a box reaches; returns it and the width of the left and upper border."""
    x0, y0, x1, y1 = rect
    left, top = max(math.ceil(-x0), 0), max(math.ceil(-y0), 0)
    right, bottom = max(math.ceil(x1 - image.width), 0), max(math.ceil(y1 - image.height), 0)
    canvas = Image.new("RGB", (left + image.width + right, top + image.height + bottom), GREY)
    canvas.paste(image, (left, top))
    return canvas, (left, top)


def _color_transforms(augment: Augment) -> list[A.BasicTransform]:
    """Color jitter and random erasing (Zhong et al., AAAI 2020), as far as they are set."""
    transforms: list[A.BasicTransform] = []
    if strength := augment.color:
        brightness = (max(0.2, 1 - strength), 1 + strength)
        jitter = A.ColorJitter(
            brightness=brightness,
            contrast=brightness,
            saturation=(1 - strength, 1 + strength),
            hue=(-strength / 4, strength / 4),
            p=1.0,
        )
        transforms.append(jitter)
    if augment.erase:
        transforms.append(A.Erasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), fill="random", p=augment.erase))
    return transforms
