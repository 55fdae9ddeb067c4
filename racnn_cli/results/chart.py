"""Small charts as HTML and inline SVG: lines over epochs, bars, confusion. The page has the colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 26


@dataclass(frozen=True)
class Line:
    """Attributes: name; colour, a CSS class; points (x, y), broken into pieces where a new list starts."""

    name: str
    colour: str
    pieces: list[list[tuple[float, float]]]


@dataclass(frozen=True)
class Band:
    """A stretch of epochs. Attributes: name; first and last epoch; shaded or plain."""

    name: str
    first: int
    last: int
    shaded: bool


def lines(title: str, series: Sequence[Line], bands: Sequence[Band], *, top: float | None = None) -> str:
    """A line chart over epochs, with the stages as bands behind it; empty where there is nothing to draw.

    Args:
        title: what is drawn.
        series: the lines.
        bands: the stages.
        top: upper end of the y axis; None: a round number above the largest value.
    """
    values = [y for line in series for piece in line.pieces for _, y in piece if math.isfinite(y)]
    if not values or not bands:
        return ""
    ticks = _ticks(min(0.0, *values), top if top is not None else max(values))
    low, high = ticks[0], ticks[-1]
    start, end = bands[0].first - 0.5, bands[-1].last + 0.5

    def x(value: float) -> float:
        return round(LEFT + (value - start) / (end - start) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for band in bands:
        left, wide = x(band.first - 0.5), x(band.last + 0.5) - x(band.first - 0.5)
        style = "band" if band.shaded else "plain"
        parts.append(
            f'<rect class="{style}" x="{left}" y="{TOP}" width="{wide:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(band.name)}</title></rect>"
        )
        if wide > 6.2 * len(band.name):
            parts.append(
                f'<text class="stage" x="{left + wide / 2:.1f}" y="{TOP - 8}">{escape(band.name)}</text>'
            )
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{LEFT}" y="{HEIGHT - 6}">epoch {bands[0].first}</text>')
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{bands[-1].last}</text>'
    )
    for line in series:
        for piece in line.pieces:
            points = [(x(a), y(b)) for a, b in piece if math.isfinite(b)]
            if len(points) > 1:
                path = " ".join(f"{a},{b}" for a, b in points)
                parts.append(f'<polyline class="{line.colour}" points="{path}"/>')
            if len(points) <= 40:
                parts += [f'<circle class="{line.colour}" cx="{a}" cy="{b}" r="2"/>' for a, b in points]
    legend = "".join(
        f'<span><i class="{line.colour}"></i>{escape(line.name)}</span>'
        for line in series
        if any(line.pieces)
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def bars(entries: Sequence[tuple[str, float | None, int]]) -> str:
    """A bar a class: name, share of its images that were named right (None without images), their number."""
    rows = []
    for name, share, count in entries:
        shown = "no images" if share is None else f"{share:.0%} of {count}"
        width = 0 if share is None else 100 * share
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th>'
            f'<td class="track"><div style="width:{width:.1f}%"></div></td><td>{shown}</td></tr>'
        )
    return f'<table class="bars">{"".join(rows)}</table>'


def confused(cells: Sequence[Sequence[int]], names: Sequence[str], most: int = 30) -> str:
    """The pairs that are mixed up most often, for more classes than a heat map shows.

    Args:
        cells: each class' number, that of what it was taken for, and how many images that were.
        names: of the classes.
        most: so many pairs.
    """
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])[:most]
    rows = [
        f'<tr><th scope="row">{escape(names[truth])}</th><td>{escape(names[answer])}</td><td>{images}</td></tr>'
        for truth, answer, images in wrong
    ]
    head = '<tr><th scope="col">it is</th><th scope="col">taken for</th><th scope="col">images</th></tr>'
    return f'<table class="figures"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def confusion(cells: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A heat map: rows are the truth, columns the answers, shades are shares of a row.

    Args:
        cells: as in `confused`; what is not among them is 0.
        names: of the classes.
    """
    count = len(names)
    totals = [0] * count
    for truth, _, images in cells:
        totals[truth] += images
    cell = max(3, min(34, 620 // count))
    written = cell >= 16
    margin = min(220, 14 + round(6.6 * max(len(name) for name in names))) if written else 8
    side = margin + count * cell + 2
    whole = count * cell - 1
    parts = [f'<rect class="cell" x="{margin}" y="{margin}" width="{whole}" height="{whole}"/>']
    for row, name in enumerate(names):
        middle = margin + row * cell + cell / 2
        if written:
            text = escape(name if len(name) <= 32 else name[:31] + "…")
            parts.append(
                f'<text class="tick" x="{margin - 6}" y="{middle + 4:.1f}" text-anchor="end">{text}</text>'
            )
            turn = f"translate({middle + 4:.1f},{margin - 6}) rotate(-90)"
            parts.append(f'<text class="tick" transform="{turn}">{text}</text>')
    for row, column, value in cells:
        share = value / totals[row]
        left, top = margin + column * cell, margin + row * cell
        square = f'x="{left}" y="{top}" width="{cell - 1}" height="{cell - 1}"'
        kind = "right" if row == column else "wrong"
        tip = escape(f"{names[row]} taken for {names[column]}: {value} of {totals[row]}")
        parts.append(
            f'<rect class="{kind}" {square} fill-opacity="{max(share, 0.08):.3f}"><title>{tip}</title></rect>'
        )
        if written:
            style = "strong" if share > 0.55 else "tick"
            parts.append(
                f'<text class="{style}" x="{left + cell / 2 - 0.5}" y="{top + cell / 2 + 4}" '
                f'text-anchor="middle">{value}</text>'
            )
    return (
        f'<svg class="matrix" viewBox="0 0 {side} {side}" width="{side}" role="img" '
        f'aria-label="confusion matrix">{"".join(parts)}</svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to seven of them, from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-9)
    rough = span / 4
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
