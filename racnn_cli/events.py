"""What `log.jsonl` and `eval.json` hold: one definition that is written, read and documented.

Keys are stable: later versions add some and rename none. Keys that a version does not know are kept when a file is
read. Shares (`top1`, `hit_rate`, …) lie in [0, 1], `nll` is in nats, a box's `side` is a share of the side of the
scale before it, `iou_mean`, `hit_rate` and `coverage_mean` compare with ground-truth boxes and exist only with them.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

EVAL_VERSION = 1


def _plausible(number: float) -> float:
    if abs(number) > 1e12 and math.isfinite(number):
        raise ValueError("a number that no training ends at")
    return number


Number = Annotated[float, AfterValidator(_plausible)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Truth = {"iou_mean", "hit_rate", "coverage_mean"}
"""Figures that need ground-truth boxes: all of them are there, or none."""


class Record(BaseModel):
    """A JSON object. Keys that are not set are not written."""

    model_config = ConfigDict(strict=True, extra="allow")

    def to_json(self) -> dict[str, Any]:
        """The object as it is written, in the order of the fields."""
        return self.model_dump(exclude_unset=True)


class Answer(Record):
    """Validation figures of one answer: a scale's, their average's or the fusion head's."""

    top1: Share
    nll: Number


class Boxes(Record):
    """Validation figures of the boxes of one scale, on the scale before it."""

    side_mean: Number
    side_std: Number = 0.0
    centre_std: Number = 0.0
    at_floor: Share = 0.0
    at_ceiling: Share = 0.0
    iou_mean: Number | None = None
    hit_rate: Share | None = None
    coverage_mean: Number | None = None


class Validation(Record):
    """Validation figures of the network as it stood; `average`, `fused`, `rank` and `boxes` with more than one scale.

    Attributes:
        scales: coarse to fine.
        rank: mean rank loss over the pairs of neighbouring scales.
    """

    scales: Annotated[list[Answer], Field(min_length=1)]
    average: Answer | None = None
    fused: Answer | None = None
    rank: Number | None = None
    boxes: list[Boxes] = []


class Event(Record):
    """A line of log.jsonl."""

    event: str

    def to_json(self) -> dict[str, Any]:
        return {"event": self.event} | super().to_json()


class EpochEvent(Event):
    """The end of an epoch.

    Attributes:
        stage, phase, round: `phase` and `round` (from 1) of `alternate`; empty and 0 elsewhere.
        epoch, epochs: of this stage or phase, from 1.
        views: epochs since the start of the run.
        lr: largest learning rate of the last update.
        train_loss: name to mean over the epoch.
        seconds: of training, without validation.
    """

    event: Literal["epoch"] = "epoch"
    stage: str
    phase: str
    round: int
    epoch: int
    epochs: int = 0
    views: int = 0
    lr: Number = 0.0
    train_loss: dict[str, Number]
    val: Validation
    seconds: Number
    images_per_second: Number = 0.0


class RoundEvent(Event):
    """The end of a round of `alternate`.

    Attributes:
        smoothed: exponentially smoothed validation losses, `classification` and `rank`.
        still: rounds in a row in which neither of them changed.
    """

    event: Literal["round"] = "round"
    stage: str = "alternate"
    round: int
    val: Validation
    smoothed: dict[str, Number] = {}
    still: int = 0


class StageEvent(Event):
    """The end of a stage."""

    event: Literal["stage"] = "stage"
    stage: str
    views: int = 0
    val: Validation | None = None


class WarningEvent(Event):
    """Something that the validation figures give cause to worry about; each `kind` is logged once."""

    event: Literal["warning"] = "warning"
    stage: str = ""
    round: int = 0
    kind: str
    text: str


class TestEvent(Event):
    """Test figures after a stage or phase: only `racnn bench` measures these during training."""

    __test__ = False  # not a test case of pytest

    event: Literal["test"] = "test"
    moment: str
    test: dict[str, Any]


AnyEvent = EpochEvent | RoundEvent | StageEvent | WarningEvent | TestEvent
_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="event")])


def read_line(line: str) -> AnyEvent | None:
    """A line of log.jsonl; None for one that is damaged or of a kind that this version does not know."""
    try:
        return _EVENT.validate_python(json.loads(line))
    except (ValueError, RecursionError):
        return None


class EvalAnswer(Record):
    """Figures of one answer; `top5` is of min(5, classes), `ece` has 15 equal bins."""

    top1: Share
    top5: FiniteFloat
    nll: FiniteFloat
    ece: FiniteFloat


class Baseline(EvalAnswer):
    """The plain backbone under the same budget, on the same split; `size`: its input side in pixels."""

    size: int


class ClassResult(Record):
    """`top1` is None for a class without images."""

    top1: Share | None
    n: int


class EvalBoxes(Record):
    """Boxes of one scale; `at_floor`, `at_ceiling`: the share of boxes within 2 % of that bound."""

    side_mean: FiniteFloat
    side_min: FiniteFloat
    side_max: FiniteFloat
    at_floor: FiniteFloat
    at_ceiling: FiniteFloat
    iou_mean: FiniteFloat | None = None
    hit_rate: FiniteFloat | None = None
    coverage_mean: FiniteFloat | None = None


class EvalResult(Record):
    """eval.json.

    Attributes:
        version: of this format.
        split: `all` for a folder or CSV file that is not the run's own.
        data: its path.
        images, classes: two counts.
        scales, average, fused: coarse to fine; mean probability of the scales; the fusion head, the final answer.
        interval: 95 % of fused top-1 (Wilson).
        boxes: of scales 2, 3, …
        confusion: [class, answer, images], with classes as positions in `per_class`.
        seconds: of the measurement, reading included.
        per_class: by name, in the order of the classes.
    """

    version: int = 0
    split: Literal["train", "val", "test", "all"]
    data: str
    images: Count
    classes: Annotated[int, Field(ge=1)]
    scales: Annotated[list[EvalAnswer], Field(min_length=1)]
    average: EvalAnswer
    fused: EvalAnswer
    interval: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]
    boxes: list[EvalBoxes]
    confusion: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    seconds: FiniteFloat = 0.0
    images_per_second: FiniteFloat
    per_class: dict[str, ClassResult]
    baseline: Baseline | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = len(self.per_class)
        if any(max(truth, answer) >= count or images < 1 for truth, answer, images in self.confusion):
            raise ValueError(f"confusion names a class beyond the {count} of per_class, or no image")
        if sum(images for *_, images in self.confusion) != self.images:
            raise ValueError(f"confusion does not add up to {self.images} images")
        compared = [{key for key in Truth if getattr(box, key) is not None} for box in self.boxes]
        if any(len(keys) not in (0, 3) or keys != compared[0] for keys in compared):
            raise ValueError("some boxes have figures against ground-truth boxes, and some have not")
        return self

    def answers(self) -> list[tuple[str, EvalAnswer]]:
        """Name and figures of the baseline (if there is one), each scale, the average and the fusion head."""
        lines: list[tuple[str, EvalAnswer]] = [("baseline", self.baseline)] if self.baseline else []
        lines += [(f"scale {number}", figures) for number, figures in enumerate(self.scales, start=1)]
        return [*lines, ("average", self.average), ("fused", self.fused)]
