"""Convert decoded images of any mode to 8-bit sRGB: depth, transparency and color profiles."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

ValueRange = tuple[float, float]
"""The values that become 0 and 255."""

OVERSHOOT = 0.05
"""Share of a range by which values may exceed it, as resampling and noise reduction make them do."""
FLAT = 8
"""An image with fewer levels than this between its darkest and its brightest value is nearly one color."""

FLAT_NOTE = "nearly one color after conversion to 8 bits"
CLIPPED_NOTE = "values far outside data.range were clipped"
ALPHA_NOTE = "transparent everywhere; the alpha channel was ignored"
PROFILE_NOTE = "the color profile is damaged or of another color space and was ignored"

_INTEGER_TOPS = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # 8, 10, 12, 14 and 16 bits
_FLOAT_TOPS = (1.0, 255.0, 65535.0)
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}


@dataclass(frozen=True)
class Levels:
    """The values of an image with more than 8 bits.

    Attributes:
        kind: integers or floats.
        low, high: smallest and largest finite value.
    """

    kind: Literal["integer", "float"]
    low: float
    high: float


def as_range(values: Sequence[float]) -> ValueRange | None:
    """The recipe's `data.range`, which is empty if it is not known."""
    return (values[0], values[1]) if values else None


def choose_range(levels: Iterable[Levels]) -> ValueRange:
    """The range that maps images of one kind to 8 bits: the smallest common range that holds all values.

    Integers are taken as 8, 10, 12, 14 or 16 bits, floats as 0..1, 0..255 or 0..65535 with a slight overshoot. Other
    values, such as negative ones, are mapped from the smallest to the largest.

    Args:
        levels: of one or more images.
    """
    levels = list(levels)
    low, high = min(entry.low for entry in levels), max(entry.high for entry in levels)
    slack = OVERSHOOT if all(entry.kind == "float" for entry in levels) else 0.0
    for top in _FLOAT_TOPS if slack else _INTEGER_TOPS:
        if low >= -slack * top and high <= (1 + slack) * top:
            return 0.0, top
    return low, high


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> tuple[Image.Image, Levels | None, list[str]]:
    """Convert a loaded image of any mode to 8-bit sRGB.

    Grays and floats with more than 8 bits are mapped by `value_range`, transparency is put on white, and an embedded
    color profile is applied.

    Args:
        image: as Pillow loads it.
        value_range: of images with more than 8 bits; None: the range that fits this image.

    Returns:
        The image; the values of an image with more than 8 bits; notes on what was ignored.
    """
    if image.mode.startswith(("I", "F")):
        return deep_to_rgb(np.asarray(image), value_range, transparent=image.info.get("transparency"))
    notes: list[str] = []
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _with_straight_alpha(image)
        alpha = image.getchannel("A")
        if not alpha.getextrema()[1]:
            notes.append(ALPHA_NOTE)
            alpha = None
        image = image.convert("L" if image.mode == "LA" else "RGB")
    elif image.mode not in _SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    image = _apply_profile(image, notes)
    if alpha is not None:
        # As Image.alpha_composite on white, which needs RGBA.
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image, None, notes


def deep_to_rgb(
    values: np.ndarray, value_range: ValueRange | None, *, transparent: object = None
) -> tuple[Image.Image, Levels, list[str]]:
    """Map (H, W) or (H, W, 3) integers or floats of more than 8 bits to 8-bit RGB; returns what `to_rgb` returns.

    Args:
        values: NaN and infinite values become black.
        value_range: as in `to_rgb`.
        transparent: the value of transparent pixels, which become white.
    """
    kind: Literal["integer", "float"] = "float" if values.dtype.kind == "f" else "integer"
    hidden = values == transparent if isinstance(transparent, int) else None
    # Values of 16 bits are exact in float32; others need float64.
    values = values.astype(np.float32 if values.dtype.itemsize == 2 else np.float64)
    if kind == "float":
        values = np.where(np.isfinite(values), values, np.nan)
        finite = values[np.isfinite(values)]
    else:
        finite = values
    levels = Levels(kind, float(finite.min()), float(finite.max())) if finite.size else Levels(kind, 0.0, 0.0)
    low, high = value_range or choose_range([levels])
    values = (values - low) * (255 / max(high - low, 1e-12)) + 0.5
    pixels = np.nan_to_num(values, nan=0.0).clip(0, 255).astype(np.uint8)
    if hidden is not None:
        pixels[hidden] = 255
    slack = OVERSHOOT * (high - low)
    notes = [CLIPPED_NOTE] if levels.high > high + slack or levels.low < low - slack else []
    return Image.fromarray(pixels).convert("RGB"), levels, notes


def is_flat(image: Image.Image) -> bool:
    """Whether an RGB image is nearly one color."""
    return all(high - low < FLAT for low, high in image.getextrema())  # type: ignore[misc]


def _with_straight_alpha(image: Image.Image) -> Image.Image:
    """The image as LA or RGBA with an alpha that its colors are not multiplied with."""
    if image.mode == "La" or (image.mode == "L" and "transparency" in image.info):
        return image.convert("LA")
    return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")


def _apply_profile(image: Image.Image, notes: list[str]) -> Image.Image:
    """An L, RGB, CMYK or LAB image as sRGB."""
    profile = image.info.get("icc_profile")
    if not profile and image.mode != "LAB":
        return image if image.mode == "RGB" else image.convert("RGB")
    try:
        transform = _transform(profile or b"", image.mode)
        converted = None if transform is None else ImageCms.applyTransform(image, transform)
        return converted or image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        notes.append(PROFILE_NOTE)
        return image.convert("RGB")


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of a profile's colors to sRGB; None if they already are sRGB within one level.

    Raises:
        ImageCms.PyCMSError, OSError, ValueError: the profile is damaged, or of another color space than the mode.
    """
    embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else None
    source = embedded or ImageCms.createProfile("LAB")
    space = embedded.profile.xcolor_space.strip() if embedded else "Lab"
    if space != _SPACES[mode]:
        raise ValueError(f"a profile of {space} in an image of {mode}")
    transform = ImageCms.buildTransform(
        source, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC
    )
    if mode in ("RGB", "L"):
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(16, 256, 3)
        colors = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        plain = np.asarray(colors.convert("RGB")).astype(int)
        if np.abs(np.asarray(ImageCms.applyTransform(colors, transform)) - plain).max() <= 1:
            return None
    return transform
