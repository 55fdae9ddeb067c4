"""The stages and their order. A stage is one function here: phases run by `fit`, and what happens between them.

To add a stage, write its function and its phase (see `phases.py`), and add it to `STAGES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from racnn_cli import backbones
from racnn_cli import recipe as recipes
from racnn_cli.core import distributed, store
from racnn_cli.core.metrics import TEMPERATURES, true_class_scores
from racnn_cli.core.mixture import fit_temperature, fit_weights
from racnn_cli.core.model import RACNN
from racnn_cli.errors import RunError
from racnn_cli.events import BoxesEvent, RoundEvent, StageEvent
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run, write_text
from racnn_cli.training import checkpoint, phases
from racnn_cli.training.checkpoint import Candidate, Progress
from racnn_cli.training.interrupts import StopRequested
from racnn_cli.training.loop import fit
from racnn_cli.training.phases import Phase
from racnn_cli.training.resume import EVALUATED, flatten
from racnn_cli.training.trainer import Trainer

SMOOTHING = 0.5  # weight of the newest round in the smoothed losses that end `alternate`
BEFORE_APN = "before-apn"  # snapshot of the weights before an APN phase
NORM_IMAGES = 512  # training images that the lengths of descriptors are measured on


def pretrain_cnn(trainer: Trainer) -> None:
    """Train scale 1's CNN, then give every finer scale its weights."""
    model = trainer.model
    fit(trainer, phases.pretrain_cnn(trainer.recipe))
    first = model.scale(0)
    for number in range(1, len(model.sizes)):
        backbones.copy_weights(first.backbone, model.scale(number).backbone)
        model.scale(number).classifier.load_state_dict(first.classifier.state_dict())


def pretrain_apn(trainer: Trainer) -> None:
    """Teach the APNs the peak of their features."""
    fit(trainer, phases.pretrain_apn(trainer.recipe, trainer.boxes))


def alternate(trainer: Trainer) -> None:
    """APN phase and CNN phase in turn until neither loss changes; then the best round's weights and the fusion head.

    The first round has no APN phase: its boxes are those of `pretrain-apn`. Every round ends with a CNN phase, so the
    CNNs that are kept were trained on the boxes that are kept.
    """
    recipe, progress, boxes = trainer.recipe, trainer.progress, trainer.boxes
    while progress.phase != "fusion":
        if progress.phase == "apn":
            _run_apn_phase(trainer, phases.apn_phase(recipe, boxes, round_index=progress.round))
        if progress.phase == "cnn":
            _run_phase(trainer, phases.cnn_phase(recipe, boxes, round_index=progress.round), then="judge")
        if progress.phase == "judge":
            another: Literal["apn", "cnn"] = "apn" if recipe.alternate.apn_epochs else "cnn"
            progress.phase = "fusion" if end_round(trainer) else another
            trainer.save()
    if not (progress.epoch or progress.step or progress.best is not None):
        distributed.barrier()
        checkpoint.restore_snapshot(trainer.run, "best-round", trainer.model)
        assert progress.best_round is not None
        assert progress.last_round is not None
        trainer.log_choice(progress.best_round, progress.last_round, unit="round")
        if trainer.model.fusion is not None:
            start_fusion(trainer)
    if trainer.model.fusion is not None:
        fit(trainer, phases.fusion(recipe, boxes))
    if trainer.model.mixture is not None:
        fit_mixture(trainer)


STAGES: dict[str, Callable[[Trainer], None]] = {
    "pretrain-cnn": pretrain_cnn,
    "pretrain-apn": pretrain_apn,
    "alternate": alternate,
}
"""All stages, in their order."""
NAMES = tuple(STAGES)


def plan(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a recipe in their order; a single scale is the plain backbone and needs only the first."""
    return NAMES if recipe.model.scales > 1 else NAMES[:1]


def run_all(trainer: Trainer) -> None:
    """Run every stage that is not finished."""
    remaining = [name for name in plan(trainer.recipe) if name not in trainer.progress.done]
    for name in remaining:
        run_stage(trainer, name)
    if not remaining:  # the recipe keeps the values that the run was trained with
        changed = flatten(trainer.recipe)
        _write_recipe(trainer.run, trainer.run.recipe().override({key: changed[key] for key in EVALUATED}))
    if distributed.rank() == 0 and not trainer.run.weights.exists():  # somebody deleted them
        store.save_weights(trainer.run.weights, trainer.model)


def run_stage(trainer: Trainer, name: str) -> None:
    """Run one stage from where it stands.

    Raises:
        RunError: the stage before it is missing, or a later one has begun already.
        Interrupted: a signal arrived; the state is saved.
    """
    check_order(trainer, name)
    with trainer.interrupts.caught():
        try:
            _run_stage(trainer, name)
        except StopRequested:
            raise trainer.interrupted() from None


def check_order(trainer: Trainer, name: str) -> None:
    """Check that a stage can run now.

    Raises:
        RunError: it cannot.
    """
    folder, progress, stages = trainer.run.folder, trainer.progress, plan(trainer.recipe)
    if name not in stages:
        raise RunError(
            f"{folder} has one scale, the plain backbone: it has no APN, so {name} cannot train anything",
            "start a run with --scales 2 or more",
        )
    position = stages.index(name)
    missing = [stage for stage in stages[:position] if stage not in progress.done]
    if missing:
        raise RunError(
            f"{name} needs {missing[0]}, which has not finished in {folder}", f"`racnn {missing[0]} --run {folder}`"
        )
    later = [stage for stage in stages[position + 1 :] if stage in progress.done or stage == progress.stage]
    if later:
        raise RunError(
            f"{folder} is past {name} already ({later[-1]} has begun or finished); nothing was overwritten",
            "start a new run with --out DIR, or continue with `racnn alternate`",
        )


def _run_stage(trainer: Trainer, name: str) -> None:
    run, progress = trainer.run, trainer.progress
    _write_recipe(run, trainer.recipe)
    if progress.stage != name:
        done = [stage for stage in progress.done if stage != name]
        trainer.progress = Progress(done=done, stage=name, views=progress.views, number=progress.number)
    trainer.console.title(name)
    STAGES[name](trainer)
    measurement = trainer.measure("val")
    val = measurement.validation()
    trainer.model.temperatures.copy_(measurement.temperatures())
    if name != NAMES[0]:  # no APN has been trained before
        trainer.warn(val, finer=name == "alternate")
    if name == plan(trainer.recipe)[-1]:
        trainer.warn_never_predicted(measurement)
    progress = trainer.progress
    trainer.progress = Progress(done=[*progress.done, name], views=progress.views, number=progress.number)
    if distributed.rank() == 0:
        store.save_weights(run.weights, trainer.model)
    trainer.log(StageEvent(stage=name, views=progress.views, val=val))
    trainer.after_phase(name, "", 0)  # before it is saved: a resume cuts what is logged after that
    for _ in range(trainer.recipe.train.keep + 1):  # so that no checkpoint that is kept needs a snapshot
        trainer.save()
    distributed.barrier()  # another process may still be reading the best weights
    if distributed.rank() == 0:
        for snapshot in ("best", "best-round", BEFORE_APN):
            checkpoint.remove_snapshot(run, snapshot)


def _write_recipe(run: Run, recipe: Recipe) -> None:
    """Store a run's recipe if it was changed for what is left to do; one process does."""
    if distributed.rank() == 0 and run.recipe() != recipe:
        write_text(run.recipe_file, recipes.dump(recipe))


def _run_apn_phase(trainer: Trainer, phase: Phase) -> None:
    """Train the APNs, unless the validation images are classified worse in their new boxes."""
    progress, run = trainer.progress, trainer.run
    if not (progress.epoch or progress.step):
        distributed.barrier()
        if distributed.rank() == 0:
            checkpoint.save_snapshot(run, BEFORE_APN, trainer.model, progress)
    _run_phase(trainer, phase, then="cnn", check=keep_better_boxes)


def keep_better_boxes(trainer: Trainer) -> None:
    """Go back to the boxes before an APN phase if they are better on the validation split.

    The same images are classified with both: `gained` are right with the new boxes only, and `lost` with the old ones
    only. The old boxes are restored if more images are lost than gained, by more than one standard error of that
    difference, sqrt(gained + lost). Differences below that are left to later rounds.
    """
    model = trainer.model
    after, trained = trainer.measure("val"), {name: value.clone() for name, value in model.state_dict().items()}
    distributed.barrier()
    checkpoint.restore_snapshot(trainer.run, BEFORE_APN, model, round_=trainer.progress.round)
    before = trainer.measure("val")
    gained, lost = after.average.compare(before.average)
    rolled_back = lost - gained > math.sqrt(gained + lost)
    if not rolled_back:
        model.load_state_dict(trained)
    answers = [measurement.validation().average for measurement in (before, after)]
    event = BoxesEvent(
        round=trainer.progress.round + 1,
        before=answers[0],
        after=answers[1],
        gained=gained,
        lost=lost,
        rolled_back=rolled_back,
    )
    trainer.log(event)
    trainer.console.say(f"  {event.describe()}")


def _run_phase(
    trainer: Trainer, phase: Phase, *, then: Literal["cnn", "judge"], check: Callable[[Trainer], None] | None = None
) -> None:
    progress = trainer.progress
    trainer.console.say(f"  round {progress.round + 1} of at most {trainer.recipe.alternate.rounds}, {phase.name}")
    fit(trainer, phase)
    if check is not None:
        check(trainer)
    progress.phase = then
    trainer.after_phase(phase.stage, phase.name, progress.round + 1)
    trainer.save()


def end_round(trainer: Trainer) -> bool:
    """Measure a finished round and keep its weights if it is the best one; True if it was the last one.

    After each round the validation classification loss (mean over the scales) and the validation rank loss are smoothed
    exponentially. A round in which neither changed by more than `tolerance`, relative to its size, counts as still.
    `alternate` ends after `patience` still rounds in a row, or after `rounds` rounds.
    """
    progress, section = trainer.progress, trainer.recipe.alternate
    val = trainer.validate()
    assert val.average is not None
    assert val.rank is not None
    progress.round += 1
    progress.last_round = Candidate(number=progress.round, val=val.average)
    if progress.best_round is None or val.average.score > progress.best_round.val.score:
        progress.best_round = progress.last_round
        if distributed.rank() == 0:
            checkpoint.save_snapshot(trainer.run, "best-round", trainer.model, progress)
    losses = {"classification": sum(scale.nll for scale in val.scales) / len(val.scales), "rank": val.rank}
    before = progress.smoothed
    progress.smoothed = {
        name: (1 - SMOOTHING) * before.get(name, value) + SMOOTHING * value for name, value in losses.items()
    }
    changed = not before or any(
        abs(value - before[name]) > section.tolerance * abs(before[name]) for name, value in progress.smoothed.items()
    )
    progress.still = 0 if changed else progress.still + 1
    trainer.log(
        RoundEvent(stage="alternate", round=progress.round, val=val, smoothed=progress.smoothed, still=progress.still)
    )
    trainer.warn(val, finer=True)
    if progress.still >= section.patience:
        trainer.console.say(f"  neither loss changed for {progress.still} rounds: alternate ends")
        return True
    return progress.round >= section.rounds


@torch.no_grad()
def fit_mixture(trainer: Trainer) -> None:
    """Fit the weights and temperatures of the fusion on the validation images."""
    model, device, proposals = trainer.model.eval(), trainer.device, trainer.boxes.proposals
    assert model.mixture is not None
    scores: list[torch.Tensor] = []  # (K, T, B) of each batch
    for batch in trainer.interruptible(trainer.batches("val"), activity="fusion"):
        batch = {name: value.to(device) for name, value in batch.items()}
        output = model(batch["image"], proposals and proposals(batch))
        answers = model.classifiers(output.descriptors, output.logits)
        scores.append(torch.stack([true_class_scores(answer, batch["label"]) for answer in answers]))
    every = torch.cat([part for parts in distributed.gather(scores) for part in parts], dim=2)
    best = [fit_temperature(-costs, TEMPERATURES) for costs in every.sum(dim=2)]
    at_best = torch.stack([row[position] for row, position in zip(every, best, strict=True)], dim=1)  # (images, K)
    weights = fit_weights(at_best.exp())
    model.mixture.copy_(torch.stack([weights, torch.tensor([TEMPERATURES[position] for position in best])]))
    names = [f"scale {number}" for number in range(1, len(model.sizes) + 1)] + ["head"] * (model.fusion is not None)
    text = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, weights.tolist(), strict=True))
    trainer.console.say(f"  weights of the fusion: {text}")


@torch.no_grad()
def start_fusion(trainer: Trainer) -> None:
    """Initialise the fusion head, with the lengths of descriptors on some training images as they are."""
    model, device, proposals = trainer.model.eval(), trainer.device, trainer.boxes.proposals
    every = math.ceil(len(trainer.train) / NORM_IMAGES)
    sums = torch.zeros(len(model.sizes), device=device)
    plain = trainer.batches("train", augment=False, every=every)
    for batch in trainer.interruptible(plain, activity="start of the fusion head"):
        batch = {name: value.to(device) for name, value in batch.items()}
        output = model(batch["image"], proposals and proposals(batch))
        sums += torch.stack([descriptors.float().norm(dim=1).sum() for descriptors in output.descriptors])
    images = math.ceil(len(trainer.train) / every)
    initialise_fusion(model, (distributed.total(sums) / images).tolist())


@torch.no_grad()
def initialise_fusion(model: RACNN, norms: list[float]) -> None:
    """Let the fusion head start as the mean of the scales' logits.

    The descriptors are normalised before they are fused, so each classifier's weights are multiplied by the mean length
    of its descriptors.

    Args:
        model: the network, with more than one scale.
        norms: mean Euclidean length of each scale's descriptors on training images.
    """
    assert model.fusion is not None
    count = len(norms)
    heads = [model.scale(number).classifier for number in range(count)]
    blocks = [head.weight * norm / count for head, norm in zip(heads, norms, strict=True)]
    model.fusion.weight.copy_(torch.cat(blocks, dim=1))
    model.fusion.bias.copy_(torch.stack([head.bias for head in heads]).mean(dim=0))
