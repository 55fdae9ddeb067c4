"""Drawing in relative units: smooth outlines, tapered strokes and softly shaded shapes on a Pillow image.

A point is (x, y) in units of the image's side, y down, so that a drawing is the same at any size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, ...]
Box = tuple[float, float, float, float]
Shape = tuple[np.ndarray, Color, int]  # polygon (n, 2), color, opacity 0..255
Points = np.ndarray | Sequence[Sequence[float] | np.ndarray]

SHADING_SIDE = 96  # side in pixels of the small image in which a shape is shaded, for every output size
_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)  # (24, 2)


def lerp(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Return the point or points `share` of the way from `first` to `second`."""
    return first + (second - first) * share


def mix(first: Color, second: Color, share: float) -> Color:
    """Return the color `share` (0..1) of the way from `first` to `second`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def tint(color: Color, factor: float) -> Color:
    """Darken (`factor` < 1) or lighten (`factor` > 1) a color."""
    return tuple(min(255, round(value * factor)) for value in color)


@functools.cache
def _catmull_rom(steps: int) -> np.ndarray:
    t = np.arange(steps) / steps
    powers = np.stack([np.ones_like(t), t, t**2, t**3], axis=1)  # (steps, 4)
    return powers @ (0.5 * np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]))


def curve(points: Points, *, closed: bool = False, steps: int = 8) -> np.ndarray:
    """Return a smooth curve (m, 2) through `points` (n, 2): Catmull-Rom, `steps` points per segment."""
    knots = np.asarray(points, dtype=float)
    before, after = (knots[-1:], knots[:2]) if closed else (knots[:1], knots[-1:])
    padded = np.concatenate([before, knots, after])
    windows = np.stack([padded[i : len(padded) - 3 + i] for i in range(4)], axis=1)  # (segments, 4, 2)
    smooth = (_catmull_rom(steps) @ windows).reshape(-1, 2)  # (segments * steps, 2)
    return smooth if closed else np.concatenate([smooth, knots[-1:]])


def ribbon(path: np.ndarray, *widths: float) -> np.ndarray:
    """Return the outline (2n, 2) of a stroke along `path` (n, 2); `widths` are spread evenly along the path."""
    along = np.concatenate([path[1:2] - path[:1], path[2:] - path[:-2], path[-1:] - path[-2:-1]])
    half = np.interp(np.linspace(0, 1, len(path)), np.linspace(0, 1, len(widths)), widths) / 2
    half = half / (np.sqrt((along * along).sum(axis=1)) + 1e-12)
    offset = along[:, ::-1] * (-1, 1) * half[:, None]
    return np.concatenate([path + offset, (path - offset)[::-1]])


def line(start: np.ndarray, end: np.ndarray, width: float, end_width: float | None = None) -> np.ndarray:
    """Return the outline (4, 2) of a straight stroke; like `ribbon` with two points, but faster."""
    dx, dy = (end - start).tolist()
    unit, normal = 0.5 / (math.hypot(dx, dy) + 1e-12), np.array([-dy, dx])
    first, last = normal * (width * unit), normal * ((width if end_width is None else end_width) * unit)
    return np.array([start + first, end + last, end - last, start - first])


def oval(center: np.ndarray, radius: float, height: float | None = None, turn: float = 0.0) -> np.ndarray:
    """Return an ellipse (24, 2) with half axes `radius` and `height` (default: a circle), turned by `turn`."""
    points = CIRCLE * (radius, radius if height is None else height)
    return (points @ rotation(turn) if turn else points) + center


def rotation(angle: float) -> np.ndarray:
    """Return the matrix (2, 2) that turns row vectors by `angle` radians, clockwise on the screen."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]])


def bounds(polygons: Iterable[np.ndarray]) -> Box:
    """Return the box x0, y0, x1, y1 around all polygons."""
    points = np.concatenate(list(polygons))
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def contains(outline: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return which of the points (n, 2) lie within the polygon (m, 2): booleans (n,)."""
    (x0, y0), (x1, y1) = outline.T[:, :, None], np.roll(outline, -1, axis=0).T[:, :, None]
    x, y = points.T
    crosses = ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / np.where(y1 == y0, 1, y1 - y0) + x0)
    return crosses.sum(axis=0) % 2 == 1


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
