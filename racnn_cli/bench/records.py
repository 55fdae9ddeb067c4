"""Results of the trained networks, as bench.json and `--json` files hold them."""

from __future__ import annotations

from typing import Any, Self

from pydantic import ConfigDict, Field

from racnn_cli.events import Boxes, ChoiceEvent, Compute, EpochEvent, Number, Record, Share, TestEvent, Validation
from racnn_cli.run import Run


class BenchRecord(Record):
    """A record whose fields may have other names than their JSON keys."""

    model_config = ConfigDict(populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True, by_alias=True)


class Metrics(BenchRecord):
    """Metrics on one split: `top1` by answer (`scale 1`, …, `average`, `fused`), `boxes` of scales 2, 3, …, mean `rank`
    loss, and the number of `images` if it is the test split."""

    top1: dict[str, Share]
    boxes: list[Boxes] = Field(default=[])
    rank: Number | None = None
    images: int = 0

    @classmethod
    def from_validation(cls, validation: Validation, **fields: Any) -> Self:
        answers = {f"scale {number}": answer for number, answer in enumerate(validation.scales, start=1)}
        if validation.average is not None and validation.fused is not None:
            answers |= {"average": validation.average, "fused": validation.fused}
            fields |= {"boxes": validation.boxes, "rank": validation.rank}
        return cls(top1={name: answer.top1 for name, answer in answers.items()}, **fields)

    @property
    def final(self) -> float:
        """Top-1 accuracy of the final answer."""
        return self.top1.get("fused", self.top1["scale 1"])


class Milestone(BenchRecord):
    """The end of a stage or phase, `epochs` after the start of training."""

    name: str = Field(alias="moment")
    epochs: int
    val: Metrics | None = None
    test: Metrics | None = None


class ArmResult(Metrics):
    """Test metrics of a trained arm.

    Attributes:
        val: metrics on the validation split, which chose between epochs and rounds.
        seconds: of training, including a shared pretrain-cnn.
        milestones, true_boxes: of the learned arm; its metrics with ground-truth boxes.
        size: input side of scale 1.
        compute: of a prediction and of training, including a shared pretrain-cnn.
        choices: which epochs and which round were kept.
    """

    val: Metrics | None = None
    seconds: Number = 0.0
    milestones: list[Milestone] = Field(default=[], alias="moments")
    true_boxes: ArmResult | None = None
    size: int = 0
    compute: Compute | None = None
    choices: list[ChoiceEvent] = Field(default=[])

    @property
    def val_final(self) -> float:
        """Validation top-1 of the final answer."""
        assert self.val is not None
        return self.val.final


class SeedResult(BenchRecord):
    """The arms of one seed, by name."""

    seed: int
    folder: str
    arms: dict[str, ArmResult]


def read_milestones(run: Run) -> list[Milestone]:
    """Collect the metrics at the end of every stage and phase from log.jsonl."""
    epochs, milestones = 0, dict[str, Milestone]()

    def at(name: str) -> Milestone:
        return milestones.setdefault(name, Milestone(name=name, epochs=epochs))

    for event in run.read_log():
        if isinstance(event, TestEvent):
            at(event.moment).test = Metrics.model_validate(event.test)
        elif isinstance(event, EpochEvent):
            epochs += 1
            # The fusion head is trained last, so its end is the end of the stage.
            is_phase = event.phase not in ("", "fusion head")
            milestone = at(f"{event.stage}: {event.phase}, round {event.round}" if is_phase else event.stage)
            milestone.epochs, milestone.val = epochs, Metrics.from_validation(event.val)
    return list(milestones.values())
