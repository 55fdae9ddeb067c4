"""Where the network looked, as an image: boxes on the upright photograph, and what each box shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from racnn_cli.data.decode import UprightImage
from racnn_cli.data.geometry import Geometry

# Okabe and Ito's colours, which colour-blind readers tell apart; one a scale, in the order of scales.
COLOURS = ("#595959", "#D55E00", "#56B4E9", "#F0E442", "#009E73")
INK, SOFT, PAPER = "#1b1b1b", "#666666", "#ffffff"
NOTHING = "#c8c8c8"  # where a box leaves the image
GAP = 12

Rect = tuple[float, float, float, float]


def upright_boxes(image: UprightImage, boxes: Sequence[Rect]) -> list[Rect]:
    """Boxes x0, y0, x1, y1 in pixels of the file as stored, in pixels of the upright image."""
    geometry = Geometry(image.stored_size, image.orientation, (0.0, 0.0), (1.0, 1.0))
    return [geometry.upright_from_stored(box) for box in boxes]


def panel(pixels: np.ndarray, boxes: Sequence[Rect], *, height: int, width: int) -> Image.Image:
    """The image with its boxes, and at its right what each box shows, enlarged.

    Args:
        pixels: (H, W, 3) uint8, upright.
        boxes: x0, y0, x1, y1 in pixels of `pixels`, from scale 2 on.
        height, width: what the image itself may take; it is enlarged or reduced to fill it.
    """
    source = Image.fromarray(pixels)
    factor = min(height / source.height, width / source.width)
    whole = source.resize(
        (max(1, round(source.width * factor)), max(1, round(source.height * factor))),
        Image.Resampling.LANCZOS,
    )
    draw, line = ImageDraw.Draw(whole), max(3, round(height / 160))
    for number, box in enumerate(boxes, start=2):
        _frame(draw, [value * factor for value in box], _colour(number), line, whole.size)
    if not boxes:
        return whole
    height = max(whole.height, height // 2)  # a flat image leaves its views room all the same
    columns = 1 if len(boxes) <= 2 else 2
    lines = -(-len(boxes) // columns)
    gap = max(4, round(GAP * height / 560))
    side = (height - gap * (lines - 1)) // lines if len(boxes) > 1 else round(height * 0.7)
    top = (height - whole.height) // 2
    sheet = Image.new("RGB", (whole.width + columns * (gap + side), height), PAPER)
    sheet.paste(whole, (0, top))
    offset = (height - lines * side - (lines - 1) * gap) // 2
    for number, box in enumerate(boxes):
        place = (
            whole.width + gap + (number % columns) * (side + gap),
            offset + (number // columns) * (side + gap),
        )
        sheet.paste(_tile(source, box, side, number + 2, line), place)
    return sheet


def sheet(
    pixels: np.ndarray,
    boxes: Sequence[Rect],
    answer: tuple[str, float],
    scales: Sequence[tuple[str, float]],
    name: str,
) -> Image.Image:
    """What `panel` draws, over a caption: the answer, the file's name, what each scale says (the legend)."""
    image = panel(pixels, boxes, height=560, width=840)
    width = max(image.width, 480)
    entries = [
        (number, f"scale {number}: {label} {probability:.2f}")
        for number, (label, probability) in enumerate(scales, start=1)
    ]
    lines = _wrap(entries, width) if len(scales) > 1 else []
    paper = Image.new("RGB", (width + 2 * GAP, image.height + 2 * GAP + 46 + 28 * len(lines)), PAPER)
    paper.paste(image, (GAP + (width - image.width) // 2, GAP))
    draw = ImageDraw.Draw(paper)
    y = image.height + 2 * GAP
    label, probability = answer
    share = f"{probability:.1%}"
    draw.text((GAP, y), _fit(label, _font(30), width * 0.6), INK, _font(30))
    x = GAP + _length(_fit(label, _font(30), width * 0.6), _font(30)) + 14
    draw.text((x, y), share, SOFT, _font(30))
    x += _length(share, _font(30)) + 24
    if width + GAP - x > 60:
        draw.text((width + GAP, y + 11), _fit(name, _font(16), width + GAP - x), SOFT, _font(16), anchor="ra")
    y += 50
    for line in lines:
        x = GAP
        for number, text in line:
            draw.rectangle((x, y + 2, x + 15, y + 17), _colour(number), INK)
            draw.text((x + 23, y), text, INK, _font(17))
            x += _entry(text)
        y += 28
    return paper


def _tile(source: Image.Image, box: Rect, side: int, number: int, line: int) -> Image.Image:
    """What one box shows, on a grey square framed in its scale's colour; the box's own shape is kept."""
    x0, y0, x1, y1 = box
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    colour, room = _colour(number), side - 2 * line
    factor = min(room / (x1 - x0), room / (y1 - y0))
    size = (max(1, round((x1 - x0) * factor)), max(1, round((y1 - y0) * factor)))
    area = (max(x0, 0.0), max(y0, 0.0), min(x1, source.width), min(y1, source.height))
    crop = source.resize(size, Image.Resampling.BICUBIC, box=area)
    tile = Image.new("RGB", (side, side), colour)
    tile.paste(NOTHING, (line, line, side - line, side - line))
    tile.paste(crop, ((side - size[0]) // 2, (side - size[1]) // 2))
    text, font = f"scale {number}", _font(max(10, min(17, side // 10)))
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, _length(text, font) + 14, font.size + 9), colour)
    draw.text((7, 3), text, INK, font)
    return tile


def _frame(
    draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, line: int, size: tuple[int, int]
) -> None:
    """A coloured outline between two dark hairs, so that it shows on any background."""
    x0, y0, x1, y1 = (round(value) for value in box)
    # The frame lies around what the box shows, but never outside the image.
    outer = (max(x0 - line, 0), max(y0 - line, 0), min(x1 + line, size[0]) - 1, min(y1 + line, size[1]) - 1)
    left, top, right, bottom = outer
    right, bottom = max(right, left + 3 * line), max(bottom, top + 3 * line)
    draw.rectangle((left, top, right, bottom), outline=INK, width=line + 2)
    draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=colour, width=line)


def _wrap(entries: list[tuple[int, str]], width: int) -> list[list[tuple[int, str]]]:
    lines: list[list[tuple[int, str]]] = [[]]
    used = 0
    for number, text in entries:
        short = _fit(text, _font(17), width - 23)
        if lines[-1] and used + _entry(short) > width + 20:
            lines.append([])
            used = 0
        lines[-1].append((number, short))
        used += _entry(short)
    return lines


def _entry(text: str) -> int:
    return 23 + round(_length(text, _font(17))) + 28


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut short with an ellipsis where it does not fit."""
    text = " ".join(text.split())
    if _length(text, font) <= width:
        return text
    while text and _length(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def _length(text: str, font: ImageFont.FreeTypeFont) -> int:
    return round(font.getlength(text))


def _colour(number: int) -> str:
    return COLOURS[(number - 1) % len(COLOURS)]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
