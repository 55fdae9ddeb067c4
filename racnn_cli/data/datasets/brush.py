"""Drawing in relative units: smooth outlines, tapered strokes and softly shaded shapes on a Pillow image.

A point is (x, y) in units of the image's side, y down, so that a drawing is the same at any size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Shape = tuple[np.ndarray, Colour, int]  # polygon (n, 2), colour, opacity 0..255

SOFT = 96  # side in pixels of the small image in which a shape is shaded; the same for every output size


def toward(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """The point or points `share` of the way from `first` to `second`."""
    return first + (second - first) * share


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour `share` (0..1) of the way from `first` to `second`."""
    r, g, b = (round(a + (c - a) * share) for a, c in zip(first, second, strict=True))
    return r, g, b


def tint(colour: Colour, factor: float) -> Colour:
    """A darker (`factor` < 1) or lighter (`factor` > 1) colour."""
    r, g, b = (min(255, round(value * factor)) for value in colour)
    return r, g, b


@functools.cache
def _spread(count: int) -> np.ndarray:
    return np.linspace(0, 1, count)


@functools.cache
def _ring() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (24, 2)


@functools.cache
def _basis(steps: int) -> np.ndarray:
    t = np.arange(steps) / steps
    powers = np.stack([np.ones_like(t), t, t**2, t**3], axis=1)  # (steps, 4)
    catmull_rom = 0.5 * np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]])
    return powers @ catmull_rom


def curve(points: np.ndarray | Sequence[tuple[float, float]], *, closed: bool, steps: int = 8) -> np.ndarray:
    """A smooth curve through `points` (n, 2): Catmull-Rom, `steps` points a segment; returns (m, 2)."""
    knots = np.asarray(points, dtype=float)
    ends = (knots[-1:], knots[:2]) if closed else (knots[:1], knots[-1:])
    padded = np.concatenate([ends[0], knots, ends[1]])
    windows = np.stack([padded[i : len(padded) - 3 + i] for i in range(4)], axis=1)  # (segments, 4, 2)
    smooth = (_basis(steps) @ windows).reshape(-1, 2)  # (segments * steps, 2)
    return smooth if closed else np.concatenate([smooth, knots[-1:]])


def ribbon(path: np.ndarray, width: float | Sequence[float]) -> np.ndarray:
    """The outline (2n, 2) of a stroke along `path` (n, 2); several widths are spread along the path."""
    along = np.empty_like(path)
    along[1:-1] = path[2:] - path[:-2]
    along[0], along[-1] = path[1] - path[0], path[-1] - path[-2]
    widths = np.atleast_1d(width)
    half = np.interp(_spread(len(path)), _spread(len(widths)), widths) / 2
    half = half / (np.sqrt((along * along).sum(axis=1)) + 1e-12)
    offset = along[:, ::-1] * (-1, 1) * half[:, None]
    return np.concatenate([path + offset, (path - offset)[::-1]])


def line(start: np.ndarray, end: np.ndarray, width: float, last: float | None = None) -> np.ndarray:
    """The outline (4, 2) of a straight stroke, `width` wide at its start and `last` at its end."""
    (x0, y0), (x1, y1) = start.tolist(), end.tolist()
    dx, dy = x1 - x0, y1 - y0
    unit = 0.5 / (math.hypot(dx, dy) + 1e-12)
    a, b = width * unit, (width if last is None else last) * unit
    return np.array(
        [
            (x0 - dy * a, y0 + dx * a),
            (x1 - dy * b, y1 + dx * b),
            (x1 + dy * b, y1 - dx * b),
            (x0 + dy * a, y0 - dx * a),
        ]
    )


def oval(
    centre: np.ndarray | tuple[float, float], radius: float, height: float | None = None, turn: float = 0.0
) -> np.ndarray:
    """An ellipse (24, 2) with half axes `radius` and `height` (a circle without), turned by `turn`."""
    points = _ring() * (radius, radius if height is None else height)
    return (points @ rotation(turn) if turn else points) + np.asarray(centre)


def rotation(angle: float) -> np.ndarray:
    """The matrix (2, 2) that turns row vectors by `angle` radians, clockwise on the screen."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]])


def bounds(polygons: Iterable[np.ndarray]) -> tuple[float, float, float, float]:
    """The box x0, y0, x1, y1 around all polygons."""
    points = np.concatenate(list(polygons))
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


class Canvas:
    """An image on which shapes are drawn in relative units.

    Args:
        image: the RGB image that is drawn on.
        origin: the point at the image's upper left corner.
        span: how many units the image's width covers.
    """

    def __init__(
        self, image: Image.Image, origin: tuple[float, float] = (0.0, 0.0), span: float = 1.0
    ) -> None:
        self.image = image
        self._origin = np.asarray(origin)
        self._scale = image.width / span
        self._pen = ImageDraw.Draw(image, "RGBA" if image.mode == "RGB" else image.mode)

    def _pixels(self, polygon: np.ndarray) -> list[float]:
        # Pillow counts from pixel centres and fills both border pixels
        return ((polygon - self._origin) * self._scale - 0.5).ravel().tolist()

    def fill(self, polygon: np.ndarray, colour: Colour, opacity: int = 255) -> None:
        """Fill a polygon (n, 2)."""
        self._pen.polygon(self._pixels(polygon), fill=(*colour, opacity))

    def draw(self, shapes: Iterable[Shape]) -> None:
        """Fill polygons one after the other."""
        for polygon, colour, opacity in shapes:
            self.fill(polygon, colour, opacity)

    def shade(
        self, outline: np.ndarray, colour: Colour, patches: Sequence[Shape], *, light: np.ndarray
    ) -> None:
        """Fill an outline (n, 2) like a rounded body: crisp at the border, soft within.

        Args:
            outline: the polygon.
            colour: its ground colour.
            patches: shapes in other colours that melt into the ground colour.
            light: direction (2,) towards the light.
        """
        x0, y0, x1, y1 = bounds([outline])
        left, top = (int(np.floor(v * self._scale)) for v in np.array([x0, y0]) - self._origin)
        span = max(x1 - x0, y1 - y0) * 1.06
        pixels = int(np.ceil(span * self._scale))
        origin = (left / self._scale + self._origin[0], top / self._scale + self._origin[1])

        soft = Canvas(Image.new("RGB", (SOFT, SOFT), colour), origin, span)
        soft.draw(patches)
        tones = np.asarray(soft.image.filter(ImageFilter.GaussianBlur(SOFT / 28)), dtype=np.float32)
        solid = _mask(outline, SOFT, origin, span).filter(ImageFilter.GaussianBlur(SOFT / 12))
        slope_y, slope_x = np.gradient(np.asarray(solid, dtype=np.float32) / 255)
        # the blurred silhouette rises inwards, so its negative slope is the surface's normal
        lit = -(slope_x * light[0] + slope_y * light[1]) * (SOFT / 6)
        tones = np.clip(tones * (1 + 0.42 * np.clip(lit, -1, 0.75))[..., None], 0, 255).astype(np.uint8)
        shaded = Image.fromarray(tones).resize((pixels, pixels), Image.Resampling.BICUBIC)
        mask = _mask(outline, pixels, origin, pixels / self._scale)
        self.image.paste(shaded, (left, top), mask)


def contains(outline: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which of the points (n, 2) lie within the polygon (m, 2): booleans (n,)."""
    (x0, y0), (x1, y1) = outline.T[:, :, None], np.roll(outline, -1, axis=0).T[:, :, None]
    x, y = points.T
    crosses = ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / np.where(y1 == y0, 1, y1 - y0) + x0)
    return crosses.sum(axis=0) % 2 == 1


def _mask(outline: np.ndarray, pixels: int, origin: tuple[float, float], span: float) -> Image.Image:
    mask = Image.new("L", (pixels, pixels), 0)
    points = ((outline - np.asarray(origin)) * (pixels / span) - 0.5).ravel().tolist()
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask
