"""Load a file as the square source image. Needs no torch, so exported models can use it too."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from racnn_cli.data.color import ValueRange
from racnn_cli.data.decode import ImageSource, StoredImage, decode, upright
from racnn_cli.data.geometry import GREY, Geometry, fit_square

Fit = Literal["crop", "pad", "squash"]


def load_source(
    source: ImageSource, fit: Fit, side: int, value_range: ValueRange | None = None
) -> tuple[np.ndarray, Geometry]:
    """Load an image as a square source image, without augmentation.

    Args:
        source: a file, an image or an array.
        fit, side: as in `to_square`.
        value_range: as in `decode`.

    Returns:
        (side, side, 3) uint8 upright RGB, and the map between source and file.

    Raises:
        DataError: the image cannot be read.
    """
    return to_square(decode(source, min_side=2 * side, value_range=value_range), fit, side)


def to_square(stored: StoredImage, fit: Fit, side: int) -> tuple[np.ndarray, Geometry]:
    """Make a decoded image square.

    Args:
        stored: the image, decoded with a shorter side of at least `2 * side` pixels where the file has them.
        fit: how the image becomes square: `crop` (center crop), `pad` (borders) or `squash` (stretch).
        side: of the square in pixels.

    Returns:
        as `load_source`.
    """
    geometry = fit_square(stored.stored_size, stored.orientation, fit, side)
    width, height = geometry.upright
    (left, top), (extent_w, extent_h) = geometry.origin, geometry.extent
    window = (max(left, 0.0), max(top, 0.0), min(left + extent_w, width), min(top + extent_h, height))
    inner_w = round((window[2] - window[0]) * side / extent_w)
    inner_h = round((window[3] - window[1]) * side / extent_h)
    x0, y0, x1, y1 = (value / stored.reduction for value in geometry.stored_from_upright(window))
    image = stored.image.resize(
        (inner_h, inner_w) if stored.orientation >= 5 else (inner_w, inner_h),
        Image.Resampling.BICUBIC,  # antialiased: Pillow widens the kernel when it shrinks
        box=(max(x0, 0.0), max(y0, 0.0), min(x1, stored.image.width), min(y1, stored.image.height)),
        reducing_gap=3.0,
    )
    image = upright(image, stored.orientation)
    if image.size != (side, side):
        square = Image.new("RGB", (side, side), GREY)
        square.paste(image, ((side - inner_w) // 2, (side - inner_h) // 2))
        image = square
    return np.array(image), geometry  # (side, side, 3)
