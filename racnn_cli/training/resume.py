"""What may change when a run continues: keys of its recipe, and the size of a batch in the middle of an epoch."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import tomli_w

from racnn_cli import recipe as recipes
from racnn_cli.core import distributed
from racnn_cli.data.images import step_after
from racnn_cli.data.locate import absolute
from racnn_cli.errors import RecipeError, RunError
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run
from racnn_cli.training.checkpoint import Progress

EVALUATED = ("data.path", "data.workers", "data.skip_bad")
"""Keys that the evaluation of a finished run reads too."""
CHANGEABLE = (*EVALUATED, "model.k", "model.gradient")
"""Keys of the sections `data` and `model` that a run does not depend on."""
BETWEEN_STAGES = {"train.optimizer", "train.ema", "train.weight_decay", "pretrain_cnn.head_lr"}
"""The optimizer's state belongs to the parameters as these keys group them."""


STAGE_KEYS = {
    "pretrain-cnn": ("pretrain_cnn.",),
    "pretrain-apn": ("pretrain_apn.",),
    "alternate": ("alternate.", "fusion."),
}
"""The stages in their order, each with the keys that only it reads."""
SHARED = ("train.", "pretrain_cnn.lr", *EVALUATED)
"""Keys, or sections of them, that a baseline shares with its run; its size and epochs are its own."""


def flatten(recipe: Recipe) -> dict[str, object]:
    """Dotted key to value."""
    return {key: operator.attrgetter(key)(recipe) for key in recipes.key_names()}


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[object, object]]:
    """Dotted keys that differ, each with the two values."""
    before, after = flatten(old), flatten(new)
    before["data.path"], after["data.path"] = absolute(old.data), absolute(new.data)
    if not new.data.range:  # decided when the run was started
        after["data.range"] = before["data.range"]
    if not new.data.source:  # as well
        after["data.source"] = before["data.source"]
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def check_fixed(run: Run, recipe: Recipe, asked: Recipe) -> None:
    """Check that the network and the data of `asked` are those of the run.

    Raises:
        RecipeError: they are not.
    """
    fixed = [
        f"{key} is {old!r} in {run.folder}, asked for {new!r}"
        for key, (old, new) in differences(recipe, asked).items()
        if (key.startswith(("model.", "data.")) or key in ("seed", "name", "quick", "baseline"))
        and key not in CHANGEABLE
    ]
    if fixed:
        raise RecipeError(
            "a run's network and data cannot change after its start:\n  " + "\n  ".join(fixed),
            "omit that to continue this run, or start a new one with --out DIR",
        )


def change_recipe(
    run: Run, recipe: Recipe, changes: Mapping[str, Any], progress: Progress, *, stage: str | None = None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe with changes for what is still to be trained.

    Args:
        run, recipe: as they are.
        changes: dotted keys to new values.
        progress: where the run stands.
        stage: the stage that will be run, maybe again; None: those that are not finished.

    Returns:
        The changed recipe, and the keys whose change comes too late, each with the reason.

    Raises:
        RecipeError: a key that cannot change at all, or not in the middle of a stage.
        RunError: the run is finished, and a change would have no effect.
    """
    new = recipe.override(changes)
    check_fixed(run, recipe, new)
    under_way = bool(progress.epoch or progress.step)
    if under_way and (bound := [key for key in differences(recipe, new) if key in BETWEEN_STAGES]):
        raise RecipeError(
            f"{run.folder} stands in the middle of {progress.stage}; {', '.join(bound)} cannot change there",
            "`racnn train --resume` without that; it can change between two stages",
        )
    stages = list(STAGE_KEYS) if recipe.model.scales > 1 else list(STAGE_KEYS)[:1]
    done = [name for name in stages if name in progress.done and name != stage]
    baseline = recipe.baseline and not Run(run.folder / "baseline").weights.is_file()
    finished = {prefix: f"{name} is finished" for name in done for prefix in STAGE_KEYS[name]}
    if done == stages:
        finished = {"": "every stage is finished"}
    late = {
        key: reason
        for key in differences(recipe, new)
        for prefix, reason in finished.items()
        if key.startswith(prefix) and key not in (*EVALUATED, "onnx") and not (baseline and key.startswith(SHARED))
    }
    if late and done == stages and not baseline:
        sets = " ".join(f"--set {key}={_toml(changes[key])}" for key in late)
        raise RunError(
            f"{run.folder} is finished, so {', '.join(late)} would change nothing; nothing was written",
            f"a new run: `racnn train {run.recipe_file} --out DIR {sets}`",
        )
    return new, late


def _toml(value: object) -> str:
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def recount_steps(run: Run, recipe: Recipe, progress: Progress, *, images: int) -> None:
    """Count an epoch that is under way in steps of the batch that it continues with; the order of images is the same.

    Args:
        run, recipe: as they continue.
        progress: where the run stands; changed in place.
        images: in an epoch.

    Raises:
        RecipeError: the images seen so far are not a whole number of updates of that size.
    """
    if not progress.step:
        return
    world, accumulate = distributed.world(), recipe.train.accumulate
    seen = min(progress.images or progress.step * progress.batch, images)
    steps = step_after(seen, images, batch=recipe.train.batch, world=world)
    if steps is None or (seen < images and steps % accumulate):
        raise RecipeError(
            f"{run.folder} stands in the middle of an epoch, after {seen} of {images} images; updates of "
            f"{recipe.train.batch * world * accumulate} ({world} process(es), train.batch = {recipe.train.batch}, "
            f"train.accumulate = {accumulate}) do not end there",
            f"the same number of images per update as before, in batches that divide {progress.batch}",
        )
    progress.step, progress.images, progress.batch = steps, seen, recipe.train.batch * world
