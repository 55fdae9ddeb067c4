"""A run from its recipe to its weights: which stage comes when, and what happens between them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock

from racnn_cli import backbones
from racnn_cli import recipe as recipes
from racnn_cli.core import distributed, store
from racnn_cli.core.device import select_device
from racnn_cli.core.model import RACNN, build, resolve
from racnn_cli.data.index import build_index
from racnn_cli.data.source import FileSource, Source
from racnn_cli.errors import BackboneError, RacnnError
from racnn_cli.events import RoundEvent, StageEvent, Validation, WarningEvent
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run, write_text
from racnn_cli.training import checkpoint, stages
from racnn_cli.training.checkpoint import Progress, Saved
from racnn_cli.training.console import Console
from racnn_cli.training.health import warnings
from racnn_cli.training.loop import (
    Context,
    Signals,
    Stopped,
    fit,
    freeze_all_but,
    loader,
    measure,
    polled,
    seed_step,
)
from racnn_cli.training.stages import Guide, Stage, Teacher

SMOOTHING = 0.5  # weight of the newest round in the smoothed losses that end `alternate`


class Trainer:
    """Trains one run, a stage at a time.

    Use `Trainer.start` for a new run and `Trainer.proceed` for one that exists.
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        model: RACNN,
        source: Source,
        console: Console,
        lock: FileLock | None,
        saved: Saved | None,
        owner: Path | None,
        guide: Guide | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        device = distributed.local_device(select_device(recipe.train.device))
        model.to(device)
        if recipe.train.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.saved = saved
        self.context = Context(
            run=run,
            recipe=recipe,
            model=model,
            train=source.dataset("train", model.source, augment=True),
            val=source.dataset("val", model.source, augment=False),
            device=device,
            console=console,
            progress=saved.progress if saved else Progress(),
            guide=guide,
            teacher=teacher,
            signals=Signals(),
            saved=time.monotonic(),
            resume=owner or run.folder,
        )
        self.source = source
        self.lock = lock
        self.warned = {event.kind for event in run.read_log() if isinstance(event, WarningEvent)}
        self.watch: Callable[[str], None] = lambda moment: None

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        out: Path | None,
        *,
        owner: Path | None = None,
        quiet: bool = False,
        source: Source | None = None,
        guide: Guide | None = None,
        teacher: Teacher | None = None,
    ) -> Trainer:
        """A new run. Its folder is made last, so that a wrong request leaves nothing behind.

        Args:
            recipe: what to train.
            out: the run's folder; None for the next free one in `runs/`.
            owner: the run that this one is the baseline of; `runs/latest` names a run without an owner.
            quiet: print nothing.
            source: images instead of those that the recipe names.
            guide: boxes instead of those that the APNs propose.
            teacher: boxes that the APNs learn to propose, instead of what they find out by themselves.

        Raises:
            RacnnError: errors in the data, a backbone or weights that cannot be had, `out` in use.
        """
        distributed.start(select_device(recipe.train.device))
        console = Console(quiet=quiet or distributed.rank() > 0)
        if source is None:
            index = build_index(recipe.data, seed=recipe.seed, share=distributed.split_work)
            source = FileSource(index, recipe.data, recipe.seed)
        index = source.index
        recipe = resolve(recipe)
        seed_step(recipe.seed)
        model = build(recipe.model, len(index.classes), source=recipe.data.source)
        folder = None
        if distributed.rank() == 0:
            created = Run.create(
                recipe, list(index.classes), out, fingerprint=index.fingerprint, latest=owner is None
            )
            folder = str(created.folder)
        run = Run(Path(distributed.broadcast(folder)))
        trainer = cls(run, recipe, model, source, console, _locked(run), None, owner, guide, teacher)
        trainer._introduce()
        return trainer

    @classmethod
    def proceed(
        cls,
        run: Run,
        *,
        sets: dict[str, object] | None = None,
        owner: Path | None = None,
        quiet: bool = False,
        source: Source | None = None,
        guide: Guide | None = None,
        teacher: Teacher | None = None,
    ) -> Trainer:
        """A run that exists, from where it stands.

        Args:
            run: its folder.
            sets: changes of the recipe for what comes; the network and the data cannot change.
            owner: the run that this one is the baseline of.
            quiet: print nothing.
            source, guide, teacher: as in `start`.

        Raises:
            RacnnError: the run folder is damaged, the data are not what they were, `sets` would change the network.
        """
        recipe, classes, lock = run.recipe(), run.classes(), _locked(run)
        seed_step(recipe.seed)
        weights = "none" if checkpoint.saved(run) else recipe.model.weights
        model = build(recipe.model, len(classes), source=recipe.data.source, weights=weights)
        saved = checkpoint.load(run, model)
        if saved is None and os.path.lexists(run.weights):
            raise RacnnError(
                f"{run.folder} holds trained weights but no checkpoint to go on from: training would begin again and "
                "replace them; nothing was changed",
                "start a run of its own with --out DIR, or take the folder state/ from a backup",
            )
        if sets:
            recipe = _changed(run, recipe, sets, saved.progress if saved else Progress())
        distributed.start(select_device(recipe.train.device))
        console = Console(quiet=quiet or distributed.rank() > 0)
        if source is None:
            index = build_index(recipe.data, seed=recipe.seed, classes=classes, share=distributed.split_work)
            source = FileSource(index, recipe.data, recipe.seed)
        run.check_data(source.index.fingerprint)
        if saved:
            _rebatch(run, recipe, saved.progress, len(source.index.splits["train"]))
        for error in saved.errors if saved else ():
            console.say(f"note: {error}; the one before it is used")
        if distributed.rank() == 0:
            run.sweep()
            run.cut_log(saved.progress.logged if saved else 0)
        distributed.barrier()
        return cls(run, recipe, model, source, console, lock, saved, owner, guide, teacher)

    def close(self) -> None:
        """Let other processes have the run folder."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def _introduce(self) -> None:
        index = self.source.index
        recipe, console, splits = self.context.recipe, self.context.console, index.splits
        counts = ", ".join(f"{len(items)} {name}" for name, items in splits.items())
        console.title(
            f"{recipe.name}: {recipe.model.backbone}, {recipe.model.scales} scale(s) at {list(recipe.model.sizes)} px"
        )
        console.say(
            f"{recipe.data.path}: {len(index.classes)} classes, {counts} images; source {recipe.data.source} px"
        )
        console.say(f"run folder {self.context.run.folder}, device {self.context.device}, seed {recipe.seed}")
        for note in index.notes:
            console.say(f"note: {note}")
        if skipped := index.skipped:
            console.say(f"left out, as --skip-bad asks: {len(skipped)} file(s)")
            for error in skipped[:20]:
                console.say(f"  {error}")

    @property
    def plan(self) -> tuple[str, ...]:
        """The stages of this recipe in their order: a single scale has nothing to zoom into."""
        return stages.NAMES if self.context.recipe.model.scales > 1 else stages.NAMES[:1]

    def run_all(self) -> None:
        """Every stage that is not finished."""
        for name in self.plan:
            if name not in self.context.progress.done:
                self.run_stage(name)
        if distributed.rank() == 0 and not self.context.run.weights.exists():  # somebody lost them
            store.save_weights(self.context.run.weights, self.context.model)

    def run_stage(self, name: str) -> None:
        """One stage, from where it stands.

        Raises:
            RacnnError: the stage before it is missing, or a later one is done already.
            Interrupted: a signal came; the state is saved.
        """
        self.check_turn(name)
        with self.context.signals.caught():
            try:
                self._run_stage(name)
            except Stopped:
                raise self.context.interrupted() from None

    def _run_stage(self, name: str) -> None:
        progress = self.context.progress
        if distributed.rank() == 0 and self.context.run.recipe() != self.context.recipe:
            write_text(self.context.run.recipe_file, recipes.dump(self.context.recipe))
        if progress.stage != name:
            done = [stage for stage in progress.done if stage != name]
            self.context.progress = Progress(
                done=done, stage=name, views=progress.views, number=progress.number
            )
        self.context.console.title(name)
        {
            "pretrain-cnn": self._pretrain_cnn,
            "pretrain-apn": self._pretrain_apn,
            "alternate": self._alternate,
        }[name]()
        val = self.validate()
        if name != stages.NAMES[0]:  # no APN has been trained before
            self._warn(val)
        progress = self.context.progress
        done = [*progress.done, name]
        self.context.progress = Progress(done=done, views=progress.views, number=progress.number)
        if distributed.rank() == 0:
            store.save_weights(self.context.run.weights, self.context.model)
            self.context.run.append_log(StageEvent(stage=name, views=progress.views, val=val))
        self.watch(name)  # before it is saved: what is logged after that is not kept by a resume
        self._save()
        distributed.barrier()  # another process may still be reading the best weights
        if distributed.rank() == 0:
            for file in ("best", "best-round"):
                checkpoint.remove(self.context.run, file)

    def check_turn(self, name: str) -> None:
        """Raise a RacnnError if `name` cannot run now."""
        run, progress = self.context.run, self.context.progress
        if name not in self.plan:
            raise RacnnError(
                f"{run.folder} has one scale, the plain backbone: it has no APN, so {name} has nothing to do",
                "start a run with --scales 2 or more",
            )
        position = self.plan.index(name)
        missing = [s for s in self.plan[:position] if s not in progress.done]
        if missing:
            raise RacnnError(
                f"{name} needs {missing[0]}, which has not finished in {run.folder}",
                f"`racnn {missing[0]} --run {run.folder}`",
            )
        later = [s for s in self.plan[position + 1 :] if s in progress.done or s == progress.stage]
        if later:
            raise RacnnError(
                f"{run.folder} is past {name} already ({later[-1]} has begun or finished); nothing was overwritten",
                "start a new run with --out DIR, or continue with `racnn alternate`",
            )

    def _resumed(self) -> Saved | None:
        """The optimizer's state for the first call of the loop after a resume; nothing after that."""
        saved, self.saved = self.saved, None
        progress = self.context.progress
        return saved if saved is not None and (progress.epoch or progress.step) else None

    def _save(self) -> None:
        if distributed.rank() == 0:
            context = self.context
            checkpoint.save(context.run, context.model, context.progress, keep=context.recipe.train.keep)

    def _pretrain_cnn(self) -> None:
        model = self.context.model
        fit(self.context, stages.pretrain_cnn(self.context.recipe), self._resumed())
        first = model.scale(0)
        for number in range(1, len(model.sizes)):
            backbones.copy_weights(first.backbone, model.scale(number).backbone)
            model.scale(number).classifier.load_state_dict(first.classifier.state_dict())

    def _pretrain_apn(self) -> None:
        fit(self.context, stages.pretrain_apn(self.context.recipe, self.context.teacher), self._resumed())

    def _alternate(self) -> None:
        """CNN phase and APN phase in turn until neither loss changes, the best round back, the fusion head."""
        context, recipe = self.context, self.context.recipe
        progress, section = context.progress, recipe.alternate
        while progress.phase != "fusion":
            if progress.phase == "cnn":
                self._say_round("CNN phase")
                self._phase(
                    stages.cnn_phase(recipe, context.guide, progress.round),
                    then="apn" if section.apn_epochs else "judge",
                )
            if progress.phase == "apn":
                self._say_round("APN phase")
                self._phase(stages.apn_phase(recipe, context.teacher), then="judge")
            if progress.phase == "judge":
                ended = self._judge()
                progress.phase = "fusion" if ended else "cnn"
                self._save()
        if not (progress.epoch or progress.step or progress.best is not None):
            distributed.barrier()
            checkpoint.restore(context.run, "best-round", context.model)
            context.console.say(f"  round {progress.best_round} had the lowest validation loss and is kept")
            self._start_fusion()
        fit(context, stages.fusion(recipe, context.guide), self._resumed())

    def _say_round(self, phase: str) -> None:
        progress, section = self.context.progress, self.context.recipe.alternate
        self.context.console.say(f"  round {progress.round + 1} of at most {section.rounds}, {phase}")

    def _phase(self, stage: Stage, then: Literal["apn", "judge"]) -> None:
        fit(self.context, stage, self._resumed())
        self.context.progress.phase = then
        self.watch(f"{stage.name}, round {self.context.progress.round + 1}")
        self._save()

    def _judge(self) -> bool:
        """Measure a finished round; keep it if it is the best; true if `alternate` is at its end.

        The rule: after each round the validation classification loss (mean over the scales) and the validation
        rank loss are smoothed exponentially. A round in which neither changed by more than `tolerance`, relative
        to its size, is a still one; after `patience` still rounds in a row, or `rounds` rounds, it ends.
        """
        context, progress = self.context, self.context.progress
        section = context.recipe.alternate
        val = self.validate()
        loss = val.average.nll
        progress.round += 1
        if progress.best_round_loss is None or loss < progress.best_round_loss:
            progress.best_round, progress.best_round_loss = progress.round, loss
            if distributed.rank() == 0:
                checkpoint.save_snapshot(context.run, "best-round", context.model, progress)
        now = {
            "classification": sum(scale.nll for scale in val.scales) / len(val.scales),
            "rank": val.rank,
        }
        before = progress.smoothed
        progress.smoothed = {
            name: (1 - SMOOTHING) * before.get(name, value) + SMOOTHING * value for name, value in now.items()
        }
        changed = not before or any(
            abs(value - before[name]) > section.tolerance * abs(before[name])
            for name, value in progress.smoothed.items()
        )
        progress.still = 0 if changed else progress.still + 1
        event = RoundEvent(
            stage="alternate", round=progress.round, val=val, smoothed=progress.smoothed, still=progress.still
        )
        if distributed.rank() == 0:
            context.run.append_log(event)
        self._warn(val)
        if progress.still >= section.patience:
            context.console.say(f"  neither loss changed for {progress.still} rounds: the end")
            return True
        return progress.round >= section.rounds

    def _warn(self, val: Validation) -> None:
        """Say, and log, what the validation figures give cause to worry about, each kind once."""
        context, progress = self.context, self.context.progress
        for kind, text in warnings(
            val, context.recipe, len(context.val), finer=progress.stage == "alternate"
        ).items():
            if kind in self.warned:
                continue
            self.warned.add(kind)
            context.console.say(f"  warning: {text}")
            if distributed.rank() == 0:
                context.run.append_log(
                    WarningEvent(stage=progress.stage, round=progress.round, kind=kind, text=text)
                )

    def validate(self) -> Validation:
        """The validation figures of all scales as the network stands."""
        return measure(self.context, self.context.recipe.model.scales)

    @torch.no_grad()
    def _start_fusion(self) -> None:
        """Measure the length of each scale's descriptors on (at most 512) training images as they are."""
        context = self.context
        model = context.model.eval()
        freeze_all_but(model, [])
        plain = self.source.dataset("train", model.source, augment=False)
        plain.items = plain.items[:: math.ceil(len(plain.items) / 512)]
        sums = torch.zeros(len(model.sizes), device=context.device)
        for batch in polled(context, loader(context, plain, shuffle=False)):
            batch = {name: value.to(context.device) for name, value in batch.items()}
            output = model(batch["image"], context.guide and context.guide(batch))
            sums += torch.stack([d.float().norm(dim=1).sum() for d in output.descriptors])
        stages.start_fusion(model, (distributed.total(sums) / len(plain)).tolist())


def _locked(run: Run) -> FileLock | None:
    """The lock on a run's folder, for the process that writes."""
    return run.lock() if distributed.rank() == 0 else None


def rounds_run(run: Run) -> int:
    """How many rounds `alternate` really ran, from the log."""
    return len({event.round for event in run.read_log() if isinstance(event, RoundEvent)})


def baseline_recipe(recipe: Recipe, rounds: int, size: int | None = None) -> Recipe:
    """The plain backbone under the same budget, counted in multiply-adds of the convolutions.

    One scale whose input has as many pixels as all scales together (rounded to a multiple of 32, or scale 1's
    size where the backbone takes no other), and as many epochs as cost what the CNN and APN phases cost; an
    APN phase is counted like a CNN phase, in the baseline's favour.

    Args:
        recipe: as used by the run, with its sizes resolved.
        rounds: rounds that `alternate` really ran.
        size: of the input, instead of that size.
    """
    sizes = recipe.model.sizes
    if size is None:
        size = max(round(math.sqrt(sum(s * s for s in sizes)) / 32) * 32, sizes[0])
        try:
            backbones.build(recipe.model.backbone, size=size, weights="none")
        except BackboneError:
            size = sizes[0]
    phases = recipe.alternate.cnn_epochs_in(rounds) + rounds * recipe.alternate.apn_epochs
    cost = recipe.pretrain_cnn.epochs * sizes[0] ** 2 + phases * sum(s * s for s in sizes)
    epochs = max(math.ceil(cost / size**2), 1)
    return recipe.override(
        {
            "name": "baseline",
            "about": f"the plain backbone of {recipe.name} under the same budget",
            "baseline": False,
            "onnx": False,
            "model.scales": 1,
            "model.sizes": [size],
            "data.source": max(recipe.data.source, size) if recipe.model.zoom == "source" else size,
            "pretrain_cnn.epochs": epochs,
            # Its best epoch on the validation split is kept, as the best round of the other is.
            "pretrain_cnn.patience": epochs,
        }
    )


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[object, object]]:
    """Dotted keys that differ, each with the two values."""
    before, after = asdict_flat(old), asdict_flat(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def check_fixed(run: Run, recipe: Recipe, asked: Recipe) -> None:
    """Raise a RacnnError if the asked recipe differs from the run's in what cannot change: network and data."""
    fixed = [
        f"{key} is {old!r} in {run.folder}, asked for {new!r}"
        for key, (old, new) in differences(recipe, asked).items()
        if (key.startswith(("model.", "data.")) or key in ("seed", "name", "quick", "baseline"))
        and key not in ("data.workers", "data.path", "data.skip_bad", "model.k", "model.gradient")
    ]
    if fixed:
        raise RacnnError(
            "a run's network and data cannot change after its start:\n  " + "\n  ".join(fixed),
            "leave that out to continue with this run, or start a new one with --out DIR",
        )


def _changed(run: Run, recipe: Recipe, sets: dict[str, object], progress: Progress) -> Recipe:
    """The recipe with changes for what is still to come."""
    new = recipe.override(sets)
    check_fixed(run, recipe, new)
    changes = differences(recipe, new)
    # The optimizer's state belongs to the parameters as these keys group them.
    under_way = {"train.optimizer", "train.ema", "train.weight_decay", "pretrain_cnn.head_lr"}
    bound = [key for key in changes if key in under_way and (progress.epoch or progress.step)]
    if bound:
        raise RacnnError(
            f"{run.folder} stands in the middle of {progress.stage}; {', '.join(bound)} cannot change there",
            "`racnn train --resume` without that; it can change between two stages",
        )
    return new


def _rebatch(run: Run, recipe: Recipe, progress: Progress, images: int) -> None:
    """Count an epoch that has begun in steps of the batch that it continues: the order of images is the same.

    Args:
        run, recipe: as they go on.
        progress: where the run stands; changed in place.
        images: of an epoch.

    Raises:
        RacnnError: what has been seen is no whole number of updates of that size.
    """
    batch, accumulate = recipe.train.batch * distributed.world(), recipe.train.accumulate
    seen = min(progress.step * progress.batch, images)
    steps = math.ceil(seen / batch)
    if not progress.step:
        return
    if seen < images and (seen % batch or steps % accumulate):
        raise RacnnError(
            f"{run.folder} stands in the middle of an epoch, after {seen} images; updates of {batch * accumulate} "
            f"({distributed.world()} process(es), train.batch = {recipe.train.batch}, train.accumulate = {accumulate}) "
            "do not fit into that",
            f"as many images an update as before, in batches that divide {progress.batch}",
        )
    progress.sums = {name: value * steps / progress.step for name, value in progress.sums.items()}
    progress.step, progress.batch = steps, batch


def asdict_flat(recipe: Recipe) -> dict[str, object]:
    """Dotted key to value."""
    flat: dict[str, object] = {}
    for key in recipes.key_names():
        value: object = recipe
        for part in key.split("."):
            value = getattr(value, part)
        flat[key] = value
    return flat
