"""The figures of `bench attention` as one page: its tables, and every figure over the phases as a chart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

import racnn_cli
from racnn_cli.bench import Figures
from racnn_cli.results import chart
from racnn_cli.results.report import STYLE

SPLITS = {"test": "test images", "val": "validation images"}
COLOURS = 5
BOX = {
    "iou_mean": "IoU",
    "hit_rate": "Hit rate",
    "coverage_mean": "Coverage",
    "side_mean": "Side, share of the scale before",
    "side_std": "Standard deviation of the side over the images",
    "centre_std": "Standard deviation of the centre over the images",
    "at_floor": "Share of boxes at the floor",
    "at_ceiling": "Share of boxes at the ceiling",
}

Moments = Sequence[Mapping[str, Any]]
Pick = Callable[[Mapping[str, Any]], float]


def page(figures: Figures) -> str:
    """Of what `attention.summary` gives."""
    values, moments = figures.values, figures.values["moments"]
    bands, start = [], 0
    for number, entry in enumerate(moments):
        if entry["epochs"] > start:  # a stage of no epochs has no place on the axis
            name = entry["moment"].removeprefix("alternate: ").partition(" phase")[0]
            bands.append(chart.Band(name, start + 1, entry["epochs"], number % 2 == 1))
        start = entry["epochs"]
    title = f"{values['recipe']}: attention, seeds {', '.join(str(run['seed']) for run in values['runs'])}"
    sections = [("Figures", "".join(_table(table) for table in figures.tables))]
    for split, words in SPLITS.items():
        charts = [*_means(moments, bands, split), *_seeds(values["runs"], bands, split)]
        sections.append((f"On {words}, after each phase", f'<div class="charts">{"".join(charts)}</div>'))
    body = "".join(f"<section><h2>{escape(head)}</h2>{content}</section>" for head, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<header><h1>{escape(title)}</h1></header><main>{body}</main>"
        f"<footer>racnn {racnn_cli.__version__}</footer></body></html>\n"
    )


def _means(moments: Moments, bands: Sequence[chart.Band], split: str) -> list[str]:
    """Each figure, the mean over the seeds."""
    zooms = max((len(entry[split].get("boxes", ())) for entry in moments if split in entry), default=0)
    answers = [*(f"scale {number + 1}" for number in range(zooms + 1)), "average", "fused"]
    colours = [*(f"s{number + 1}" for number in range(zooms + 1)), "average", "fused"]
    top1 = [
        _line(name, colour, moments, split, _at("top1", name, "mean"))
        for name, colour in zip(answers, colours, strict=True)
    ]
    rank = _line("rank loss", "fused", moments, split, _at("rank", "mean"))
    charts = [chart.lines("Top-1", top1, bands, top=1.0), chart.lines("Rank loss", [rank], bands)]
    for key, title in BOX.items():
        lines = [
            _line(
                f"box of scale {zoom + 2}",
                f"s{zoom + 2}",
                moments,
                split,
                _at("boxes", zoom, key, "mean"),
            )
            for zoom in range(zooms)
        ]
        charts.append(chart.lines(title, lines, bands, top=1.0 if key.startswith("at_") else None))
    return charts


def _seeds(runs: Sequence[Mapping[str, Any]], bands: Sequence[chart.Band], split: str) -> list[str]:
    """The two figures that matter most, a line a seed."""
    wanted = {
        "IoU of the finest box, each seed": _at("boxes", -1, "iou_mean"),
        "Fused top-1, each seed": _at("top1", "fused"),
    }
    return [
        chart.lines(
            title,
            [
                _line(
                    f"seed {entry['seed']}",
                    f"s{number % COLOURS + 1}",
                    entry["arms"]["learned"]["moments"],
                    split,
                    pick,
                )
                for number, entry in enumerate(runs)
            ],
            bands,
        )
        for title, pick in wanted.items()
    ]


def _at(*path: str | int) -> Pick:
    """What lies at the end of a path of keys and places."""

    def pick(found: Any) -> float:
        for step in path:
            found = found[step]
        return found

    return pick


def _line(name: str, colour: str, moments: Moments, split: str, pick: Pick) -> chart.Line:
    """One point a moment that has the figure, at the epoch that ends it."""
    points = []
    for entry in moments:
        try:
            points.append((float(entry["epochs"]), pick(entry[split])))
        except KeyError:  # with one scale, or without true boxes, it was not measured
            continue
    return chart.Line(name, colour, [points] if points else [])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(str(column.header))}</th>' for column in table.columns)
    rows = []
    for first, *rest in zip(*(column.cells for column in table.columns), strict=True):
        cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in rest)
        rows.append(f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>')
    notes = "<br>".join(escape(line) for line in str(table.caption).splitlines())
    return (
        f"<h3>{escape(str(table.title))}</h3>"
        f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><p>{notes}</p>"
    )
