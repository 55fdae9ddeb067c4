"""A run under training: its network, its images and where it stands. The stages train it, one phase after another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from racnn_cli import backbones, evaluation
from racnn_cli.core import distributed
from racnn_cli.core.device import select_device
from racnn_cli.core.model import RACNN, build, resolve
from racnn_cli.data.images import DataSource, batches
from racnn_cli.data.locate import absolute
from racnn_cli.data.source import open_source
from racnn_cli.errors import Interrupted, RecipeError, RunError
from racnn_cli.events import AnyEvent, ChoiceEvent, Validation, WarningEvent, describe_left_out
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.threads import crowded
from racnn_cli.training import checkpoint, resume
from racnn_cli.training.checkpoint import Candidate, Checkpoint, Progress
from racnn_cli.training.console import Console, describe_position
from racnn_cli.training.effects import Context, without_effect
from racnn_cli.training.health import imbalance, warnings
from racnn_cli.training.interrupts import Interrupts, StopRequested
from racnn_cli.training.phases import LEARNED, BoxSource, single_value_layer


class Trainer:
    """One run under training. `Trainer.start` makes a new run, `Trainer.resume` continues one that exists.

    Attributes:
        run, recipe: the folder, and the recipe with every value as used.
        model: the network, on `device`.
        source, train, val: the images; the training and the validation split as data sets.
        boxes: where boxes come from instead of the APNs.
        progress: where the run stands.
        interrupts: SIGINT and SIGTERM so far.
        parent_run: the folder that `--resume --run` names: for a baseline, that of the run it belongs to.
        after_phase: called with stage, phase and round (from 1; 0 outside of `alternate`) after each phase.
    """

    def __init__(
        self,
        *,
        run: Run,
        recipe: Recipe,
        model: RACNN,
        source: DataSource,
        console: Console,
        lock: FileLock | None,
        saved: Checkpoint | None = None,
        parent_run: Path | None = None,
        boxes: BoxSource = LEARNED,
    ) -> None:
        self.run, self.recipe, self.source, self.console, self.boxes = run, recipe, source, console, boxes
        self.device = distributed.local_device(select_device(recipe.train.device))
        if recipe.train.batchnorm == "synced" and distributed.world() > 1:
            model = backbones.convert_sync_batchnorm(model)
        self.model = model.to(self.device)
        if recipe.train.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train = source.dataset("train", model.source, augment=True)
        self.val = source.dataset("val", model.source, augment=False)
        self.progress = saved.progress if saved else Progress()
        self.interrupts = Interrupts()
        self.parent_run = parent_run or run.folder
        self.after_phase: Callable[[str, str, int], None] = lambda stage, phase, round_: None
        self.saved_at = time.monotonic()
        self._lock, self._checkpoint = lock, saved
        self._warned = {event.kind for event in run.read_log() if isinstance(event, WarningEvent)}

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        *,
        out: Path | None = None,
        parent_run: Path | None = None,
        quiet: bool = False,
        source: DataSource | None = None,
        boxes: BoxSource = LEARNED,
        given: Mapping[str, Any] | None = None,
    ) -> Trainer:
        """Make a new run. Its folder is made last, so that a wrong request leaves nothing behind.

        Args:
            recipe: what to train.
            out: the run's folder; None for the next free one in `runs/`.
            parent_run: the run that this one is the baseline of; `runs/latest` names a run without a parent.
            quiet: print nothing.
            source: images instead of those that the recipe names.
            boxes: where boxes come from instead of the APNs.
            given: recipe keys that were given explicitly, with their values; those without effect are noted.

        Raises:
            DataError: problems of the data.
            BackboneError: a backbone or weights that cannot be had.
            RunError: `out` is in use.
        """
        _start_processes(recipe)
        console = Console(quiet=quiet or distributed.rank() > 0)
        if source is None:
            source = open_source(recipe.data, seed=recipe.seed, share=distributed.split_work)
        index = source.index
        changes = {"data.path": absolute(recipe.data), "data.range": list(index.value_range or recipe.data.range)}
        batchnorm = recipe.train.batchnorm
        chosen = not recipe.data.source
        recipe = resolve(recipe, side=index.side).override(changes)
        seed_step(recipe.seed)
        model = build(recipe.model, len(index.classes), source=recipe.data.source)
        _check_batchnorm(recipe, model, images=len(index.splits["train"]))
        folder = None
        if distributed.rank() == 0:
            created = Run.create(
                recipe,
                list(index.classes),
                out,
                fingerprint=index.fingerprint,
                contents=index.contents,
                latest=parent_run is None,
            )
            folder = str(created.folder)
        run = Run(Path(distributed.broadcast(folder)))
        trainer = cls(
            run=run,
            recipe=recipe,
            model=model,
            source=source,
            console=console,
            lock=_lock(run),
            parent_run=parent_run,
            boxes=boxes,
        )
        trainer._introduce(chosen_source=chosen)
        if batchnorm != recipe.train.batchnorm:
            console.say(
                f"note: train.batchnorm = {recipe.train.batchnorm} instead of {batchnorm}: random weights have no "
                "BatchNorm statistics to keep"
            )
        trainer._note_without_effect(given or {})
        return trainer

    @classmethod
    def resume(
        cls,
        run: Run,
        *,
        changes: dict[str, Any] | None = None,
        stage: str | None = None,
        parent_run: Path | None = None,
        quiet: bool = False,
        source: DataSource | None = None,
        boxes: BoxSource = LEARNED,
    ) -> Trainer:
        """Continue a run from its last checkpoint.

        Args:
            run: its folder.
            changes: of the recipe, for what is still to be trained; the network and the data cannot change.
            stage: the stage that will be run, maybe again; None: those that are not finished.
            parent_run, quiet, source, boxes: as in `start`.

        Raises:
            RunError: the folder is damaged, the data changed since the start, or the run is finished and `changes`
                would have no effect.
            RecipeError: `changes` would change the network or the data.
        """
        recipe, classes, lock = run.recipe(), run.classes(), _lock(run)
        seed_step(recipe.seed)
        weights = "none" if checkpoint.list_checkpoints(run) else recipe.model.weights
        model = build(recipe.model, len(classes), source=recipe.data.source, weights=weights)
        saved = checkpoint.load(run, model)
        if saved is None and os.path.lexists(run.weights):
            raise RunError(
                f"{run.folder} holds trained weights but no checkpoint to continue from: training would start again "
                "and replace them; nothing was changed",
                "start another run with --out DIR, or take the folder state/ from a backup",
            )
        late: dict[str, str] = {}
        if changes:
            progress = saved.progress if saved else Progress()
            recipe, late = resume.change_recipe(run, recipe, changes, progress, stage=stage)
        _start_processes(recipe)
        console = Console(quiet=quiet or distributed.rank() > 0)
        if source is None:
            share = distributed.split_work
            source = open_source(recipe.data, seed=recipe.seed, classes=classes, share=share)
        run.check_data(source.index.fingerprint)
        _check_batchnorm(recipe, model, images=len(source.index.splits["train"]))
        if saved:
            resume.recount_steps(run, recipe, saved.progress, images=len(source.index.splits["train"]))
        for problem in saved.problems if saved else ():
            console.say(f"note: {problem}; the one before it is used")
        if distributed.rank() == 0:
            run.sweep()
            run.cut_log(saved.progress.logged if saved else 0)
        distributed.barrier()
        trainer = cls(
            run=run,
            recipe=recipe,
            model=model,
            source=source,
            console=console,
            lock=lock,
            saved=saved,
            parent_run=parent_run,
            boxes=boxes,
        )
        console.say(f"resuming {run.folder} {describe_position(trainer.progress)}")
        for key, reason in late.items():
            console.say(f"note: {key} has no effect: {reason}")
        trainer._note_without_effect({key: value for key, value in (changes or {}).items() if key not in late})
        trainer._warn_if_crowded()
        if saved is None:  # the log starts again
            trainer._warn_of_imbalance()
        return trainer

    def _note_without_effect(self, given: Mapping[str, Any]) -> None:
        """Say which of the values that were given explicitly change nothing."""
        context = Context(
            recipe=self.recipe, index=self.source.index, device=self.device.type, world=distributed.world()
        )
        for key, reason in without_effect(given, context).items():
            self.console.say(f"note: {key} has no effect: {reason}")

    def _warn_if_crowded(self) -> None:
        """Say once if processes compete for the cores, which the CPU's threads suffer from."""
        # A baseline starts in a process that has trained before: the load is that process's own.
        first = self.parent_run == self.run.folder
        if first and self.device.type == "cpu" and hasattr(os, "getloadavg"):
            processes, load = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.getloadavg()[0]
            if warning := crowded(torch.get_num_threads(), processes, os.cpu_count() or 1, load):
                self.console.say(f"warning: {warning}")

    def close(self) -> None:
        """Let other processes have the run folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def resume_command(self) -> str:
        """The command that continues the run."""
        words = f"train --resume --run {self.parent_run}"
        # Without the two dashes, torchrun on Python 3.11 would take --run for an abbreviation of its own --run-path.
        return f"racnn {words}" if distributed.world() == 1 else f"torchrun ... -m racnn_cli -- {words}"

    def interrupted(self) -> Interrupted:
        """The error to raise once everything is saved after a signal, which may have reached another process only."""
        return Interrupted(self.resume_command, self.interrupts.number or signal.SIGTERM)

    def take_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that the first phase after a resume continues from; None after that."""
        saved, self._checkpoint = self._checkpoint, None
        return saved if saved is not None and (self.progress.epoch or self.progress.step) else None

    def batches(self, split: str, *, skip: int = 0, augment: bool = True, every: int = 1) -> Any:
        """One epoch of a split for this process: of `train` in a new order, else as listed.

        Args:
            split: train, val or test.
            skip: batches that this epoch has seen already.
            augment: False: training images as they are, in the order in which they are listed.
            every: take every n-th image only.
        """
        shuffle = split == "train" and augment
        dataset = {"train": self.train, "val": self.val}.get(split)
        if dataset is None or (split == "train" and not augment):
            dataset = self.source.dataset(split, self.model.source, augment=False)
            dataset.items = dataset.items[::every]
        return batches(
            dataset,
            batch=self.recipe.train.batch,
            epoch=self.progress.views if shuffle else 0,
            seed=self.recipe.seed,
            shuffle=shuffle,
            workers=self.recipe.data.workers,
            skip=skip,
            rank=distributed.rank(),
            world=distributed.world(),
            pin_memory=self.device.type == "cuda",
        )

    def interruptible(self, batches: Iterable[Any], *, activity: str) -> Iterator[Any]:
        """The batches, until a signal arrives; of several processes, all continue to the end.

        Args:
            batches: of this process.
            activity: what they are for, as the progress lines name it.

        Raises:
            StopRequested: a signal arrived.
        """
        for batch in batches:
            if self.interrupts.number and distributed.world() == 1:
                raise StopRequested
            yield batch
            self.console.still_busy(activity)

    def measure(
        self, split: str, *, scales: int | None = None, boxes: BoxSource | None = None
    ) -> evaluation.Measurement:
        """Measure the network as it stands on a split.

        Args:
            split: val or test.
            scales: 1: scale 1 alone.
            boxes: where they come from; None: as in training.
        """
        return evaluation.measure(
            self.model,
            self.interruptible(self.batches(split), activity="validation"),
            self.device,
            scales=scales,
            margin=self.recipe.alternate.margin,
            proposals=(boxes or self.boxes).proposals,
        )

    def validate(self, scales: int | None = None) -> Validation:
        """Validation figures of the network as it stands."""
        return self.measure("val", scales=scales).validation()

    def save(
        self, optimizer: torch.optim.Optimizer | None = None, averages: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write a checkpoint; one process does."""
        if distributed.rank() == 0:
            checkpoint.save(
                self.run, self.model, self.progress, optimizer=optimizer, averages=averages, keep=self.recipe.train.keep
            )
        self.saved_at = time.monotonic()

    def log_choice(self, kept: Candidate, last: Candidate, *, unit: Literal["epoch", "round"], phase: str = "") -> None:
        """Log and say which epoch of a phase, or which round, was kept."""
        event = ChoiceEvent(
            stage=self.progress.stage,
            phase=phase,
            unit=unit,
            kept=kept.number,
            last=last.number,
            kept_val=kept.val,
            last_val=last.val,
        )
        self.log(event)
        self.console.say(f"  {event.describe()}")

    def log(self, event: AnyEvent) -> None:
        """Add a line to log.jsonl; one process does."""
        if distributed.rank() == 0:
            self.run.append_log(event)

    def warn(self, val: Validation, *, finer: bool) -> None:
        """Say, and log, what the validation figures give cause to worry about, each kind once.

        Args:
            val: of all scales.
            finer: the finer scales have been trained on their boxes, so that their accuracy counts.
        """
        self._warn(warnings(val, self.recipe, len(self.val), finer=finer))

    def warn_never_predicted(self, measurement: evaluation.Measurement) -> None:
        """Say, and log, which classes the network never predicts on the validation split, which was measured."""
        text = measurement.warn_never_predicted(self.source.index.classes, "val")
        self._warn({"never predicted": text} if text else {})

    def _warn(self, texts: Mapping[str, str]) -> None:
        for kind, text in texts.items():
            if kind in self._warned:
                continue
            self._warned.add(kind)
            self.console.say(f"  warning: {text}")
            progress = self.progress
            self.log(WarningEvent(stage=progress.stage, round=progress.round, kind=kind, text=text))

    def _warn_of_imbalance(self) -> None:
        """Say, and log, that the classes differ much in size; a baseline has the images of its run."""
        if self.parent_run == self.run.folder:
            self._warn(imbalance(self.source.index))

    def _introduce(self, *, chosen_source: bool) -> None:
        index, recipe, console = self.source.index, self.recipe, self.console
        counts = ", ".join(f"{len(items)} {name}" for name, items in index.splits.items())
        model = recipe.model
        console.title(f"{recipe.name}: {model.backbone}, {model.scales} scale(s) at {list(model.sizes)} px")
        console.say(
            f"{recipe.data.path}: {len(index.classes)} classes, {counts} images; source {recipe.data.source} px"
        )
        if chosen_source and index.side:
            console.say(
                f"source: chosen from files of {index.side} px (median) and from the views; data.source sets it"
            )
        console.say(f"run folder {self.run.folder}, device {self.device}, seed {recipe.seed}")
        self._warn_if_crowded()
        if note := backbones.describe_run(model.weights):
            console.say(f"note: {note}")
        for note in index.notes:
            console.say(f"note: {note}")
        if index.skipped:
            console.say(f"left out, as --skip-bad asks: {len(index.skipped)} file(s)")
            for split, left_out in index.left_out.items():
                if left_out:
                    console.say(f"  {split}: {describe_left_out(left_out, len(index.splits[split]))}")
            for problem in index.skipped[:20]:
                console.say(f"  {problem}")
        self._warn_of_imbalance()


def seed_step(seed: int, *position: int) -> None:
    """Seed dropout and the like as a pure function of (seed, position), for exact resume."""
    mixed = seed
    for part in position:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63 - 1)
    torch.manual_seed(mixed)


def _start_processes(recipe: Recipe) -> None:
    """Join the other processes.

    Raises:
        RecipeError: the recipe asks for something that they cannot do on this device.
    """
    device = select_device(recipe.train.device)
    if recipe.train.batchnorm == "synced" and distributed.world() > 1 and device.type != "cuda":
        raise RecipeError(
            f"train.batchnorm = synced needs CUDA devices, not {device.type}: torch's SyncBatchNorm computes on "
            "nothing else",
            "--set train.batchnorm=train, with which each process normalises over its own images",
        )
    distributed.start(device)


def _check_batchnorm(recipe: Recipe, model: RACNN, *, images: int) -> None:
    """Check that no BatchNorm layer gets a single value per channel, over which torch cannot compute statistics.

    Args:
        recipe: as used.
        model: the network, on the CPU.
        images: number of training images.

    Raises:
        RecipeError: a process trains on single images, and a layer has one value per channel of an image.
    """
    world, batch, mode = distributed.world(), recipe.train.batch, recipe.train.batchnorm
    alone = batch == 1 or images < 2 * world
    if not alone or mode == "frozen" or (mode == "synced" and world > 1) or not (layer := single_value_layer(model)):
        return
    reason, hint = f"train.batch = {batch}", "--set train.batch=2 or more"
    if batch > 1:
        reason, hint = f"{images} training image(s) for {world} process(es)", "more training images or fewer processes"
    if recipe.model.weights != "none":
        hint += ", --set train.batchnorm=frozen"
    raise RecipeError(
        f"{reason}: {recipe.model.backbone} cannot train on a single image per step, because its BatchNorm layer "
        f"{layer} has one value per channel",
        f"{hint}, or a --backbone without BatchNorm",
    )


def _lock(run: Run) -> FileLock | None:
    """The lock on a run's folder, for the process that writes."""
    return run.lock() if distributed.rank() == 0 else None
