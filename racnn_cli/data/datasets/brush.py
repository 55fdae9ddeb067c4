"""Colors, and softly shaded shapes on a Pillow image, in units of the image's side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from racnn_cli.data.datasets.outlines import bounds

Color = tuple[int, ...]
Shape = tuple[np.ndarray, Color, int]  # polygon (n, 2), color, opacity 0..255

SHADING_SIDE = 96  # side in pixels of the small image in which a shape is shaded, for every output size


def mix(first: Color, second: Color, share: float) -> Color:
    """Return the color `share` (0..1) of the way from `first` to `second`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def tint(color: Color, factor: float) -> Color:
    """Darken (`factor` < 1) or lighten (`factor` > 1) a color."""
    return tuple(min(255, round(value * factor)) for value in color)


def pick_color(rng: np.random.Generator, choices: tuple[Color, ...], spread: float = 10.0) -> Color:
    """Choose one of the colors and change it slightly."""
    base = np.asarray(choices[rng.integers(len(choices))], dtype=float)
    color = base + rng.normal(0, spread, 1) + rng.normal(0, spread / 2, 3)
    return tuple(np.clip(color, 0, 255).astype(int).tolist())


class Canvas:
    """An image on which shapes are drawn in relative units.

    Args:
        image: the image to draw on, RGB or L.
        origin: the point at the image's upper left corner.
        span: how many units the image's width covers.
    """

    def __init__(self, image: Image.Image, origin: tuple[float, float] = (0.0, 0.0), span: float = 1.0) -> None:
        self.image = image
        self._origin = np.asarray(origin)
        self._scale = image.width / span
        self._pen = ImageDraw.Draw(image, "RGBA" if image.mode == "RGB" else image.mode)

    def _pixels(self, polygon: np.ndarray) -> list[float]:
        # Pillow counts from pixel centers and fills both border pixels.
        return ((polygon - self._origin) * self._scale - 0.5).ravel().tolist()

    def fill(self, polygon: np.ndarray, color: Color, opacity: int = 255) -> None:
        """Fill a polygon (n, 2)."""
        self._pen.polygon(self._pixels(polygon), fill=(*color, opacity))

    def draw(self, shapes: Iterable[Shape]) -> None:
        """Fill polygons one after the other."""
        for shape in shapes:
            self.fill(*shape)

    def shade(self, outline: np.ndarray, color: Color, patches: Sequence[Shape] = (), *, light: np.ndarray) -> None:
        """Fill an outline (n, 2) like a rounded body: crisp at the border, soft within.

        Args:
            outline: the polygon.
            color: its ground color.
            patches: shapes in other colors that blend softly into the ground color.
            light: direction (2,) towards the light.
        """
        x0, y0, x1, y1 = bounds([outline])
        left, top = (int(np.floor(v * self._scale)) for v in np.array([x0, y0]) - self._origin)
        span = max(x1 - x0, y1 - y0) * 1.06
        side = int(np.ceil(span * self._scale))
        origin = (left / self._scale + self._origin[0], top / self._scale + self._origin[1])

        def mask(side: int, span: float) -> Image.Image:
            canvas = Canvas(Image.new("L", (side, side)), origin, span)
            canvas._pen.polygon(canvas._pixels(outline), fill=255)
            return canvas.image

        soft = Canvas(Image.new("RGB", (SHADING_SIDE, SHADING_SIDE), color), origin, span)
        soft.draw(patches)
        tones = np.asarray(soft.image.filter(ImageFilter.GaussianBlur(SHADING_SIDE / 28)), dtype=np.float32)
        solid = mask(SHADING_SIDE, span).filter(ImageFilter.GaussianBlur(SHADING_SIDE / 12))
        slope_y, slope_x = np.gradient(np.asarray(solid, dtype=np.float32) / 255)
        # The blurred silhouette rises inwards, so its negative slope is the surface's normal.
        lit = -(slope_x * light[0] + slope_y * light[1]) * (SHADING_SIDE / 6)
        tones = np.clip(tones * (1 + 0.42 * np.clip(lit, -1, 0.75))[..., None], 0, 255).astype(np.uint8)
        shaded = Image.fromarray(tones).resize((side, side), Image.Resampling.BICUBIC)
        self.image.paste(shaded, (left, top), mask(side, side / self._scale))
