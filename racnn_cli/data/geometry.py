"""Map boxes between the square source image and the file it was made from."""

from __future__ import annotations

from dataclasses import dataclass

Rect = tuple[float, float, float, float]
"""x0, y0, x1, y1 with x0 <= x1 and y0 <= y1."""
GREY = (128, 128, 128)
"""Color of the borders of a padded image."""


@dataclass(frozen=True)
class Geometry:
    """The map between three coordinate systems: the stored file, the upright image, the square source.

    The source, [0, 1] x [0, 1], is an axis-aligned window of the upright image. It may extend beyond the image
    (gray borders) and may be stretched. Pixel coordinates are continuous: pixel i covers [i, i + 1].

    Attributes:
        stored: (width, height) of the stored file in pixels.
        orientation: EXIF orientation of the file, 1..8.
        origin: x, y of the source's top left corner in upright pixels; negative with a border.
        extent: width and height of the source in upright pixels.
    """

    stored: tuple[int, int]
    orientation: int
    origin: tuple[float, float]
    extent: tuple[float, float]

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) of the upright image."""
        width, height = self.stored
        return (height, width) if self.orientation >= 5 else (width, height)

    def to_upright(self, box: Rect) -> Rect:
        """Map a source box to upright pixels, clipped to the image."""
        x0, y0, x1, y1 = (self.origin[axis % 2] + value * self.extent[axis % 2] for axis, value in enumerate(box))
        return _clip((x0, y0, x1, y1), *self.upright)

    def to_file(self, box: Rect) -> Rect:
        """Map a source box to pixels of the stored file, clipped to it."""
        return self.stored_from_upright(self.to_upright(box))

    def from_file(self, box: tuple[float, float, float, float]) -> Rect:
        """Map x, y, width, height in pixels of the stored file to a source box, clipped to [0, 1].

        A box outside the source becomes a box without area.
        """
        upright = upright_box(box, self.stored, self.orientation)
        x0, y0, x1, y1 = ((value - self.origin[axis % 2]) / self.extent[axis % 2] for axis, value in enumerate(upright))
        return _clip((x0, y0, x1, y1), 1.0, 1.0)

    def stored_from_upright(self, rect: Rect) -> Rect:
        """Map a box from upright pixels to pixels of the stored file."""
        x0, y0, x1, y1 = rect
        return self._mirror((y0, x0, y1, x1) if self.orientation >= 5 else rect)

    def upright_from_stored(self, rect: Rect) -> Rect:
        """Map a box from pixels of the stored file to upright pixels."""
        x0, y0, x1, y1 = self._mirror(rect)
        return (y0, x0, y1, x1) if self.orientation >= 5 else (x0, y0, x1, y1)

    def _mirror(self, rect: Rect) -> Rect:
        """Undo the orientation's mirroring along each axis of the stored file; its own inverse."""
        x0, y0, x1, y1 = rect
        width, height = self.stored
        if self.orientation in (2, 3, 7, 8):
            x0, x1 = width - x1, width - x0
        if self.orientation in (3, 4, 6, 7):
            y0, y1 = height - y1, height - y0
        return x0, y0, x1, y1


def upright_box(box: tuple[float, float, float, float], stored: tuple[int, int], orientation: int) -> Rect:
    """Map x, y, width, height in pixels of a stored file to a box in pixels of the upright image.

    Args:
        box: as annotated.
        stored: (width, height) of the stored file.
        orientation: EXIF orientation, 1..8.
    """
    x, y, w, h = box
    geometry = Geometry(stored=stored, orientation=orientation, origin=(0.0, 0.0), extent=(1.0, 1.0))
    return geometry.upright_from_stored((x, y, x + w, y + h))


def fit_square(stored: tuple[int, int], orientation: int, fit: str, side: int) -> Geometry:
    """Compute how a file becomes a square of `side` pixels.

    Args:
        stored: (width, height) of the stored file.
        orientation: EXIF orientation, 1..8.
        fit: `crop` (center crop), `pad` (borders) or `squash` (stretch).
        side: of the square in pixels; with `pad` the image between the borders covers whole pixels.
    """
    width, height = (stored[1], stored[0]) if orientation >= 5 else stored
    if fit == "squash":
        origin, extent = (0.0, 0.0), (float(width), float(height))
    elif fit == "crop":
        window = min(width, height)
        origin, extent = ((width - window) / 2, (height - window) / 2), (float(window), float(window))
    else:
        inner_w, inner_h = (max(1, round(length * side / max(width, height))) for length in (width, height))
        left, top = (side - inner_w) // 2, (side - inner_h) // 2
        origin = (-left * width / inner_w, -top * height / inner_h)
        extent = (side * width / inner_w, side * height / inner_h)
    return Geometry(stored=stored, orientation=orientation, origin=origin, extent=extent)


def _clip(rect: Rect, width: float, height: float) -> Rect:
    x0, y0, x1, y1 = rect
    return (min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height))
