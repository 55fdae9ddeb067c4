"""From a file to the square source image. Knows nothing of torch: what an exported file needs, too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from racnn_cli.data.decode import decode, upright
from racnn_cli.data.geometry import GREY, Geometry, fit_square

Fit = Literal["crop", "pad", "squash"]


def load_source(path: Path | str, fit: Fit, side: int) -> tuple[np.ndarray, Geometry]:
    """The square source image of a file, without any chance in it (validation, test, predict).

    Args:
        path: of the file.
        fit: how an image becomes square: `crop` (the centre), `pad` (borders) or `squash` (stretched).
        side: of the square, in pixels.

    Returns:
        (side, side, 3) uint8 upright RGB, and the map back to the file.

    Raises:
        RacnnError: the file cannot be read.
    """
    decoded = decode(path, least=2 * side)
    orientation, turned = decoded.orientation, decoded.orientation >= 5
    geometry = fit_square(decoded.stored_size, orientation, fit, side)
    width, height = geometry.upright
    (left, top), (wide, high) = geometry.origin, geometry.extent
    window = (max(left, 0.0), max(top, 0.0), min(left + wide, width), min(top + high, height))
    inner = (round((window[2] - window[0]) * side / wide), round((window[3] - window[1]) * side / high))
    x0, y0, x1, y1 = (value / decoded.reduction for value in geometry.stored_from_upright(window))
    image = decoded.image.resize(
        inner[::-1] if turned else inner,
        Image.Resampling.BICUBIC,  # Pillow widens the kernel when it shrinks: antialiased
        box=(max(x0, 0.0), max(y0, 0.0), min(x1, decoded.image.width), min(y1, decoded.image.height)),
        reducing_gap=3.0,
    )
    image = upright(image, orientation)
    if image.size != (side, side):
        square = Image.new("RGB", (side, side), GREY)
        square.paste(image, ((side - inner[0]) // 2, (side - inner[1]) // 2))
        image = square
    return np.array(image), geometry  # (side, side, 3)
