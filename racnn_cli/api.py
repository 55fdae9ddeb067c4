"""What the commands do, as Python functions: the command line only parses arguments and prints results.

Heavy packages are imported inside the functions: `racnn --help` loads none of them, and an ONNX file needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from racnn_cli import recipe as recipes
from racnn_cli.errors import RecipeError, RunError
from racnn_cli.events import EvalResult
from racnn_cli.recipe import KeyInfo, Recipe
from racnn_cli.run import Run, refuse_link

if TYPE_CHECKING:
    from racnn_cli.backbones import ModelInfo
    from racnn_cli.export.prediction import ImageInput, Prediction
    from racnn_cli.training.trainer import Trainer

ExportFormat = Literal["onnx", "torch", "safetensors"]
Precision = Literal["float32", "half", "int8"]
RowFormat = Literal["table", "jsonl", "csv"]


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
    from racnn_cli.core import distributed
    from racnn_cli.core.device import select_device
    from racnn_cli.training.trainer import Trainer

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
    trainer = Trainer.start(resolved, out=folder, quiet=quiet, given=changes)
    return trainer.run, _finish(trainer, {}, quiet=quiet)


def _holds_run_of(folder: Path, recipe: Recipe, *, quiet: bool) -> bool:
    """Whether the folder holds a run of this network on these data; notes what else differs, and stays as it is there.

    Raises:
        RecipeError: it holds a run of another network or other data.
    """
    from racnn_cli.core.model import resolve
    from racnn_cli.training.console import Console
    from racnn_cli.training.resume import check_fixed, differences

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
    from racnn_cli.core.model import resolve
    from racnn_cli.training.resume import differences

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
        RunError: the run is finished, and a change would have no effect.
        RacnnError: as in `train`.
    """
    from racnn_cli.training.trainer import Trainer

    changes = dict(changes or {})
    return _finish(Trainer.resume(run, changes=changes, quiet=quiet), changes, quiet=quiet)


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
    from racnn_cli.training import stages
    from racnn_cli.training.trainer import Trainer

    if recipe is not None:
        if name != stages.NAMES[0]:
            raise RunError(
                f"{name} cannot start a run: it needs a network that {stages.NAMES[0]} has trained",
                f"`racnn {stages.NAMES[0]}` with that recipe first, then `racnn {name}` without a recipe continues it",
            )
        changes = dict(changes or {})
        trainer = Trainer.start(recipe.override(changes).as_used(), out=out, quiet=quiet, given=changes)
    else:
        assert run is not None
        trainer = Trainer.resume(run, changes=dict(changes or {}), stage=name, quiet=quiet)
    with closing(trainer):
        stages.run_stage(trainer, name)
    return trainer.run


def _finish(trainer: Trainer, changes: Mapping[str, Any], *, quiet: bool) -> EvalResult:
    """Run the remaining stages, then baseline, evaluation, ONNX and report. One process writes the last two."""
    from racnn_cli.core import distributed
    from racnn_cli.training import stages

    with closing(trainer):
        stages.run_all(trainer)
        if trainer.recipe.baseline:
            _train_baseline(trainer.run, trainer.recipe, changes, quiet=quiet)
        result = evaluate(trainer.run)
        if distributed.rank() == 0:
            if trainer.recipe.onnx:
                export(trainer.run)
            report(trainer.run)
    return result


def _train_baseline(run: Run, recipe: Recipe, changes: Mapping[str, Any], *, quiet: bool) -> None:
    from racnn_cli.core import distributed
    from racnn_cli.training import stages
    from racnn_cli.training.baseline import baseline_recipe, write_budget
    from racnn_cli.training.compute import epochs_run
    from racnn_cli.training.resume import SHARED
    from racnn_cli.training.trainer import Trainer

    base = Run(run.folder / "baseline")
    refuse_link(base.folder)
    if base.recipe_file.is_file():
        # It has a recipe of its own, which changes of the run's recipe do not reach by themselves.
        shared = {key: value for key, value in changes.items() if key.startswith(SHARED)}
        trainer = Trainer.resume(base, changes=shared, parent_run=run.folder, quiet=quiet)
    else:
        epochs = epochs_run(run)
        if {stage for stage, _ in epochs} != set(stages.plan(recipe)):
            raise RunError(
                f"{run.log} does not say how many epochs {run.folder} took, which is what the baseline may cost",
                "take it from a backup, or start a new run with --out DIR",
                failure=True,
            )
        plain = baseline_recipe(recipe, classes=len(run.classes()), epochs=epochs)
        trainer = Trainer.start(plain, out=base.folder, parent_run=run.folder, quiet=quiet)
    with closing(trainer):
        stages.run_all(trainer)
        if distributed.rank() == 0:
            write_budget(run, base, images=len(trainer.train))
    distributed.barrier()
    evaluate(base)


def open_run(folder: str | Path | None = None, *, scales: int | None = None) -> Run:
    """Open a run.

    Args:
        folder: the run folder; None: the newest run.
        scales: number of scales that the run must have; None: any.

    Raises:
        RunError: no such run.
        RecipeError: the run has another number of scales.
    """
    run = Run.open(None if folder is None else Path(folder))
    if scales is not None and scales != (actual := run.recipe().model.scales):
        raise RecipeError(
            f"{run.folder} has {actual} scale(s) and {actual - 1} APN(s); --scales {scales} does not fit",
            f"omit --scales, or start a new run with `racnn pretrain-cnn RECIPE --scales {scales}`",
        )
    return run


def evaluate(
    run: Run, *, split: str | None = None, data: str | None = None, skip_bad: bool = False, must_write: bool = True
) -> EvalResult:
    """Measure a run and write eval.json; see `racnn_cli.evaluation.evaluate`."""
    from racnn_cli import evaluation

    return evaluation.evaluate(run, split=split, data=data, skip_bad=skip_bad, must_write=must_write)


def export(
    run: Run,
    format: ExportFormat = "onnx",
    *,
    out: Path | None = None,
    precision: Precision = "float32",
    raw: bool = False,
    crops: bool = False,
    top: int | None = None,
    opset: int = 20,
    early_exit: bool = False,
    max_drop: float | None = None,
) -> dict[str, Any]:
    """Write the trained network for use elsewhere.

    Args:
        run: a run with weights.
        format: `onnx`, `torch` (a program for `torch.export.load`), or `safetensors` (a folder for `load`).
        out: the file, or the folder for `safetensors`; None: model.onnx, model.pt2 or export/ in the run folder.
        precision: of the backbones; only ONNX.
        raw: take images as decoded, (B, H, W, 3) uint8; not for `safetensors`.
        crops: also return what the finer scales see; not for `safetensors`.
        top: number of labels in the output, at most one per class; None: 5. Not for `safetensors`.
        opset: version of the ONNX operators, 18 or 20.
        early_exit: run the finer scales only for images that scale 1 is not sure of; only ONNX.
        max_drop: largest loss of accuracy through `precision` or `early_exit`, in percentage points; None: 0.5.

    Returns:
        `path`, and what the check of the exported file measured.

    Raises:
        RecipeError: an option that the format does not have.
        ExportError: the network cannot be exported, or the exported file gives other outputs.
        RunError: no weights.
    """
    if format == "safetensors" and (raw or crops or top is not None):
        raise RecipeError("--raw, --crops and --top need --format onnx or torch", "omit them")
    if format != "onnx" and (precision != "float32" or early_exit or opset != 20):
        raise RecipeError(
            "--precision, --half, --int8, --early-exit and --opset need --format onnx",
            "add --format onnx, or omit them",
        )
    if max_drop is not None and precision == "float32" and not early_exit:
        raise RecipeError("--max-drop needs --precision half or int8, or --early-exit", "omit it")
    if opset not in (18, 20):
        raise RecipeError(f"--opset {opset} is not supported", "--opset 18 or 20")
    from racnn_cli.export.graph import ExportOptions
    from racnn_cli.export.onnx import export_onnx
    from racnn_cli.export.torch_formats import export_program, export_safetensors

    if format == "safetensors":
        return {"path": str(export_safetensors(run, out or run.folder / "export"))}
    options = ExportOptions(raw, top or 5, crops)
    if format == "torch":
        return export_program(run, out, options=options)
    return export_onnx(
        run,
        out,
        options=options,
        opset=opset,
        precision=precision,
        early_exit=early_exit,
        max_drop=0.5 if max_drop is None else max_drop,
    )


def check_export(run: Run, images: Path, *, path: Path | None = None) -> dict[str, Any]:
    """Compare an exported ONNX file with its run on the images of a folder.

    Args:
        run: the run that was exported.
        images: the folder.
        path: the file; None: model.onnx in the run folder.

    Raises:
        ExportError: the file is missing, belongs to another run, or gives other outputs.
    """
    from racnn_cli.export.check import check

    return check(run, path, images)


def describe_export(report: Mapping[str, Any]) -> str:
    """The result of `export` or `check_export` as text."""
    if "agreement" in report:
        from racnn_cli.export.onnx import describe

        return describe(report)
    text = f"wrote {report['path']}"
    if "max_difference" in report:
        worst = max(report["max_difference"].values())
        text += f": {report['bytes'] / 2**20:.1f} MiB, largest difference {worst:.1e}"
    return text


def predict(run: str | Path | Run, images: ImageInput | Iterable[ImageInput]) -> list[Prediction]:
    """Predict images, given as paths, PIL images or arrays, with a run, an exported folder or an ONNX file."""
    from racnn_cli.export.loading import load

    return load(run).predict(images)


def predict_files(
    names: Sequence[str | Path],
    run: str | Path | Run,
    *,
    rows: RowFormat = "table",
    save: Path | None = None,
    source: int | None = None,
    batch: int = 16,
    every: int = 1,
) -> int:
    """Predict files, folders, patterns, videos and cameras, and print one row per image as it is predicted.

    Args:
        names: as in `racnn predict`.
        run: a run, an exported folder or an ONNX file.
        rows: format of the rows.
        save: folder for images with the boxes drawn.
        source: side in pixels of the square source of all crops; None: as trained.
        batch: images per step.
        every: use every n-th frame of a video.

    Returns:
        1 if an image could not be read, else 0.

    Raises:
        DataError: a name that does not exist.
        RunError: no weights.
    """
    from racnn_cli.export.loading import load
    from racnn_cli.results.predict import gather, predict_command

    sources = gather(names)
    return predict_command(load(run, source=source), sources, rows=rows, save=save, batch=batch, every=every)


def report(run: Run) -> Path:
    """Write report.html of a run and return its path."""
    from racnn_cli.results.report import write_report

    return write_report(run)


def bench(name: str, **options: Any) -> None:
    """Run a benchmark and print its figures; `options` are those of `racnn_cli.bench.run_bench`."""
    from racnn_cli.bench import run_bench

    run_bench(name, **options)


def write_samples(name: str, out: Path, *, images: int = 480, size: int = 256, seed: int = 0) -> Path:
    """Write a built-in data set to a new folder and return what `--data` takes.

    Args:
        name: of the data set.
        out: the folder, new or empty.
        images: number of images, for drawn sets.
        size: side of an image in pixels, for drawn sets.
        seed: of the drawings.

    Raises:
        DataError: no such data set, `out` is not empty, or the images cannot be downloaded or written.
    """
    from racnn_cli.data import datasets

    return datasets.write(name, out, recipes.Sample(images=images, size=size), seed)


def list_recipes() -> dict[str, str]:
    """Name and purpose of each built-in recipe."""
    return {name: recipes.load(name).about for name in recipes.names()}


def show_recipe(name: str, changes: Mapping[str, Any] | None = None) -> str:
    """A recipe as TOML with every value.

    Raises:
        RecipeError: no such recipe, or an invalid value.
    """
    return recipes.dump(recipes.load(name, (), changes).as_used())


def list_keys(pattern: str = "") -> list[KeyInfo]:
    """Recipe keys whose name contains or matches `pattern`."""
    return recipes.describe_keys(pattern)


def list_backbones(pattern: str = "") -> list[ModelInfo]:
    """Usable backbones whose name contains or matches `pattern`: VGG first, then timm's models."""
    from racnn_cli.backbones import list_models

    return list_models(pattern)
