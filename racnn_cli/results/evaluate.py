"""`racnn eval`: every figure that a run is judged by, as eval.json and as a table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, FiniteFloat, ValidationError, model_validator
from rich.table import Table
from torch import Tensor

from racnn_cli.core import metrics, store
from racnn_cli.core.device import pick
from racnn_cli.core.model import RACNN, sizes_of
from racnn_cli.data.decode import show
from racnn_cli.data.images import Pictures, batches
from racnn_cli.data.index import SPLITS, Index, build_index, labelled
from racnn_cli.errors import RacnnError
from racnn_cli.run import Loose, Run, Share, write_json


def evaluate(
    run: Run,
    *,
    split: str | None = None,
    data: str | None = None,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Measure a run on one of its splits and write eval.json.

    Args:
        run: a run whose network has weights.
        split: train, val or test; None: test if it has images, else val.
        data: measure on every labelled picture of this folder or CSV file instead; `split` is then "all".
        skip_bad: go on without files that cannot be read.

    Returns:
        what eval.json holds: `split`; `data`, its path; `images` and `classes`, two counts; `scales`, a list of
        `top1`, `top5`,
        `nll`, `ece`; `average` and `fused`, the same keys; `per_class`, name to `top1` and `n`; `boxes`, a
        list of what `Sides.figures` gives; `confusion`, a list of [class, what it was taken for, images], numbers
        in the order of `per_class`;
        `interval`, 95 % of fused top1; `baseline`; `seconds`; `images_per_second`.

    Raises:
        RacnnError: no weights, no such split, or outputs that are not finite.
    """
    model, _ = store.load(run.folder)
    recipe, classes = run.recipe(), run.classes()
    if skip_bad:
        recipe = recipe.override({"data.skip_bad": True})
    if data is not None:
        if split is not None:
            raise RacnnError(
                "--split is of the run's own data, and --data names others", "leave one of the two out"
            )
        recipe = recipe.override({"data.path": data})
        split, items = "all", labelled(recipe.data, seed=recipe.seed, classes=classes)
    else:
        verify = (split,) if split in SPLITS else ("val", "test")
        index = build_index(recipe.data, seed=recipe.seed, classes=classes, verify=verify)
        run.check_data(index.fingerprint)
        split = split or ("test" if index.splits["test"] else "val")
        items = _items(index, split)
    where = pick()
    loader = batches(
        Pictures(items, recipe.data, model.source, seed=recipe.seed, augment=False),
        batch=recipe.train.batch,
        epoch=0,
        seed=recipe.seed,
        shuffle=False,
        workers=recipe.data.workers,
        device_pin=where.type == "cuda",
    )
    measured = measure(model, loader, where)
    shares = measured.pop("per_class")
    result = {
        "split": split,
        "data": recipe.data.path,
        "images": measured["images"],
        "classes": len(classes),
        **measured,
        "per_class": {name: {"top1": top1, "n": n} for name, (top1, n) in zip(classes, shares, strict=True)},
        "baseline": None if data is not None else _baseline(run.folder / "baseline", split),
    }
    write_json(run.eval, result)
    return result


def measure(
    model: RACNN, loader: Iterable[Mapping[str, Tensor]], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Figures of a network in memory.

    Args:
        model: moved to `device` and, for the time of the call, into eval mode.
        loader: batches with `image` (B, 3, H, H) uint8 or float in [0, 1], `label` (B,), `box` (B, 4) as
            x0, y0, x1, y1 in [0, 1] of the source, NaN where there is none.

    Returns:
        `images`, `scales`, `average`, `fused`, `interval`, `boxes`, `confusion`, `seconds`,
        `images_per_second` as in eval.json, and `per_class`, a list of (top1 or None, number of images).

    Raises:
        RacnnError: an output is not finite.
    """
    training = model.training
    model.to(device).eval()
    names = len(model.sizes)
    scales = [metrics.Tally(model.classes) for _ in range(names)]
    average, fused = metrics.Tally(model.classes), metrics.Tally(model.classes)
    sides = [Sides(model.options.floor, model.options.ceiling) for _ in range(names - 1)]
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in loader:
            labels = batch["label"]
            output = model(batch["image"].to(device, non_blocking=True))
            answers = (
                torch.stack([*output.logits, output.fused]).float().cpu().log_softmax(dim=2)
            )  # (S + 1, B, N)
            if not answers.isfinite().all():
                raise RacnnError(
                    f"after {fused.images} images the network's outputs are not finite",
                    "go back to an earlier checkpoint, or train again with a smaller learning rate",
                    failure=True,
                )
            for tally, answer in zip(scales, answers, strict=False):
                tally.add(answer, labels)
            average.add(answers[:-1].logsumexp(dim=0) - math.log(names), labels)
            fused.add(answers[-1], labels)
            for side, proposal, box in zip(sides, output.proposals, output.boxes, strict=True):
                side.add(proposal.float().cpu(), box.float().cpu(), batch["box"])
    seconds = time.perf_counter() - start
    model.train(training)
    last = fused.figures()
    return {
        "images": fused.images,
        "scales": [tally.figures() for tally in scales],
        "average": average.figures(),
        "fused": last,
        "interval": list(metrics.wilson(last["top1"], fused.images)),
        "per_class": fused.per_class(),
        "boxes": [side.figures() for side in sides],
        "confusion": fused.confusion().tolist(),
        "seconds": seconds,
        "images_per_second": fused.images / max(seconds, 1e-9),
    }


class Sides:
    """How large the boxes of one zoom are, and where they lie against ground-truth boxes."""

    def __init__(self, floor: float, ceiling: float) -> None:
        self.floor, self.ceiling = floor, ceiling
        self._sides: list[Tensor] = []
        self._truth: list[Tensor] = []

    def add(self, proposals: Tensor, boxes: Tensor, truth: Tensor) -> None:
        """Count a batch: proposals (B, 3) on the scale before, boxes (B, 3), truth (B, 4) on the source."""
        self._sides.append(2 * proposals[:, 2])
        self._truth.append(metrics.against(boxes, truth))  # (B', 3)

    def figures(self) -> dict[str, float]:
        """`side_mean`, `side_min`, `side_max`, as a share of the scale before; `at_floor`, `at_ceiling`, the
        share of boxes within 2 % of the bound; with true boxes also `iou_mean`, `hit_rate`, `coverage_mean`.
        """
        sides, truth = torch.cat(self._sides), torch.cat(self._truth)
        at_floor, at_ceiling = metrics.at_bounds(sides, self.floor, self.ceiling)
        result = {
            "side_mean": sides.mean().item(),
            "side_min": sides.min().item(),
            "side_max": sides.max().item(),
            "at_floor": at_floor.float().mean().item(),
            "at_ceiling": at_ceiling.float().mean().item(),
        }
        if len(truth):
            result |= dict(
                zip(("iou_mean", "hit_rate", "coverage_mean"), truth.mean(dim=0).tolist(), strict=True)
            )
        return result


class _Figures(Loose):
    top1: Share
    top5: FiniteFloat
    nll: FiniteFloat
    ece: FiniteFloat


class _Baseline(_Figures):
    size: int


class _Class(Loose):
    top1: Share | None
    n: int


class _Sides(Loose):
    side_mean: FiniteFloat
    side_min: FiniteFloat
    side_max: FiniteFloat
    at_floor: FiniteFloat
    at_ceiling: FiniteFloat
    iou_mean: FiniteFloat = 0.0
    hit_rate: FiniteFloat = 0.0
    coverage_mean: FiniteFloat = 0.0


class _Result(Loose):
    """What those who read eval.json rely on: `evaluate` tells what it means."""

    split: Literal["train", "val", "test", "all"]
    data: str
    images: Annotated[int, Field(ge=0)]
    classes: Annotated[int, Field(ge=1)]
    scales: Annotated[list[_Figures], Field(min_length=1)]
    average: _Figures
    fused: _Figures
    baseline: _Baseline | None
    interval: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]
    per_class: dict[str, _Class]
    boxes: list[_Sides]
    confusion: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)]]
    images_per_second: FiniteFloat

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = len(self.per_class)
        if any(max(truth, answer) >= count or images < 1 for truth, answer, images in self.confusion):
            raise ValueError(f"confusion names a class beyond the {count} of per_class, or no image")
        if sum(images for *_, images in self.confusion) != self.images:
            raise ValueError(f"confusion does not add up to {self.images} images")
        against = [side.model_fields_set & {"iou_mean", "hit_rate", "coverage_mean"} for side in self.boxes]
        if any(len(found) not in (0, 3) or found != against[0] for found in against):
            raise ValueError("some boxes have figures against true boxes, and some have not")
        return self


def read(run: Run) -> dict[str, Any]:
    """eval.json of a run.

    Raises:
        RacnnError: it is missing or damaged.
    """
    hint = f"`racnn eval --run {run.folder}` writes it"
    try:
        if run.eval.exists() and not run.eval.is_file():
            raise ValueError("it is a device or a pipe")
        found = json.loads(run.eval.read_text(encoding="utf-8"))
        _Result.model_validate(found)
    except OSError:
        raise RacnnError(f"{run.eval} does not exist", hint) from None
    except ValidationError as fault:
        first = fault.errors()[0]
        where = show(".".join(map(str, first["loc"])) or "it")
        raise RacnnError(f"{run.eval} is damaged: {where}: {show(first['msg'])}", hint) from None
    except (ValueError, RecursionError) as fault:
        raise RacnnError(f"{run.eval} is damaged: {fault}", hint) from None
    return found


def rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Lines of the table: name and figures of the baseline (if there is one), scales, average, fused."""
    lines = [("baseline", result["baseline"])] if result["baseline"] else []
    lines += [(f"scale {number}", figures) for number, figures in enumerate(result["scales"], start=1)]
    return [*lines, ("average", result["average"]), ("fused", result["fused"])]


def caption(result: Mapping[str, Any]) -> str:
    """The size of the split and the interval of the last line, in words."""
    low, high = result["interval"]
    return (
        f"{result['images']} {result['split']} images of {result['classes']} classes; "
        f"95 % interval of fused top-1: {low:.3f} to {high:.3f}"
    )


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The result for a terminal: a table of answers, and one of boxes where there are any."""
    answers = Table(title="How often it is right", min_width=46, title_justify="left")
    answers.add_column("")
    for name in ("top-1", f"top-{min(5, result['classes'])}", "NLL", "ECE"):
        answers.add_column(name, justify="right")
    for name, figures in rows(result):
        style = "bold" if name == "fused" else None
        shown = [f"{figures[key]:.3f}" for key in ("top1", "top5", "nll", "ece")]
        answers.add_row(name, *shown, style=style)
    answers.caption = caption(result).replace("; ", "\n")
    answers.caption_justify = "left"
    if not result["boxes"]:
        return [answers]
    truth = "iou_mean" in result["boxes"][0]
    boxes = Table(title="Where it looks", caption="side: share of the scale before", title_justify="left")
    boxes.add_column("zoom")
    for name in (
        "side",
        "smallest",
        "largest",
        "at floor",
        "at ceiling",
        *(("IoU", "hit", "coverage") if truth else ()),
    ):
        boxes.add_column(name, justify="right")
    for number, figures in enumerate(result["boxes"], start=1):
        shown = [f"{figures[key]:.3f}" for key in ("side_mean", "side_min", "side_max")]
        shown += [f"{figures[key]:.0%}" for key in ("at_floor", "at_ceiling")]
        if truth:
            shown += [f"{figures[key]:.3f}" for key in ("iou_mean", "hit_rate", "coverage_mean")]
        boxes.add_row(f"{number} to {number + 1}", *shown)
    return [answers, boxes]


def _items(index: Index, split: str) -> list[Any]:
    if split not in SPLITS:
        raise RacnnError(f"there is no split {split!r}", f"--split {' or '.join(SPLITS)}")
    if not index.splits[split]:
        counts = ", ".join(f"{name} {len(index.splits[name])}" for name in SPLITS)
        raise RacnnError(f"the split {split} has no images ({counts})", "--split with one that has images")
    return index.splits[split]


def _baseline(folder: Path, split: str) -> dict[str, float] | None:
    """The figures, on the same split, of the plain backbone under the same budget, and its input size."""
    run = Run(folder)
    if not run.eval.is_file():
        return None
    result = read(run)
    return {**result["fused"], "size": sizes_of(run.recipe().model)[0]} if result["split"] == split else None
