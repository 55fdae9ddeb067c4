"""Small charts as inline SVG: lines over epochs, and a confusion matrix. report.css has their colors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 26


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: its entry in the legend.
        color: a CSS class.
        pieces: its points (x, y); pieces are not connected to each other.
    """

    name: str
    color: str
    pieces: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Band:
    """A range of epochs, `first` to `last`, drawn behind the lines; every other one is shaded."""

    name: str
    first: int
    last: int


def lines(title: str, series: Sequence[Line], bands: Sequence[Band], *, top: float | None = None) -> Markup:
    """Draw a line chart over epochs, with the stages as bands behind it.

    Args:
        title: its caption.
        series: the lines.
        bands: the stages.
        top: upper end of the y axis; None: a round number above the largest value.

    Returns:
        A `<figure>`; empty if the lines have no finite point.
    """
    values = [y for line in series for piece in line.pieces for _, y in piece if math.isfinite(y)]
    if not values or not bands:
        return Markup()
    ticks = _ticks(min(0.0, *values), top if top is not None else max(values))
    low, high = ticks[0], ticks[-1]
    start, end = bands[0].first - 0.5, bands[-1].last + 0.5

    def x(value: float) -> float:
        return round(LEFT + (value - start) / (end - start) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for number, band in enumerate(bands):
        left, width = x(band.first - 0.5), x(band.last + 0.5) - x(band.first - 0.5)
        style = "band" if number % 2 else "plain"
        parts.append(
            f'<rect class="{style}" x="{left}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(band.name)}</title></rect>"
        )
        if width > 6.2 * len(band.name):
            parts.append(f'<text class="stage" x="{left + width / 2:.1f}" y="{TOP - 8}">{escape(band.name)}</text>')
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{LEFT}" y="{HEIGHT - 6}">epoch {bands[0].first}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{bands[-1].last}</text>')
    for line in series:
        for piece in line.pieces:
            points = [(x(a), y(b)) for a, b in piece if math.isfinite(b)]
            if len(points) > 1:
                path = " ".join(f"{a},{b}" for a, b in points)
                parts.append(f'<polyline class="{line.color}" points="{path}"/>')
            if len(points) <= 40:
                parts += [f'<circle class="{line.color}" cx="{a}" cy="{b}" r="2"/>' for a, b in points]
    legend = "".join(
        f'<span><i class="{line.color}"></i>{escape(line.name)}</span>' for line in series if any(line.pieces)
    )
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def confusion(cells: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """Draw a confusion matrix: rows are true classes, columns predicted classes, shades shares of a row.

    Args:
        cells: (true class, predicted class, number of images); pairs without images may be absent.
        names: class names.
    """
    count = len(names)
    totals = [0] * count
    for label, _, images in cells:
        totals[label] += images
    cell = max(3, min(34, 620 // count))
    labeled = cell >= 16
    margin = min(220, 14 + round(6.6 * max(len(name) for name in names))) if labeled else 8
    side = margin + count * cell + 2
    inner = count * cell - 1
    parts = [f'<rect class="cell" x="{margin}" y="{margin}" width="{inner}" height="{inner}"/>']
    for row, name in enumerate(names if labeled else ()):
        middle = margin + row * cell + cell / 2
        text = escape(name if len(name) <= 32 else name[:31] + "…")
        turn = f"translate({middle + 4:.1f},{margin - 6}) rotate(-90)"
        parts.append(f'<text class="tick" x="{margin - 6}" y="{middle + 4:.1f}" text-anchor="end">{text}</text>')
        parts.append(f'<text class="tick" transform="{turn}">{text}</text>')
    for row, column, images in cells:
        share = images / totals[row]
        left, top = margin + column * cell, margin + row * cell
        kind = "correct" if row == column else "wrong"
        tip = escape(f"{names[row]} predicted as {names[column]}: {images} of {totals[row]}")
        parts.append(
            f'<rect class="{kind}" x="{left}" y="{top}" width="{cell - 1}" height="{cell - 1}" '
            f'fill-opacity="{max(share, 0.08):.3f}"><title>{tip}</title></rect>'
        )
        if labeled:
            style = "strong" if share > 0.55 else "tick"
            parts.append(
                f'<text class="{style}" x="{left + cell / 2 - 0.5}" y="{top + cell / 2 + 4}" '
                f'text-anchor="middle">{images}</text>'
            )
    return Markup(
        f'<svg class="matrix" viewBox="0 0 {side} {side}" width="{side}" role="img" '
        f'aria-label="confusion matrix">{"".join(parts)}</svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers from `low` or below to `high` or above."""
    span = max(high - low, 1e-9)
    least = span / 4
    power = 10 ** math.floor(math.log10(least))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= least * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
