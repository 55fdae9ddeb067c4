"""Drawings of predictions: the boxes on the upright image, and an enlarged view of each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from racnn_cli.data.decode import UprightImage
from racnn_cli.data.geometry import Geometry
from racnn_cli.export.prediction import Prediction

# One color per scale: Okabe and Ito's palette, which color-blind readers can tell apart.
COLORS = ("#595959", "#D55E00", "#56B4E9", "#F0E442", "#009E73")
INK, SOFT, PAPER = "#1b1b1b", "#666666", "#ffffff"
OUTSIDE = "#c8c8c8"  # the part of a box that lies outside the image
GAP = 12

Rect = tuple[float, float, float, float]


class _LegendEntry(NamedTuple):
    x: int  # in pixels
    line: int
    text: str


def upright_boxes(image: UprightImage, boxes: Sequence[Rect]) -> list[Rect]:
    """Convert boxes (x0, y0, x1, y1) from pixels of the file as stored to pixels of the upright image."""
    geometry = Geometry(image.stored_size, image.orientation, origin=(0.0, 0.0), extent=(1.0, 1.0))
    return [geometry.upright_from_stored(box) for box in boxes]


def panel(pixels: np.ndarray, boxes: Sequence[Sequence[float]], *, height: int, width: int) -> Image.Image:
    """Draw the image with its boxes, and to its right an enlarged view of each box.

    Args:
        pixels: (H, W, 3) uint8, upright.
        boxes: (x0, y0, x1, y1) in pixels of `pixels`, of scales 2, 3, …
        height, width: the area in pixels that the image is scaled to fit.
    """
    source = Image.fromarray(pixels)
    factor = min(height / source.height, width / source.width)
    whole = source.resize(_scaled(source.width, source.height, factor), Image.Resampling.LANCZOS)
    draw, line = ImageDraw.Draw(whole), max(3, round(height / 160))
    for number, box in enumerate(boxes, start=2):
        _frame(draw, [value * factor for value in box], color=_color(number), line=line)
    if not boxes:
        return whole
    height = max(whole.height, height // 2)  # a wide image must not make the views tiny
    columns = 1 if len(boxes) <= 2 else 2
    rows = -(-len(boxes) // columns)
    gap = max(4, round(GAP * height / 560))
    side = (height - gap * (rows - 1)) // rows if len(boxes) > 1 else round(height * 0.7)
    top = (height - whole.height) // 2
    sheet = Image.new("RGB", (whole.width + columns * (gap + side), height), PAPER)
    sheet.paste(whole, (0, top))
    offset = (height - rows * side - (rows - 1) * gap) // 2
    for number, box in enumerate(boxes):
        position = (whole.width + gap + (number % columns) * (side + gap), offset + (number // columns) * (side + gap))
        sheet.paste(_tile(source, box, side=side, scale=number + 2, line=line), position)
    return sheet


def sheet(pixels: np.ndarray, boxes: Sequence[Rect], prediction: Prediction) -> Image.Image:
    """Draw a panel and its caption.

    Args:
        pixels, boxes: as in `panel`.
        prediction: named in the caption, with the answers of its scales as the legend.
    """
    image = panel(pixels, boxes, height=560, width=840)
    width = max(image.width, 480)
    legend = _legend(prediction.scales, width) if len(prediction.scales) > 1 else []
    lines = legend[-1].line + 1 if legend else 0
    paper = Image.new("RGB", (width + 2 * GAP, image.height + 2 * GAP + 46 + 28 * lines), PAPER)
    paper.paste(image, (GAP + (width - image.width) // 2, GAP))
    draw = ImageDraw.Draw(paper)
    y = image.height + 2 * GAP
    large, small = _font(30), _font(16)
    label, share = _fit(prediction.label, large, width * 0.6), f"{prediction.probability:.1%}"
    draw.text((GAP, y), label, fill=INK, font=large)
    x = GAP + _length(label, large) + 14
    draw.text((x, y), share, fill=SOFT, font=large)
    room = width + GAP - (x + _length(share, large) + 24)
    if room > 60:
        name = _fit(Path(prediction.path or "").name, small, room)
        draw.text((width + GAP, y + 11), name, fill=SOFT, font=small, anchor="ra")
    for number, entry in enumerate(legend, start=1):
        left, top = GAP + entry.x, y + 50 + 28 * entry.line
        draw.rectangle((left, top + 2, left + 15, top + 17), _color(number), INK)
        draw.text((left + 23, top), entry.text, fill=INK, font=_font(17))
    return paper


def _tile(source: Image.Image, box: Sequence[float], *, side: int, scale: int, line: int) -> Image.Image:
    """The view of one box, with its aspect ratio kept, on a gray square framed in its scale's color."""
    x0, y0, x1, y1 = box
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    color, room = _color(scale), side - 2 * line
    factor = min(room / (x1 - x0), room / (y1 - y0))
    size = _scaled(x1 - x0, y1 - y0, factor)
    area = (max(x0, 0.0), max(y0, 0.0), min(x1, source.width), min(y1, source.height))
    crop = source.resize(size, Image.Resampling.BICUBIC, box=area)
    tile = Image.new("RGB", (side, side), color)
    tile.paste(OUTSIDE, (line, line, side - line, side - line))
    tile.paste(crop, ((side - size[0]) // 2, (side - size[1]) // 2))
    text, font = f"scale {scale}", _font(max(10, min(17, side // 10)))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, _length(text, font) + 14, font.size + 9), color)
    draw.text((7, 3), text, fill=INK, font=font)
    return tile


def _frame(draw: ImageDraw.ImageDraw, box: Sequence[float], *, color: str, line: int) -> None:
    """Draw a colored outline between two thin dark lines, visible on any background."""
    x0, y0, x1, y1 = (round(value) for value in box)
    width, height = draw.im.size
    # The frame surrounds the box, clipped to the image.
    left, top = max(x0 - line, 0), max(y0 - line, 0)
    right = max(min(x1 + line, width) - 1, left + 3 * line)
    bottom = max(min(y1 + line, height) - 1, top + 3 * line)
    draw.rectangle((left, top, right, bottom), outline=INK, width=line + 2)
    draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=color, width=line)


def _legend(scales: Sequence[tuple[str, float]], width: int) -> list[_LegendEntry]:
    """An entry per scale, wrapped into lines of `width` pixels."""
    entries: list[_LegendEntry] = []
    x = line = 0
    for number, (label, probability) in enumerate(scales, start=1):
        text = _fit(f"scale {number}: {label} {probability:.2f}", _font(17), width - 23)
        used = 23 + _length(text, _font(17)) + 28
        if x and x + used > width + 20:
            x, line = 0, line + 1
        entries.append(_LegendEntry(x, line, text))
        x += used
    return entries


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, shortened with an ellipsis if it is wider than `width`."""
    text = " ".join(text.split())
    if _length(text, font) <= width:
        return text
    while text and _length(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def _length(text: str, font: ImageFont.FreeTypeFont) -> int:
    return round(font.getlength(text))


def _scaled(width: float, height: float, factor: float) -> tuple[int, int]:
    return max(1, round(width * factor)), max(1, round(height * factor))


def _color(number: int) -> str:
    return COLORS[(number - 1) % len(COLORS)]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
