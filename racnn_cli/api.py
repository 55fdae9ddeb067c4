"""What the commands do, as Python functions: the command line only reads words and prints tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from racnn_cli import recipe as recipes
from racnn_cli.core import distributed
from racnn_cli.core.device import select_device
from racnn_cli.core.model import resolve
from racnn_cli.errors import RacnnError
from racnn_cli.evaluation import evaluate
from racnn_cli.events import EvalResult
from racnn_cli.export.loading import load
from racnn_cli.export.onnx import export_onnx
from racnn_cli.export.prediction import Prediction
from racnn_cli.recipe import Recipe
from racnn_cli.results.report import write_report
from racnn_cli.run import Run, refuse_link
from racnn_cli.training.console import Console
from racnn_cli.training.trainer import Trainer, baseline_recipe, check_fixed, differences, rounds_run

# What the hints of a failed training name, and a baseline shares with its run; its size and epochs are its own.
SHARED = ("train.", "pretrain_cnn.lr")


def train(
    recipe: str | Path | Recipe,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    or_resume: bool = False,
    quiet: bool = False,
) -> tuple[Run, EvalResult]:
    """Train from a recipe to the end: every stage, the baseline if the recipe asks for it, evaluation, report.

    Args:
        recipe: the name of a recipe, a TOML file, or a `Recipe`.
        data: a folder, a CSV file or a built-in set, instead of the recipe's.
        out: the run's folder; by default the next free one in `runs/`.
        changes: dotted recipe keys to values, such as `{"train.batch": 8}`.
        or_resume: continue with the run in `out` if there is one already, as after a restart by torchrun in any case.
        quiet: print nothing.

    Returns:
        the run, and what its eval.json holds.

    Raises:
        RacnnError: anything that can be wrong with the recipe, the data or the machine.
    """
    changes = dict(changes or {}) | ({"data.path": str(data)} if data is not None else {})
    loaded = (
        recipe.override(changes) if isinstance(recipe, Recipe) else recipes.load(str(recipe), (), changes)
    )
    loaded, folder = loaded.as_used(), Path(out) if out is not None else None
    if folder is not None and (or_resume or distributed.restarted()):
        distributed.start(select_device(loaded.train.device))
        # One process looks for all: a slow one would find what a fast one has just begun.
        if distributed.broadcast(distributed.rank() == 0 and _begun(folder, loaded, quiet=quiet)):
            run = Run.open(folder)
            return run, resume(run, quiet=quiet)
    trainer = Trainer.start(loaded, folder, quiet=quiet)
    with closing(trainer):
        trainer.run_all()
        return trainer.context.run, finish(trainer, quiet=quiet)


def _begun(folder: Path, recipe: Recipe, *, quiet: bool) -> bool:
    """Whether the folder holds a run of this network on these data; what may change during a run is as it is there.

    Raises:
        RacnnError: it holds a run of another network or other data.
    """
    run = Run(folder)
    if not run.recipe_file.is_file():
        return False
    there = run.recipe()
    check_fixed(run, there, resolve(recipe))
    kept = differences(there, resolve(recipe))
    for key, (old, new) in kept.items():
        Console(quiet=quiet).say(
            f"note: the run's own {key} = {old!r} is kept, not {new!r}; "
            f"`racnn train --resume --run {folder} --set {key}=...` changes it"
        )
    return True


def same_recipe(folder: Path, recipe: Recipe) -> bool:
    """Does the folder hold a run of this recipe? False: it holds no run.

    Raises:
        RacnnError: it holds a run of another recipe.
    """
    run = Run(folder)
    if not run.recipe_file.is_file():
        return False
    found = differences(run.recipe(), resolve(recipe))
    if differ := [f"{key} is {old!r} there and {new!r} here" for key, (old, new) in found.items()]:
        raise RacnnError(
            f"{folder} holds a run of another recipe:\n  " + "\n  ".join(differ),
            "move it out of the way; nothing in it was changed",
        )
    return True


def resume(run: Run, changes: Mapping[str, Any] | None = None, *, quiet: bool = False) -> EvalResult:
    """Go on with a run from its last checkpoint to the end, as `train` would have.

    Changes of what it shares with its baseline are for a baseline that has begun, too.
    """
    changes = dict(changes or {})
    with closing(Trainer.proceed(run, sets=changes, quiet=quiet)) as trainer:
        trainer.run_all()
        return finish(trainer, changes, quiet=quiet)


def stage(
    name: str,
    *,
    recipe: Recipe | None = None,
    run: Run | None = None,
    out: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Run:
    """One stage: of a new run when a recipe is given, else of the run that is given.

    Raises:
        RacnnError: the stage before it has not been run, among all that `train` can raise.
    """
    if recipe is not None:
        if name != "pretrain-cnn":
            raise RacnnError(
                f"{name} cannot start a run: it needs a network that pretrain-cnn has trained",
                f"`racnn pretrain-cnn` with that recipe first, then `racnn {name}` without a recipe continues it",
            )
        trainer = Trainer.start(recipe.as_used(), out, quiet=quiet)
    else:
        assert run is not None
        trainer = Trainer.proceed(run, sets=dict(changes or {}), quiet=quiet)
    with closing(trainer):
        trainer.run_stage(name)
    return trainer.context.run


def finish(trainer: Trainer, changes: Mapping[str, Any] | None = None, *, quiet: bool = False) -> EvalResult:
    """What follows the last stage: baseline, evaluation, ONNX, report. Process 0 alone writes the last two."""
    run, recipe = trainer.context.run, trainer.context.recipe
    if recipe.baseline:
        _baseline(run, recipe, changes or {}, quiet=quiet)
    result = evaluate(run)
    if distributed.rank() == 0:
        if recipe.onnx:
            export_onnx(run)
        write_report(run)
    return result


def _baseline(run: Run, recipe: Recipe, changes: Mapping[str, Any], *, quiet: bool) -> None:
    base = Run(run.folder / "baseline")
    refuse_link(base.folder)
    if base.recipe_file.is_file():
        # It has a recipe of its own, which changes of the run's recipe do not reach by themselves.
        shared = {key: value for key, value in changes.items() if key.startswith(SHARED)}
        trainer = Trainer.proceed(base, sets=shared, owner=run.folder, quiet=quiet)
    else:
        rounds = rounds_run(run)
        if recipe.model.scales > 1 and not rounds:
            raise RacnnError(
                f"{run.log} does not say how many rounds {run.folder} took, which is what the baseline may cost",
                "take it from a backup, or start a new run with --out DIR",
                failure=True,
            )
        trainer = Trainer.start(baseline_recipe(recipe, rounds), base.folder, owner=run.folder, quiet=quiet)
    with closing(trainer):
        trainer.run_all()
    evaluate(base)


def predict(run: str | Path, images: Iterable[Any]) -> list[Prediction]:
    """Predictions of a trained run (or an exported folder) for images: paths, PIL images or arrays."""
    return load(run).predict(images)
