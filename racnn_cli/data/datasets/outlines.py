"""Outlines of smooth curves, tapered strokes and ovals, as polygons.

A point is (x, y) in units of the image's side, y down, so that a drawing is the same at any size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

Box = tuple[float, float, float, float]
Points = np.ndarray | Sequence[Sequence[float] | np.ndarray]

_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)  # (24, 2)


def lerp(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Return the point or points `share` of the way from `first` to `second`."""
    return first + (second - first) * share


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
