"""Where a square source image lies in its file, and back: rotation, crop, borders and resize undone."""

from __future__ import annotations

from dataclasses import dataclass

Rect = tuple[float, float, float, float]
"""x0, y0, x1, y1 with x0 <= x1 and y0 <= y1."""
GREY = (128, 128, 128)
"""Colour of the borders of a padded image."""


@dataclass(frozen=True)
class Geometry:
    """The map between three frames: the file as stored, the upright image, the square source.

    The source, [0, 1] x [0, 1], is an axis-aligned window of the upright image, which may reach over its
    border (grey borders) and may be stretched. Pixel coordinates are continuous: pixel i covers [i, i + 1].

    Attributes:
        stored: (width, height) of the file as stored, in pixels.
        orientation: EXIF orientation 1..8 of the file.
        origin: x, y of the source's top left corner in upright pixels; negative where there is a border.
        extent: width and height of the source in upright pixels.
    """

    stored: tuple[int, int]
    orientation: int
    origin: tuple[float, float]
    extent: tuple[float, float]

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) of the image as it is meant to be seen."""
        width, height = self.stored
        return (height, width) if self.orientation >= 5 else (width, height)

    def to_upright(self, box: Rect) -> Rect:
        """A rectangle of the source in upright pixels, clipped to them."""
        x0, y0, x1, y1 = (
            self.origin[axis % 2] + value * self.extent[axis % 2] for axis, value in enumerate(box)
        )
        return _clip((x0, y0, x1, y1), *self.upright)

    def to_file(self, box: Rect) -> Rect:
        """A rectangle of the source in pixels of the file as stored, clipped to it."""
        return self.stored_from_upright(self.to_upright(box))

    def from_file(self, box: tuple[float, float, float, float]) -> Rect:
        """x, y, width, height in pixels of the file as stored, as x0, y0, x1, y1 in source units.

        Clipped to [0, 1]: a box that lies outside the source comes back without area.
        """
        x, y, w, h = box
        upright = self.upright_from_stored((x, y, x + w, y + h))
        x0, y0, x1, y1 = (
            (value - self.origin[axis % 2]) / self.extent[axis % 2] for axis, value in enumerate(upright)
        )
        return _clip((x0, y0, x1, y1), 1.0, 1.0)

    def stored_from_upright(self, rect: Rect) -> Rect:
        """A rectangle in upright pixels, in pixels of the file as stored."""
        x0, y0, x1, y1 = rect
        width, height = self.stored
        if self.orientation >= 5:
            x0, y0, x1, y1 = y0, x0, y1, x1
        if self.orientation in (2, 3, 7, 8):
            x0, x1 = width - x1, width - x0
        if self.orientation in (3, 4, 6, 7):
            y0, y1 = height - y1, height - y0
        return x0, y0, x1, y1

    def upright_from_stored(self, rect: Rect) -> Rect:
        """A rectangle in pixels of the file as stored, in upright pixels."""
        x0, y0, x1, y1 = rect
        width, height = self.stored
        if self.orientation in (2, 3, 7, 8):
            x0, x1 = width - x1, width - x0
        if self.orientation in (3, 4, 6, 7):
            y0, y1 = height - y1, height - y0
        return (y0, x0, y1, x1) if self.orientation >= 5 else (x0, y0, x1, y1)


def fit_square(stored: tuple[int, int], orientation: int, fit: str, side: int) -> Geometry:
    """How a file becomes a square of `side` pixels.

    Args:
        stored: (width, height) of the file as stored.
        orientation: EXIF orientation 1..8.
        fit: `crop` (the centre), `pad` (borders) or `squash` (stretched).
        side: of the square, in pixels; the image between two borders is a whole number of them.
    """
    width, height = (stored[1], stored[0]) if orientation >= 5 else stored
    if fit == "squash":
        return Geometry(stored, orientation, (0.0, 0.0), (float(width), float(height)))
    if fit == "crop":
        window = min(width, height)
        origin = ((width - window) / 2, (height - window) / 2)
        return Geometry(stored, orientation, origin, (float(window), float(window)))
    inner_w, inner_h = (max(1, round(length * side / max(width, height))) for length in (width, height))
    left, top = (side - inner_w) // 2, (side - inner_h) // 2
    return Geometry(
        stored,
        orientation,
        (-left * width / inner_w, -top * height / inner_h),
        (side * width / inner_w, side * height / inner_h),
    )


def _clip(rect: Rect, width: float, height: float) -> Rect:
    x0, y0, x1, y1 = rect
    return (
        min(max(x0, 0.0), width),
        min(max(y0, 0.0), height),
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
    )
