"""The one evaluator: validation while training, `racnn eval` and the benches measure a network here.

Under torchrun every process measures its share of the images; counts are exact, and every process gets the result.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from racnn_cli.core import distributed, metrics, store
from racnn_cli.core.device import select_device
from racnn_cli.core.losses import rank_loss
from racnn_cli.core.metrics import BoxMetrics, ClassificationMetrics
from racnn_cli.core.model import RACNN, sizes_of
from racnn_cli.data.images import ImageDataset, batches
from racnn_cli.data.index import labelled
from racnn_cli.data.locate import absolute
from racnn_cli.data.source import open_source
from racnn_cli.data.types import SPLITS, Index
from racnn_cli.errors import DataError, RunError
from racnn_cli.events import (
    EVAL_VERSION,
    Answer,
    Baseline,
    Boxes,
    ChoiceEvent,
    ClassResult,
    EvalAnswer,
    EvalBoxes,
    EvalResult,
    Validation,
)
from racnn_cli.run import Run, write_json

MAX_NAMED = 6  # classes that one warning names
Proposals = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""A batch to S - 1 proposals (B, 3), to use instead of the APNs' own."""


@dataclass
class Measurement:
    """Metrics of a network on the images of a split.

    Attributes:
        scales, average, fused: of the answers; a single scale is its own average and fusion.
        boxes: of scales 2, 3, …
        rank_sum: rank losses, added up over images and pairs of neighbouring scales.
        seconds: of the measurement, reading included.
    """

    scales: list[ClassificationMetrics]
    average: ClassificationMetrics
    fused: ClassificationMetrics
    boxes: list[BoxMetrics]
    rank_sum: float = 0.0
    seconds: float = 0.0

    @property
    def images(self) -> int:
        return self.fused.images

    def merge(self, other: Measurement) -> None:
        """Count another process's images, too."""
        for mine, theirs in zip(self.scales, other.scales, strict=True):
            mine.merge(theirs)
        self.average.merge(other.average)
        self.fused.merge(other.fused)
        for own, others in zip(self.boxes, other.boxes, strict=True):
            own.merge(others)
        self.rank_sum += other.rank_sum
        self.seconds = max(self.seconds, other.seconds)

    def validation(self) -> Validation:
        """The metrics that training uses."""

        def answer(figures: ClassificationMetrics) -> Answer:
            temperature, calibrated_nll = figures.fit_temperature()
            return Answer(
                top1=figures.top1,
                mean_class=figures.mean_class,
                nll=figures.nll,
                temperature=temperature,
                calibrated_nll=calibrated_nll,
            )

        scales = [answer(figures) for figures in self.scales]
        if len(scales) == 1:
            return Validation(scales=scales)
        return Validation(
            scales=scales,
            average=answer(self.average),
            fused=answer(self.fused),
            rank=self.rank_sum / max(self.images * len(self.boxes), 1),
            boxes=[Boxes(**_without(boxes.compute(), "side_min", "side_max")) for boxes in self.boxes],
        )

    def temperatures(self) -> Tensor:
        """The temperatures (S + 2,) that fit these images best: of the scales, their average and the fusion head."""
        return torch.tensor([figures.fit_temperature()[0] for figures in (*self.scales, self.average, self.fused)])

    def warn_never_predicted(self, classes: Sequence[str], split: str) -> str:
        """Name the classes that the network never predicts although they have images; empty if there is none."""
        counts = [(classes[label], images) for label, images in self.fused.never_predicted()]
        missed = [f"{name!r} ({images} image{'s' if images > 1 else ''})" for name, images in counts]
        if not missed:
            return ""
        names = " or ".join(missed[:MAX_NAMED])
        names += f" and {len(missed) - MAX_NAMED} more" if len(missed) > MAX_NAMED else ""
        image = "image" if split == "all" else f"{split} image"
        return (
            f"the network predicts no {image} as {names}: try more images of these classes, data.limit, which caps the "
            "large ones, or more epochs, and compare mean_class instead of top-1"
        )

    def result(
        self,
        *,
        split: str,
        data: str,
        classes: Sequence[str],
        baseline: Baseline | None,
        left_out: Mapping[str, int],
        notes: Sequence[str],
        choices: Sequence[ChoiceEvent] = (),
    ) -> EvalResult:
        """Every metric, as eval.json holds it.

        Args:
            split, data: what was measured.
            classes: class names in index order.
            baseline: the figures of the baseline.
            left_out: class name to the number of its images that could not be read.
            notes: remarks about the images.
            choices: which epochs and which round were kept.
        """
        fused = self.fused.compute()
        return EvalResult(
            version=EVAL_VERSION,
            split=split,  # type: ignore[arg-type]  # pydantic checks it
            data=data,
            images=self.images,
            left_out=sum(left_out.values()),
            classes=len(classes),
            scales=[EvalAnswer(**figures.compute()) for figures in self.scales],
            average=EvalAnswer(**self.average.compute()),
            fused=EvalAnswer(**fused),
            interval=list(metrics.wilson_interval(fused["top1"], self.images)),
            boxes=[EvalBoxes(**_without(boxes.compute(), "side_std", "centre_std")) for boxes in self.boxes],
            confusion=self.fused.confusion().tolist(),
            seconds=self.seconds,
            images_per_second=self.images / max(self.seconds, 1e-9),
            per_class={
                name: ClassResult(top1=top1, n=images, left_out=left_out.get(name, 0))
                for name, (top1, images) in zip(classes, self.fused.per_class(), strict=True)
            },
            baseline=baseline,
            notes=list(notes),
            warnings=[text] if (text := self.warn_never_predicted(classes, split)) else [],
            choices=list(choices),
        )


def _without(figures: Mapping[str, float], *names: str) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in names}


def measure(
    model: RACNN,
    loader: Iterable[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    *,
    scales: int | None = None,
    margin: float = 0.0,
    proposals: Proposals | None = None,
) -> Measurement:
    """Run a network over images in eval mode.

    Args:
        model: moved to `device`; its training mode is as before after the call.
        loader: this process's batches with `image` (B, 3, H, H) uint8 or float in [0, 1], `label` (B,), `box` (B, 4)
            as x0, y0, x1, y1 in [0, 1] of the source, NaN where there is none.
        device: where to compute.
        scales: only scale 1 if this is 1; all of them else.
        margin: of the rank loss.
        proposals: boxes to use instead of the APNs' own.

    Returns:
        the figures over the images of all processes.

    Raises:
        RunError: an output is not finite.
    """
    alone = scales == 1 or len(model.sizes) == 1
    count = 1 if alone else len(model.sizes)
    answers = [ClassificationMetrics(model.classes, value) for value in model.temperatures.tolist()]
    measurement = Measurement(
        scales=answers[:count],
        average=answers[-2],
        fused=answers[-1],
        boxes=[BoxMetrics(model.floor, model.ceiling) for _ in range(count - 1)],
    )
    training = model.training
    model.to(device).eval()
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in loader:
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            _count_batch(measurement, model, batch, alone=alone, margin=margin, proposals=proposals)
    measurement.seconds = time.perf_counter() - start
    model.train(training)
    first, *others = distributed.gather(measurement)  # in one order, so that every process comes to the same figures
    for other in others:
        first.merge(other)
    return first


def _count_batch(
    measurement: Measurement,
    model: RACNN,
    batch: Mapping[str, Tensor],
    *,
    alone: bool,
    margin: float,
    proposals: Proposals | None,
) -> None:
    labels = batch["label"].cpu()
    if alone:
        logits = [model.coarse(model.normalise(batch["image"])).logits]
        fused, boxes = logits[0], list[tuple[Tensor, Tensor]]()
    else:
        output = model(batch["image"], None if proposals is None else proposals(batch))
        logits, fused = list(output.logits), output.fused
        boxes = list(zip(output.proposals, output.boxes, strict=True))
    answers = torch.stack([*logits, fused]).float().log_softmax(dim=2)  # (S + 1, B, N)
    if not answers.isfinite().all():
        raise RunError(
            f"after {measurement.images} images the network's outputs are not finite",
            "go back to an earlier checkpoint, or train again with a smaller learning rate",
            failure=True,
        )
    for figures, answer in zip(measurement.scales, answers, strict=False):
        figures.add(answer, labels)
    measurement.average.add(answers[:-1].logsumexp(dim=0) - math.log(len(logits)), labels)
    measurement.fused.add(answers[-1], labels)
    for coarse, fine in itertools.pairwise(answers[:-1]):
        measurement.rank_sum += rank_loss(coarse.cpu(), fine.cpu(), labels, margin, "none").double().sum().item()
    truth = batch["box"].cpu()
    for box_metrics, (proposal, box) in zip(measurement.boxes, boxes, strict=True):
        box_metrics.add(proposal.float().cpu(), box.float().cpu(), truth)


def evaluate(
    run: Run, *, split: str | None = None, data: str | None = None, skip_bad: bool = False, must_write: bool = True
) -> EvalResult:
    """Measure a run on one of its splits and write eval.json; under torchrun all processes share the work.

    Args:
        run: a run whose network has weights.
        split: train, val or test; None: test if it has images, else val.
        data: measure on every labelled image of this folder or CSV file instead; `split` is then "all".
        skip_bad: leave out files that cannot be read.
        must_write: False: if eval.json cannot be written, as in a folder that may only be read, add a note about it.

    Raises:
        DataError: no such split, or an empty one; what can be wrong with the images.
        RunError: no weights, or outputs that are not finite.
    """
    recipe, classes = run.recipe(), run.classes()
    device = distributed.local_device(select_device())
    distributed.start(device)
    model, _ = store.load(run.folder)
    if skip_bad:
        recipe = recipe.override({"data.skip_bad": True})
    if data is not None:
        if split is not None:
            raise DataError("--split is of the run's own data, and --data names others", "leave one of the two out")
        recipe = recipe.override({"data.path": data})
        recipe = recipe.override({"data.path": absolute(recipe.data)})
        labels = labelled(
            recipe.data, seed=recipe.seed, classes=classes, share=distributed.split_work, contents=run.contents()
        )
        split = "all"
        values = recipe.data.model_copy(update={"range": labels.value_range or ()})
        dataset = ImageDataset(labels.items, values, model.source, seed=recipe.seed, augment=False)
        left_out, notes = labels.left_out, labels.notes
    else:
        source = open_source(
            recipe.data,
            seed=recipe.seed,
            classes=classes,
            verify=(split,) if split in SPLITS else ("val", "test"),
            share=distributed.split_work,
        )
        run.check_data(source.index.fingerprint)
        split = _choose_split(source.index, split)
        dataset = source.dataset(split, model.source, augment=False)
        left_out, notes = source.index.left_out.get(split, {}), _notes_about(split, source.index)
    loader = batches(
        dataset,
        batch=recipe.train.batch,
        epoch=0,
        seed=recipe.seed,
        shuffle=False,
        workers=recipe.data.workers,
        rank=distributed.rank(),
        world=distributed.world(),
        pin_memory=device.type == "cuda",
    )
    result = measure(model, loader, device).result(
        split=split,
        data=recipe.data.path,
        classes=classes,
        baseline=None if data is not None else _baseline(run.folder / "baseline", split),
        left_out=left_out,
        notes=notes,
        choices=run.choices(),
    )
    if distributed.rank() == 0:
        try:
            write_json(run.eval, result.to_json())
        except RunError as error:
            if must_write:
                raise
            result.notes = [*result.notes, f"the figures are not in eval.json: {error.message}"]
    return result


def _choose_split(index: Index, split: str | None) -> str:
    """The split that was asked for, else test if it has images, else val."""
    split = split or ("test" if index.splits["test"] else "val")
    if split not in SPLITS:
        raise DataError(f"there is no split {split!r}", f"--split {' or '.join(SPLITS)}")
    if not index.splits[split]:
        counts = ", ".join(f"{name} {len(index.splits[name])}" for name in SPLITS)
        raise DataError(f"the split {split} has no images ({counts})", "--split with one that has images")
    return split


def _notes_about(split: str, index: Index) -> list[str]:
    """The notes of an index without those about classes that another split has no images of."""
    others = [f" has no {name} image " for name in SPLITS if name != split]
    return [note for note in index.notes if not any(words in note for words in others)]


def _baseline(folder: Path, split: str) -> Baseline | None:
    """The figures, on the same split, of the plain backbone under the same budget, and its input size."""
    run = Run(folder)
    if not run.eval.is_file():
        return None
    result = run.read_eval()
    if result.split != split:
        return None
    answer, size = result.fused.to_json(), sizes_of(run.recipe().model)[0]
    return Baseline(**answer, size=size, budget=run.read_budget(), choices=run.choices())
