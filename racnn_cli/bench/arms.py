"""Networks to compare, trained seed by seed: each an arm, in `runs/bench-attention-RECIPE/seed-N/ARM`.

An arm that is finished has a `bench.json` and is not trained again; an interrupted one goes on. Arms that differ
only after `pretrain-cnn` start from one copy of the run as it was then, `seed-N/pretrained`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from racnn_cli import api, evaluation
from racnn_cli import recipe as recipes
from racnn_cli.bench import Options, boxes
from racnn_cli.bench.annotated import AnnotatedFileSource
from racnn_cli.bench.compute import Compute, at_size, equal_compute
from racnn_cli.core.model import resolve
from racnn_cli.data.datasets import clutter
from racnn_cli.data.index import build_index
from racnn_cli.data.source import DataSource, FileSource
from racnn_cli.errors import Interrupted, RacnnError
from racnn_cli.events import EpochEvent, TestEvent
from racnn_cli.recipe import Recipe
from racnn_cli.run import RUNS, Run, write_json, write_text
from racnn_cli.training.loop import loader
from racnn_cli.training.stages import Guide, Teacher
from racnn_cli.training.trainer import Trainer, baseline_recipe, rounds_run

QUICK = 240  # images of `clutter` with --quick


@dataclass(frozen=True)
class Arm:
    """One network to train.

    Attributes:
        name: as the table names it.
        about: what it is, in a sentence.
        changes: dotted keys of the recipe to values.
        guide: whose boxes its CNNs see, while training and in the test: the APNs', or others.
        taught: its APNs learn the true boxes; its CNNs see, and it is tested on, what they then propose.
        pretrained: start from the learned arm's state after `pretrain-cnn`.
        plain: one scale, at the first view's size or at the size that costs as much as all scales.
        folder: its run's; empty: `name` with dashes.
    """

    name: str
    about: str
    changes: Mapping[str, object] = field(default_factory=dict)
    guide: Literal["", "true", "random"] = ""
    taught: bool = False
    pretrained: bool = True
    plain: Literal["", "first view", "equal compute"] = ""
    folder: str = ""

    @property
    def place(self) -> str:
        """Name of the run folder."""
        words = "".join(sign if sign.isalnum() else " " for sign in self.name).split()
        return self.folder or "-".join(words)


LEARNED = Arm("learned", "the recipe as it is", pretrained=False)


class SeedExperiment:
    """The arms of one seed.

    Args:
        options: of the bench: `recipe`, `data`, `quick`.
        seed: of everything random.
        boxed: the images must have true boxes.

    Raises:
        RacnnError: there is no such recipe, or it has one scale.
    """

    def __init__(self, options: Options, seed: int, *, boxed: bool = True) -> None:
        changes: dict[str, Any] = {"seed": seed, "quick": options.quick, "baseline": False, "onnx": False}
        recipe = recipes.load(options.recipe, (), changes).as_used()
        if recipe.model.scales < 2:
            raise RacnnError(
                f"recipe {recipe.name} has one scale: there is no attention to measure", "--recipe"
            )
        self.items: Path | None = None
        if recipe.data.path == "clutter":
            self.items = Path(options.data or clutter.FOLDER)
            if options.quick:
                recipe = recipe.override({"data.sample.images": min(recipe.data.sample.images, QUICK)})
        elif options.data:
            recipe = recipe.override({"data.path": options.data})
        self.seed, self.recipe, self.boxed = seed, resolve(recipe), boxed
        self.folder = (
            RUNS / f"bench-attention-{recipe.name}{'-quick' if options.quick else ''}" / f"seed-{seed}"
        )
        self.console = Console(stderr=True, highlight=False)

    @cached_property
    def source(self) -> DataSource:
        """The images; where they must, with true boxes for the test split at least."""
        data = self.recipe.data
        if self.items is not None:
            return clutter.Clutter(self.items, data.sample.images, data, self.seed)
        index = build_index(data, seed=self.seed)
        if self.boxed and all(item.box is None for item in index.splits["test"]):
            raise RacnnError(
                f"{data.path} has no true boxes in its test split: there is nothing to measure attention against",
                "the data clutter or fieldguide, or a CSV file with boxes",
            )
        return FileSource(index, data, self.seed)

    @property
    def learned(self) -> Run:
        return Run(self.folder / LEARNED.place)

    @property
    def pretrained(self) -> Run:
        return Run(self.folder / "pretrained")

    @cached_property
    def compute(self) -> Compute:
        """What all scales cost, and the plain backbone that costs as much; the learned arm has been started."""
        return equal_compute(self.recipe.override({"seed": 0}), len(self.learned.classes()))

    def recipe_of(self, arm: Arm) -> Recipe:
        """The recipe of an arm; that of a plain one depends on the rounds that the learned arm ran."""
        if not arm.plain:
            return resolve(self.recipe.override(self._as_long(arm.changes)))
        rounds = rounds_run(self.learned)
        if arm.plain == "equal compute":
            return resolve(baseline_recipe(self.recipe, rounds, self.compute.size))
        alone = baseline_recipe(self.recipe, rounds, self.recipe.model.sizes[0])
        epochs = self.recipe.pretrain_cnn.epochs + self.recipe.alternate.cnn_epochs_in(rounds)
        return resolve(alone.override({"pretrain_cnn.epochs": epochs, "pretrain_cnn.patience": epochs}))

    def _as_long(self, changes: Mapping[str, object]) -> Mapping[str, object]:
        """An arm without the ramp has rounds of one length, and fewer of them, for as many CNN epochs in all."""
        section = self.recipe.alternate
        if not section.ramp or changes.get("alternate.ramp", True):
            return changes
        rounds = round(section.cnn_epochs_in(section.rounds) / section.cnn_epochs)
        return {"alternate.rounds": max(rounds, 1), **changes}

    def guide(self, kind: str) -> Guide | None:
        """Boxes instead of the APNs'; None: the APNs' own."""
        model = self.recipe.model
        if kind == "true":
            return boxes.true_boxes(model.scales, model.floor, model.ceiling)
        if kind == "random":
            return boxes.random_boxes(model.scales, model.floor, model.ceiling, self.seed)
        return None

    @property
    def teacher(self) -> Teacher:
        """The true boxes, as an APN could propose them."""
        model = self.recipe.model
        return boxes.item_within(model.scales, model.floor, model.ceiling)

    def figures(self, arm: Arm) -> dict[str, Any]:
        """What is in the arm's bench.json; it is trained first where it is not finished.

        Returns:
            `top1` (`scale 1` ... `average`, `fused` to share), `boxes` (a list, one entry a zoom, as `validate`
            gives), `rank`, `images` (of the test split), `seconds` of training (a shared pretrain-cnn
            included); of the learned arm `moments` and, where there are true boxes, `true_boxes`; of a plain
            one `size` and `multiply_adds`.

        Raises:
            RacnnError: the folder holds a run of another recipe, or training fails.
        """
        recipe, run = self.recipe_of(arm), Run(self.folder / arm.place)
        there, marker = api.same_recipe(run.folder, recipe), run.folder / "bench.json"
        if there and marker.is_file():
            return json.loads(marker.read_text(encoding="utf-8"))
        how = "goes on" if there else "trains"
        self.console.print(escape(f"seed {self.seed}, {arm.name}: {how}, {run.folder}"), soft_wrap=True)
        try:
            found = self._train(arm, recipe, run, there)
        except Interrupted as error:
            error.hint = "the same `racnn bench` command goes on"
            raise
        write_json(marker, found)
        return found

    def _train(self, arm: Arm, recipe: Recipe, run: Run, there: bool) -> dict[str, Any]:
        guide = self.guide(arm.guide)
        source = self.source
        teacher = self.teacher if arm.taught else None
        if (guide or teacher) and isinstance(source, FileSource):  # the boxes of varied files take time
            source = AnnotatedFileSource(source.index, source.data, source.seed)
        if arm.pretrained and not arm.plain and not there:
            self._copy(self.pretrained, run, recipe)
        if run.recipe_file.is_file():
            trainer = Trainer.proceed(
                run, owner=run.folder, quiet=True, source=source, guide=guide, teacher=teacher
            )
        else:
            trainer = Trainer.start(
                recipe, run.folder, owner=run.folder, quiet=True, source=source, guide=guide, teacher=teacher
            )
        if arm.place == LEARNED.place:
            trainer.watch = lambda moment: run.append_log(
                {"event": "test", "moment": moment, "test": self._test(trainer)}
            )
        for stage in trainer.plan:
            if stage not in trainer.context.progress.done:
                trainer.run_stage(stage)
            if arm.place == LEARNED.place and stage == trainer.plan[0]:
                self._keep_pretrained(trainer)
        trainer.close()
        found = self._test(trainer, guide) | {"seconds": sum(event.seconds for event in run.epochs())}
        if arm.place == LEARNED.place:
            found["moments"] = list(moments(run))
            if "iou_mean" in found["boxes"][-1]:
                found["true_boxes"] = self._test(trainer, self.guide("true"))
        if arm.plain:
            size, classes = recipe.model.sizes[0], len(run.classes())
            found |= {"size": size, "multiply_adds": at_size(self.recipe, classes, size)}
        return found

    def _keep_pretrained(self, trainer: Trainer) -> None:
        progress = trainer.context.progress
        if self.pretrained.recipe_file.is_file() or progress.stage or progress.done != [trainer.plan[0]]:
            return
        self._copy(trainer.context.run, self.pretrained, trainer.context.recipe)

    def _copy(self, old: Run, new: Run, recipe: Recipe) -> None:
        """A run folder again, for another recipe; in one step."""
        if not old.recipe_file.is_file():
            raise RacnnError(
                f"{old.folder} is missing, from which {new.folder} starts",
                f"move {self.folder} out of the way, and its arms are trained anew",
            )
        half = Run(new.folder.with_name(f".{new.folder.name}.{os.getpid()}"))
        shutil.rmtree(half.folder, ignore_errors=True)
        shutil.copytree(old.folder, half.folder)
        write_text(half.recipe_file, recipes.dump(recipe))
        half.folder.rename(new.folder)

    def _test(self, trainer: Trainer, guide: Guide | None = None) -> dict[str, Any]:
        """The figures on the test split as the network stands."""
        context = trainer.context
        images = self.source.dataset("test", context.model.source, augment=False)
        found = evaluation.measure(
            context.model,
            loader(context, images, shuffle=False),
            context.device,
            scales=context.recipe.model.scales,
            margin=context.recipe.alternate.margin,
            proposals=guide,
        )
        return flat(found.validation().to_json()) | {"images": len(images)}


def flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `validate` gives, with top-1 by name: `top1`, and with more than one scale `boxes` and `rank`."""
    scales = {f"scale {number}": scale for number, scale in enumerate(found["scales"], start=1)}
    answers = scales | {name: found[name] for name in ("average", "fused") if name in found}
    top1 = {name: answer["top1"] for name, answer in answers.items()}
    return {"top1": top1} | {name: found[name] for name in ("boxes", "rank") if name in found}


def moments(run: Run) -> Iterator[dict[str, Any]]:
    """The end of every stage and phase: `moment`, `epochs` since the start, `val` and `test` if measured."""
    epochs, found = 0, dict[str, dict[str, Any]]()
    for event in run.read_log():
        if isinstance(event, TestEvent):
            found.setdefault(event.moment, {"epochs": epochs})["test"] = event.test
        elif isinstance(event, EpochEvent):
            epochs += 1
            name = event.stage + (f": {event.phase}, round {event.round}" if event.phase else "")
            if event.phase == "fusion head":  # the stage ends with it
                name = event.stage
            found.setdefault(name, {}).update(epochs=epochs, val=flat(event.val.to_json()))
    for name, entry in found.items():
        yield {"moment": name} | entry
