"""The contents of `log.jsonl` and `eval.json` as types.

Keys are stable: later versions may add keys but do not rename any. Unknown keys are kept when a file is read.

Shares (`top1`, `hit_rate`, …) are in [0, 1] and `nll` is in nats. The `side` of a box is a share of the previous
scale's side. `iou_mean`, `hit_rate` and `coverage_mean` compare boxes with ground-truth boxes and are missing without
them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

EVAL_VERSION = 1
MAX_CLASSES = 20  # classes that one sentence names


def _plausible(number: float) -> float:
    if abs(number) > 1e12 and math.isfinite(number):
        raise ValueError("not a plausible result of training")
    return number


Number = Annotated[float, AfterValidator(_plausible)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
TRUTH_METRICS = {"iou_mean", "hit_rate", "coverage_mean"}
"""Metrics that need ground-truth boxes: a record has all of them or none."""


class Record(BaseModel):
    """A JSON object. Unset keys are not written."""

    model_config = ConfigDict(strict=True, extra="allow")

    def to_json(self) -> dict[str, Any]:
        """The object as a dict, in the order of the fields."""
        return self.model_dump(exclude_unset=True)


class Answer(Record):
    """Validation metrics of one classifier: a scale, the average of the scales, or the fusion head.

    `mean_class` is the mean over the classes that have images of their `top1`. `temperature` is the one that fits these
    images best (see `ClassificationMetrics.fit_temperature`), and `calibrated_nll` the NLL with it. Older logs do not
    have these three.
    """

    top1: Share
    mean_class: Share | None = None
    nll: Number
    temperature: Number | None = None
    calibrated_nll: Number | None = None

    @property
    def score(self) -> tuple[float, float]:
        """What epochs and rounds are chosen by: top-1, then the NLL after temperature scaling; larger is better."""
        return self.top1, -(self.nll if self.calibrated_nll is None else self.calibrated_nll)


class Boxes(Record):
    """Validation metrics of the boxes of one scale, relative to the previous scale."""

    side_mean: Number
    side_std: Number = 0.0
    centre_std: Number = 0.0
    at_floor: Share = 0.0
    at_ceiling: Share = 0.0
    iou_mean: Number | None = None
    hit_rate: Share | None = None
    coverage_mean: Number | None = None


class Validation(Record):
    """Validation metrics of the network. A network with one scale has only `scales`.

    Attributes:
        scales: coarse to fine.
        average: mean probability of the scales.
        fused: the fusion head.
        rank: mean rank loss over the pairs of adjacent scales.
        boxes: of scales 2, 3, …
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
        stage: name of the stage.
        phase: `cnn` or `apn` in `alternate`, else empty.
        round: from 1 in `alternate`, else 0.
        epoch: from 1, within the stage or phase.
        epochs: number of epochs of the stage or phase.
        views: epochs since the start of the run.
        lr: largest learning rate of the last update.
        train_loss: each loss by name, averaged over the epoch.
        seconds: training time without validation.
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
        smoothed: exponential moving averages of the validation losses `classification` and `rank`.
        still: number of consecutive rounds in which neither changed.
    """

    event: Literal["round"] = "round"
    stage: str = "alternate"
    round: int
    val: Validation
    smoothed: dict[str, Number] = {}
    still: int = 0


class BoxesEvent(Event):
    """An APN phase was compared with the boxes before it, on the validation images.

    Attributes:
        before, after: metrics of the average of all scales; None in a network with one scale.
        gained, lost: images that only the new boxes, and only the old ones, classify right.
        rolled_back: the old boxes were restored.
    """

    event: Literal["boxes"] = "boxes"
    stage: str = "alternate"
    round: int
    before: Answer | None
    after: Answer | None
    gained: Count
    lost: Count
    rolled_back: bool

    def describe(self) -> str:
        """Say what the new boxes changed, and whether they are kept."""
        result = "the boxes before this APN phase are restored" if self.rolled_back else "they are kept"
        return f"of the validation images, the new boxes gain {self.gained} and lose {self.lost}: {result}"


class ChoiceEvent(Event):
    """Weights of several epochs or rounds were compared on the validation split, and the best were kept.

    Attributes:
        unit: what was compared.
        kept, last: numbers of the kept and of the last one; 0 is the state before the first.
        kept_val, last_val: their metrics.
    """

    event: Literal["choice"] = "choice"
    stage: str
    phase: str = ""
    unit: Literal["epoch", "round"]
    kept: Count
    last: Count
    kept_val: Answer
    last_val: Answer

    def describe(self) -> str:
        """Say which one was kept, and how it compares with the last one."""
        kept = f"{self.unit} {self.kept}" if self.kept else f"the state before {self.unit} 1"
        text = f"{kept} of {self.last} is kept: validation top-1 {self.kept_val.top1:.3f}"
        return text if self.kept == self.last else f"{text} ({self.unit} {self.last}: {self.last_val.top1:.3f})"


class StageEvent(Event):
    """The end of a stage."""

    event: Literal["stage"] = "stage"
    stage: str
    views: int = 0
    val: Validation | None = None


class WarningEvent(Event):
    """A problem that the validation metrics point to. Each `kind` is logged once."""

    event: Literal["warning"] = "warning"
    stage: str = ""
    round: int = 0
    kind: str
    text: str


class TestEvent(Event):
    """Test metrics after a stage or phase; only `racnn bench` measures them during training."""

    __test__ = False  # not a pytest test case

    event: Literal["test"] = "test"
    moment: str
    test: dict[str, Any]


AnyEvent = EpochEvent | RoundEvent | BoxesEvent | ChoiceEvent | StageEvent | WarningEvent | TestEvent
_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="event")])


def read_line(line: str) -> AnyEvent | None:
    """Parse a line of log.jsonl; None if it is damaged or an unknown kind of event."""
    try:
        return _EVENT.validate_python(json.loads(line))
    except (ValueError, RecursionError):
        return None


class EvalAnswer(Record):
    """Metrics of one classifier. `top5` is top-min(5, classes); `ece` uses 15 equal bins.

    `mean_class` is the mean over the classes that have images of their `top1`. `temperature` was fitted on the
    validation split, and `calibrated_nll` and `calibrated_ece` are measured with it. Older files do not have these.
    """

    top1: Share
    mean_class: Share | None = None
    top5: FiniteFloat
    nll: FiniteFloat
    ece: FiniteFloat
    temperature: FiniteFloat | None = None
    calibrated_nll: FiniteFloat | None = None
    calibrated_ece: FiniteFloat | None = None


class Compute(Record):
    """Floating-point operations; a multiply-add is two.

    Attributes:
        prediction: of one image.
        training: of all stages, forward and backward, without validation.
    """

    prediction: Count
    training: Count


class Budget(Record):
    """The compute of a run and of its baseline."""

    run: Compute
    baseline: Compute


class Baseline(EvalAnswer):
    """Metrics of the plain backbone with the same budget on the same split.

    Attributes:
        size: side of its input in pixels.
        budget: what both cost.
        choices: which of its epochs was kept.
    """

    size: int
    budget: Budget | None = None
    choices: list[ChoiceEvent] = []


class ClassResult(Record):
    """Top-1 accuracy and number of images of a class. `top1` is None without images.

    `left_out` counts the images that could not be read, which are not in `n`.
    """

    top1: Share | None
    n: int
    left_out: Count = 0


class EvalBoxes(Record):
    """Boxes of one scale. `at_floor` and `at_ceiling` are the shares of boxes within 2 % of that bound."""

    side_mean: FiniteFloat
    side_min: FiniteFloat
    side_max: FiniteFloat
    at_floor: FiniteFloat
    at_ceiling: FiniteFloat
    iou_mean: FiniteFloat | None = None
    hit_rate: FiniteFloat | None = None
    coverage_mean: FiniteFloat | None = None


class EvalResult(Record):
    """The contents of eval.json.

    Attributes:
        version: of this format.
        split: `all` for a folder or CSV file other than the run's data.
        data: path of the data.
        images: number of images.
        left_out: number of images that could not be read and are not in `images`.
        classes: number of classes.
        scales: coarse to fine.
        average: mean probability of the scales.
        fused: the fusion head, which is the network's prediction.
        interval: 95 % Wilson interval of fused top-1.
        boxes: of scales 2, 3, …
        confusion: [class, predicted class, images], with classes as positions in `per_class`.
        seconds: duration of the measurement, including loading.
        per_class: by class name, in index order.
        notes: remarks about the images, one sentence each.
        warnings: problems that the figures point to, one sentence each.
        choices: which epochs and which round were kept.
    """

    version: int = 0
    split: Literal["train", "val", "test", "all"]
    data: str
    images: Count
    left_out: Count = 0
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
    notes: list[str] = []
    warnings: list[str] = []
    choices: list[ChoiceEvent] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        count = len(self.per_class)
        if any(max(truth, predicted) >= count or images < 1 for truth, predicted, images in self.confusion):
            raise ValueError(f"confusion has a class beyond the {count} of per_class, or an entry without images")
        if sum(images for *_, images in self.confusion) != self.images:
            raise ValueError(f"confusion does not add up to {self.images} images")
        compared = [{key for key in TRUTH_METRICS if getattr(box, key) is not None} for box in self.boxes]
        if any(len(keys) not in (0, 3) or keys != compared[0] for keys in compared):
            raise ValueError("only some boxes have metrics against ground-truth boxes")
        return self

    def answers(self) -> list[tuple[str, EvalAnswer]]:
        """Name and metrics of the baseline (if any), each scale, the average and the fusion head."""
        answers: list[tuple[str, EvalAnswer]] = [("baseline", self.baseline)] if self.baseline else []
        answers += [(f"scale {number}", metrics) for number, metrics in enumerate(self.scales, start=1)]
        return [*answers, ("average", self.average), ("fused", self.fused)]

    def describe_images(self) -> str:
        """Number of images and their split."""
        if self.split == "all":
            return f"{self.images} images"
        return f"{self.images} {self.split} images{' (used for choosing)' if self.split == 'val' else ''}"

    def describe_left_out(self) -> str:
        """Say how many images could not be read, per class; empty if none."""
        counts = {name: entry.left_out for name, entry in self.per_class.items()}
        return describe_left_out(counts, self.images) if self.left_out else ""


def describe_left_out(left_out: Mapping[str, int], images: int) -> str:
    """Say how many images could not be read, per class, the largest number first.

    Args:
        left_out: class name to the number of its images that could not be read.
        images: number of images that could be read.
    """
    total = sum(left_out.values())
    return f"{total} of {total + images} images could not be read and were left out: {count_by_class(left_out)}"


def count_by_class(left_out: Mapping[str, int]) -> str:
    """Name the classes with their numbers of files, the largest number first, and the rest together."""
    named = sorted((name for name, count in left_out.items() if count), key=lambda name: -left_out[name])
    counts = [f"{name} {left_out[name]}" for name in named[:MAX_CLASSES]]
    if len(named) > MAX_CLASSES:
        counts.append(f"{len(named) - MAX_CLASSES} more classes {sum(left_out[name] for name in named[MAX_CLASSES:])}")
    return ", ".join(counts)
