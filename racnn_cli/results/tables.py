"""What `racnn eval` prints: the figures of eval.json as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from racnn_cli.events import EvalBoxes, EvalResult


def caption(result: EvalResult) -> str:
    """The size of the split and the interval of the last line, in words."""
    low, high = result.interval
    return (
        f"{result.images} {result.split} images of {result.classes} classes; "
        f"95 % interval of fused top-1: {low:.3f} to {high:.3f}"
    )


def answer_columns(result: EvalResult) -> list[str]:
    """Heads of the table of answers, after the name."""
    return ["top-1", f"top-{min(5, result.classes)}", "NLL", "ECE"]


def answer_rows(result: EvalResult) -> list[tuple[str, list[str]]]:
    """Name and figures of each answer, as text."""
    return [
        (name, [f"{value:.3f}" for value in (figures.top1, figures.top5, figures.nll, figures.ece)])
        for name, figures in result.answers()
    ]


def box_columns(result: EvalResult) -> list[str]:
    """Heads of the table of boxes, after the scales."""
    compared = result.boxes[0].iou_mean is not None
    return [
        "side",
        "smallest",
        "largest",
        "at floor",
        "at ceiling",
        *(["IoU", "hit", "coverage"] if compared else []),
    ]


def box_rows(result: EvalResult) -> list[tuple[str, list[str]]]:
    """Scales and figures of each zoom, as text."""
    return [(f"{number} to {number + 1}", _box(boxes)) for number, boxes in enumerate(result.boxes, start=1)]


def _box(boxes: EvalBoxes) -> list[str]:
    shown = [f"{value:.3f}" for value in (boxes.side_mean, boxes.side_min, boxes.side_max)]
    shown += [f"{value:.0%}" for value in (boxes.at_floor, boxes.at_ceiling)]
    truth = (boxes.iou_mean, boxes.hit_rate, boxes.coverage_mean)
    return shown + [f"{value:.3f}" for value in truth if value is not None]


def tables(result: EvalResult) -> list[Table]:
    """A table of answers, and one of boxes where there are any."""
    answers = Table(title="Accuracy", min_width=46, title_justify="left", caption_justify="left")
    answers.add_column("")
    for name in answer_columns(result):
        answers.add_column(name, justify="right")
    for name, values in answer_rows(result):
        answers.add_row(name, *values, style="bold" if name == "fused" else None)
    answers.caption = caption(result).replace("; ", "\n")
    if not result.boxes:
        return [answers]
    boxes = Table(title="Boxes", caption="side: share of the side of the scale before", title_justify="left")
    boxes.add_column("zoom")
    for name in box_columns(result):
        boxes.add_column(name, justify="right")
    for name, values in box_rows(result):
        boxes.add_row(name, *values)
    return [answers, boxes]
