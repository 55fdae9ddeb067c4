"""The figures of eval.json as tables of text, for the terminal and the report."""

from __future__ import annotations

from dataclasses import dataclass

import rich.table
import rich.text

from racnn_cli.events import EvalAnswer, EvalBoxes, EvalResult


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: its heading.
        columns: the column heads; the first is that of the row names.
        rows: each a name and its values.
        caption: one or more lines.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    caption: str


def accuracy(result: EvalResult) -> Table:
    """The figures of the baseline, each scale, their average and the fusion head."""
    low, high = result.interval
    lines = [
        f"{result.describe_images()} of {result.classes} classes",
        f"95% interval of fused top-1: {low:.3f} to {high:.3f}",
        "mean class: mean of the top-1 of each class",
    ]
    if result.fused.temperature is not None:
        lines.append("T: temperature, fitted on the validation split; NLL/T, ECE/T: with it")
    return Table(
        title="Accuracy",
        columns=["", "top-1", "mean class", f"top-{min(5, result.classes)}", "NLL", "ECE", "T", "NLL/T", "ECE/T"],
        rows=[(name, _answer(answer)) for name, answer in result.answers()],
        caption="\n".join(lines + comparison(result)),
    )


def comparison(result: EvalResult) -> list[str]:
    """What makes the comparison with the baseline fair, one line each: the epochs and rounds kept, and the compute."""
    lines = [f"{choice.stage}: {choice.describe()}" for choice in result.choices if choice.kept != choice.last]
    if (baseline := result.baseline) is None:
        return lines
    lines += [f"baseline: {choice.describe()}" for choice in baseline.choices]
    if (budget := baseline.budget) is not None:
        run, plain = budget.run, budget.baseline
        lines.append(f"compute of a prediction: {_giga(run.prediction)} GFLOPs, baseline {_giga(plain.prediction)}")
        lines.append(
            f"compute of training, forward and backward: {_giga(run.training)} GFLOPs, baseline {_giga(plain.training)}"
        )
    return lines


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.3g}" if flops < 1e11 else f"{flops / 1e9:,.0f}"


def _answer(answer: EvalAnswer) -> list[str]:
    values = [answer.top1, answer.mean_class, answer.top5, answer.nll, answer.ece]
    cells = [*values, answer.temperature, answer.calibrated_nll, answer.calibrated_ece]
    digits = [3, 3, 3, 3, 3, 2, 3, 3]  # the table fits into 80 columns
    # Older files do not have all of them.
    return ["" if value is None else f"{value:.{count}f}" for value, count in zip(cells, digits, strict=True)]


def remarks(result: EvalResult) -> list[str]:
    """What was left out, notes and warnings, one line each."""
    lines = [result.describe_left_out()] if result.left_out else []
    lines += [f"note: {note}" for note in result.notes]
    return lines + [f"warning: {warning}" for warning in result.warnings]


def boxes(result: EvalResult) -> Table:
    """The figures of the boxes of scales 2, 3, …"""
    columns = ["zoom", "side", "smallest", "largest", "at floor", "at ceiling"]
    caption = "side: relative to the previous scale"
    if result.boxes and result.boxes[0].iou_mean is not None:
        columns += ["IoU", "hit", "coverage"]
        caption += "\nIoU, hit (its center is in the box) and coverage: of the ground-truth box"
    return Table(
        title="Boxes",
        columns=columns,
        rows=[(f"{scale} to {scale + 1}", _box(box)) for scale, box in enumerate(result.boxes, start=1)],
        caption=caption,
    )


def _box(box: EvalBoxes) -> list[str]:
    values = [f"{value:.3f}" for value in (box.side_mean, box.side_min, box.side_max)]
    values += [f"{value:.0%}" for value in (box.at_floor, box.at_ceiling)]
    compared = (box.iou_mean, box.hit_rate, box.coverage_mean)
    return values + [f"{value:.3f}" for value in compared if value is not None]


def tables(result: EvalResult, width: int = 100) -> list[rich.table.Table | rich.text.Text]:
    """The accuracy, and the boxes if there is more than one scale, for a terminal of this width in characters.

    A table that is too wide would cut its figures; it becomes lines of text.
    """
    shown = [accuracy(result), *([boxes(result)] if result.boxes else [])]
    return [_to_rich(table) if _width(table) <= width else _to_text(table) for table in shown]


def _width(table: Table) -> int:
    cells = zip(table.columns, *([name, *values] for name, values in table.rows), strict=True)
    return 1 + sum(max(map(len, column)) + 3 for column in cells)


def _to_text(table: Table) -> rich.text.Text:
    lines = [table.title]
    for name, values in table.rows:
        pairs = zip(table.columns[1:], values, strict=True)
        lines.append(f"{name}: " + ", ".join(f"{column} {value}" for column, value in pairs if value))
    return rich.text.Text("\n".join([*lines, table.caption]))


def _to_rich(table: Table) -> rich.table.Table:
    output = rich.table.Table(
        title=table.title, caption=table.caption, title_justify="left", caption_justify="left", min_width=46
    )
    for number, name in enumerate(table.columns):
        output.add_column(name, justify="right" if number else "left")
    for name, values in table.rows:
        output.add_row(name, *values, style="bold" if name == "fused" else None)
    return output
