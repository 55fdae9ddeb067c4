"""The networks that are compared: each is an arm, trained per seed in `runs/bench-attention-RECIPE/seed-N/ARM`.

A finished arm has a `bench.json` and is not trained again; an interrupted one continues. Arms that differ only after
`pretrain-cnn` start from a copy of the run at that point, `seed-N/pretrained`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from racnn_cli import api
from racnn_cli import recipe as recipes
from racnn_cli.bench import Options
from racnn_cli.bench.boxes import BoxKind, box_source
from racnn_cli.bench.records import ArmResult, Metrics, SeedResult, read_milestones
from racnn_cli.bench.summary import report
from racnn_cli.core.model import resolve
from racnn_cli.data.datasets import clutter
from racnn_cli.data.images import DataSource
from racnn_cli.data.source import open_source
from racnn_cli.errors import DataError, Interrupted, RecipeError, RunError, did_you_mean
from racnn_cli.events import TestEvent
from racnn_cli.recipe import Recipe
from racnn_cli.run import RUNS, Run, write_json, write_text
from racnn_cli.training import stages
from racnn_cli.training.baseline import baseline_recipe
from racnn_cli.training.compute import compute_of, epochs_run
from racnn_cli.training.phases import BoxSource
from racnn_cli.training.trainer import Trainer

QUICK_IMAGES = 240  # images of `clutter` with --quick


@dataclass(frozen=True)
class Arm:
    """A network to train.

    Attributes:
        name: as the tables show it.
        about: a short description.
        changes: dotted keys of the recipe to values.
        boxes: where boxes come from, in training and in the test.
        pretrained: start from the learned arm's state after `pretrain-cnn`.
        plain: one scale, at the size of the first view or at the size that costs as much as all scales.
        folder: name of the run folder; empty: `name` with dashes.
    """

    name: str
    about: str
    changes: Mapping[str, object] = field(default_factory=dict)
    boxes: BoxKind = "apn"
    pretrained: bool = True
    plain: Literal["", "first view", "equal compute"] = ""
    folder: str = ""

    @property
    def folder_name(self) -> str:
        return self.folder or "-".join(re.findall(r"\w+", self.name))

    @property
    def lr_key(self) -> str:
        """The learning rate that matters most for it."""
        return "pretrain_cnn.lr" if self.plain else "alternate.cnn_lr"

    def lr(self, recipe: Recipe) -> float:
        """That learning rate in a recipe."""
        return recipe.pretrain_cnn.lr if self.plain else recipe.alternate.cnn_lr

    def with_lr(self, recipe: Recipe, factor: float) -> Arm:
        """The arm with a multiple of the recipe's learning rate, in a folder of its own."""
        if factor == 1:
            return self
        lr = self.lr(recipe) * factor
        return replace(self, changes={**self.changes, self.lr_key: lr}, folder=f"{self.folder_name}-lr-{lr:g}")


def check_names(names: Iterable[str], arms: Iterable[Arm]) -> None:
    """Check that every name is that of an arm.

    Raises:
        RecipeError: an unknown arm.
    """
    known = [arm.name for arm in arms]
    for name in names:
        if name not in known:
            raise RecipeError(f"there is no arm {name!r}{did_you_mean(name, known)}", f"one of: {', '.join(known)}")


LEARNED = Arm("learned", "the recipe as it is", pretrained=False)


class SeedExperiment:
    """All arms of one seed.

    Args:
        options: `recipe`, `data` and `quick` of the bench.
        seed: seed of the split and of training.
        needs_boxes: the test images must have ground-truth boxes.
        learned: the arm that the others start from, and that sets the budget of the plain ones.
        folder: of the runs, instead of the usual one.
        milestones: measure the learned arm on the test split after every stage and phase.

    Raises:
        RecipeError: the recipe does not exist or has one scale.
    """

    def __init__(
        self,
        options: Options,
        seed: int,
        *,
        needs_boxes: bool = True,
        learned: Arm = LEARNED,
        folder: Path | None = None,
        milestones: bool = True,
    ) -> None:
        changes: dict[str, Any] = {"seed": seed, "quick": options.quick, "baseline": False, "onnx": False}
        recipe = recipes.load(options.recipe, (), changes).as_used()
        if recipe.model.scales < 2:
            raise RecipeError(
                f"recipe {recipe.name} has one scale, so it has no attention to measure",
                "--recipe with model.scales of at least 2",
            )
        self.data_path = options.data or recipe.data.path
        if recipe.data.path != "clutter":
            recipe = recipe.override({"data.path": self.data_path})
        else:  # its recipe does not name the folder of the Fashion-MNIST files
            self.data_path = f"clutter:{options.data or clutter.FOLDER}"
            if options.quick:
                recipe = recipe.override({"data.sample.images": min(recipe.data.sample.images, QUICK_IMAGES)})
        self.milestones = milestones
        self.seed, self.recipe, self.needs_boxes = seed, resolve(recipe), needs_boxes
        suffix = "-quick" if options.quick else ""
        self.folder = folder or RUNS / f"bench-attention-{recipe.name}{suffix}" / f"seed-{seed}"
        self.learned = Run(self.folder / learned.folder_name)
        self.pretrained = Run(self.folder / "pretrained")

    @cached_property
    def source(self) -> DataSource:
        """The images.

        Raises:
            DataError: the test images need ground-truth boxes and have none.
        """
        source = open_source(self.recipe.data.model_copy(update={"path": self.data_path}), seed=self.seed)
        has_boxes = isinstance(source, clutter.Clutter) or any(item.box for item in source.index.splits["test"])
        if self.needs_boxes and not has_boxes:
            raise DataError(
                f"{self.data_path} has no ground-truth boxes in its test split to compare with",
                "the data clutter or fieldguide, or a CSV file with boxes",
            )
        return source

    def recipe_of(self, arm: Arm) -> Recipe:
        """Build the recipe of an arm; that of a plain one depends on the epochs of the learned arm."""
        recipe, section, changes = self.recipe, self.recipe.alternate, dict(arm.changes)
        if arm.plain:
            epochs, size = epochs_run(self.learned), None
            if arm.plain == "first view":
                size = recipe.model.sizes[0]
                count = epochs["pretrain-cnn", ""] + epochs["alternate", "CNN phase"]
                changes |= {"pretrain_cnn.epochs": count}
            recipe = recipe.override({"data.source": self.learned.recipe().data.source})
            recipe = baseline_recipe(recipe, classes=len(self.learned.classes()), epochs=epochs, size=size)
        elif section.ramp and not changes.get("alternate.ramp", True):
            # Fewer rounds without the ramp, so that the total of CNN epochs stays the same.
            changes["alternate.rounds"] = max(round(section.cnn_epochs_in(section.rounds) / section.cnn_epochs), 1)
        if not recipe.data.source and self.learned.recipe_file.is_file():  # chosen when that was started
            changes["data.source"] = self.learned.recipe().data.source
        return resolve(recipe.override(changes))

    def run_arms(self, arms: Iterable[Arm]) -> SeedResult:
        """Train and test several arms, in this order; see `run_arm`."""
        results = {arm.name: self.run_arm(arm) for arm in arms}
        return SeedResult(seed=self.seed, folder=str(self.folder), arms=results)

    def run_arm(self, arm: Arm) -> ArmResult:
        """Return the results of an arm; an arm that is not finished is trained first.

        Raises:
            RunError: the folder holds a run of another recipe, `bench.json` is damaged, or training fails.
        """
        recipe, run = self.recipe_of(arm), Run(self.folder / arm.folder_name)
        begun, file = api.same_recipe(run.folder, recipe), run.folder / "bench.json"
        if begun and file.is_file():
            try:
                return ArmResult.model_validate_json(file.read_bytes())
            except ValueError:
                hint = "delete it, and the same command measures the arm again"
                raise RunError(f"{file} is damaged", hint) from None
        report(f"seed {self.seed}, {arm.name}: {'continues' if begun else 'trains'}, {run.folder}")
        try:
            with closing(self._open_trainer(arm, recipe, run)) as trainer:
                result = self._train(arm, trainer)
        except Interrupted as error:
            error.hint = "the same `racnn bench` command continues"
            raise
        write_json(file, result.to_json())
        return result

    @contextmanager
    def finished(self, arm: Arm) -> Iterator[Trainer]:
        """A finished arm, to measure more of it."""
        with closing(self._open_trainer(arm, self.recipe_of(arm), Run(self.folder / arm.folder_name))) as trainer:
            yield trainer

    def _open_trainer(self, arm: Arm, recipe: Recipe, run: Run) -> Trainer:
        boxes = box_source(arm.boxes, recipe)
        if arm.pretrained and not arm.plain and not run.recipe_file.is_file():
            self._copy(self.pretrained, run, recipe)
        options: dict[str, Any] = {"parent_run": run.folder, "quiet": True, "source": self.source, "boxes": boxes}
        if run.recipe_file.is_file():
            return Trainer.resume(run, **options)
        return Trainer.start(recipe, out=run.folder, **options)

    def _train(self, arm: Arm, trainer: Trainer) -> ArmResult:
        run, recipe, is_learned = trainer.run, trainer.recipe, arm.folder_name.startswith(LEARNED.name)

        def log_test(stage: str, phase: str, round_: int) -> None:
            name = f"{stage}: {phase}, round {round_}" if phase else stage
            trainer.log(TestEvent(moment=name, test=_test(trainer).to_json()))

        if is_learned and self.milestones:
            trainer.after_phase = log_test
        for stage in stages.plan(recipe):
            if stage not in trainer.progress.done:
                stages.run_stage(trainer, stage)
            only_first = trainer.progress.done == [stages.NAMES[0]] and not trainer.progress.stage
            if is_learned and only_first and not self.pretrained.recipe_file.is_file():
                self._copy(self.learned, self.pretrained, recipe)
        result = _test(trainer)
        result.val = Metrics.from_validation(trainer.validate())
        result.seconds = sum(event.seconds for event in run.epochs())
        if is_learned and self.milestones:
            result.milestones = read_milestones(run)
            if result.boxes[-1].iou_mean is not None:
                result.true_boxes = _test(trainer, box_source("true", recipe))
        result.size, result.choices = recipe.model.sizes[0], run.choices()
        result.compute = compute_of(run, images=len(trainer.train))
        return result

    def _copy(self, source: Run, target: Run, recipe: Recipe) -> None:
        """Copy a run folder in one step, with another recipe."""
        if not source.recipe_file.is_file():
            raise RunError(
                f"{source.folder} is missing, from which {target.folder} starts",
                f"move {self.folder} out of the way to train all of its arms again",
            )
        half = Run(target.folder.with_name(f".{target.folder.name}.{os.getpid()}"))
        shutil.rmtree(half.folder, ignore_errors=True)
        shutil.copytree(source.folder, half.folder)
        write_text(half.recipe_file, recipes.dump(recipe))
        half.folder.rename(target.folder)


def _test(trainer: Trainer, boxes: BoxSource | None = None) -> ArmResult:
    """Measure the network as it stands on the test split; without `boxes`, with those of training."""
    measurement = trainer.measure("test", boxes=boxes)
    return ArmResult.from_validation(measurement.validation(), images=measurement.images)
