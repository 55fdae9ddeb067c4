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
from racnn_cli.errors import RunError
from racnn_cli.evaluation import evaluate
from racnn_cli.events import EvalResult
from racnn_cli.export.onnx import export_onnx
from racnn_cli.export.prediction import Prediction, load
from racnn_cli.recipe import Recipe
from racnn_cli.results.report import write_report
from racnn_cli.run import Run, refuse_link
from racnn_cli.training import stages
from racnn_cli.training.baseline import baseline_recipe, rounds_run
from racnn_cli.training.console import Console
from racnn_cli.training.resume import check_fixed, differences
from racnn_cli.training.trainer import Trainer

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
        or_resume: continue the run in `out` if there is one; after a restart by torchrun this is so in any case.
        quiet: print nothing.

    Returns:
        the run, and what its eval.json holds.

    Raises:
        RacnnError: anything that can be wrong with the recipe, the data or the machine.
    """
    changes = dict(changes or {}) | ({"data.path": str(data)} if data is not None else {})
    if isinstance(recipe, Recipe):
        resolved = recipe.override(changes).as_used()
    else:
        resolved = recipes.load(str(recipe), (), changes).as_used()
    folder = Path(out) if out is not None else None
    if folder is not None and (or_resume or distributed.restarted()):
        distributed.start(select_device(resolved.train.device))
        # One process looks for all of them: a slow one would find what a fast one has just begun.
        if distributed.broadcast(distributed.rank() == 0 and _holds_run_of(folder, resolved, quiet=quiet)):
            run = Run.open(folder)
            return run, resume(run, quiet=quiet)
    with closing(Trainer.start(resolved, out=folder, quiet=quiet)) as trainer:
        stages.run_all(trainer)
        return trainer.run, finish(trainer.run, trainer.recipe, quiet=quiet)


def _holds_run_of(folder: Path, recipe: Recipe, *, quiet: bool) -> bool:
    """Whether the folder holds a run of this network on these data; notes what else differs, and stays as it is there.

    Raises:
        RecipeError: it holds a run of another network or other data.
    """
    run = Run(folder)
    if not run.recipe_file.is_file():
        return False
    own, asked = run.recipe(), resolve(recipe)
    check_fixed(run, own, asked)
    for key, (old, new) in differences(own, asked).items():
        Console(quiet=quiet).say(
            f"note: the run's own {key} = {old!r} is kept, not {new!r}; "
            f"`racnn train --resume --run {folder} --set {key}=...` changes it"
        )
    return True


def same_recipe(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a run of this recipe; False if it holds no run.

    Raises:
        RunError: it holds a run of another recipe.
    """
    run = Run(folder)
    if not run.recipe_file.is_file():
        return False
    differ = [
        f"{key} is {old!r} there and {new!r} here"
        for key, (old, new) in differences(run.recipe(), resolve(recipe)).items()
    ]
    if differ:
        raise RunError(
            f"{folder} holds a run of another recipe:\n  " + "\n  ".join(differ),
            "move it to another place; nothing in it was changed",
        )
    return True


def resume(run: Run, changes: Mapping[str, Any] | None = None, *, quiet: bool = False) -> EvalResult:
    """Continue a run from its last checkpoint to the end, as `train` would have.

    Args:
        run: its folder.
        changes: dotted recipe keys to values, for what is still to be trained. Those that the run shares with its
            baseline apply to a baseline that has begun, too.
        quiet: print nothing.

    Raises:
        RacnnError: as in `train`.
    """
    changes = dict(changes or {})
    with closing(Trainer.resume(run, changes=changes, quiet=quiet)) as trainer:
        stages.run_all(trainer)
        return finish(run, trainer.recipe, changes=changes, quiet=quiet)


def stage(
    name: str,
    *,
    recipe: Recipe | None = None,
    run: Run | None = None,
    out: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Run:
    """Run one stage: of a new run when a recipe is given, else of `run`.

    Raises:
        RunError: the stage before it has not been run.
        RacnnError: as in `train`.
    """
    if recipe is not None:
        if name != stages.NAMES[0]:
            raise RunError(
                f"{name} cannot start a run: it needs a network that {stages.NAMES[0]} has trained",
                f"`racnn {stages.NAMES[0]}` with that recipe first, then `racnn {name}` without a recipe continues it",
            )
        trainer = Trainer.start(recipe.as_used(), out=out, quiet=quiet)
    else:
        assert run is not None
        trainer = Trainer.resume(run, changes=dict(changes or {}), quiet=quiet)
    with closing(trainer):
        stages.run_stage(trainer, name)
    return trainer.run


def finish(
    run: Run, recipe: Recipe, *, changes: Mapping[str, Any] | None = None, quiet: bool = False
) -> EvalResult:
    """What follows the last stage: baseline, evaluation, ONNX, report. One process writes the last two."""
    if recipe.baseline:
        _train_baseline(run, recipe, changes or {}, quiet=quiet)
    result = evaluate(run)
    if distributed.rank() == 0:
        if recipe.onnx:
            export_onnx(run)
        write_report(run)
    return result


def _train_baseline(run: Run, recipe: Recipe, changes: Mapping[str, Any], *, quiet: bool) -> None:
    base = Run(run.folder / "baseline")
    refuse_link(base.folder)
    if base.recipe_file.is_file():
        # It has a recipe of its own, which changes of the run's recipe do not reach by themselves.
        shared = {key: value for key, value in changes.items() if key.startswith(SHARED)}
        trainer = Trainer.resume(base, changes=shared, parent_run=run.folder, quiet=quiet)
    else:
        rounds = rounds_run(run)
        if recipe.model.scales > 1 and not rounds:
            raise RunError(
                f"{run.log} does not say how many rounds {run.folder} took, which is what the baseline may cost",
                "take it from a backup, or start a new run with --out DIR",
                failure=True,
            )
        plain = baseline_recipe(recipe, rounds=rounds)
        trainer = Trainer.start(plain, out=base.folder, parent_run=run.folder, quiet=quiet)
    with closing(trainer):
        stages.run_all(trainer)
    evaluate(base)


def predict(run: str | Path, images: Iterable[Any]) -> list[Prediction]:
    """Predictions of a trained run (or an exported folder) for images: paths, PIL images or arrays."""
    return load(run).predict(images)
