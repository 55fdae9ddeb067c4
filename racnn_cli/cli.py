"""The command line: each command parses its arguments, calls `api` and prints the result.

Nothing heavy is imported here: `racnn --help` and shell completion must be fast.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

import racnn_cli
from racnn_cli import api
from racnn_cli import options as shared
from racnn_cli import recipe as recipes
from racnn_cli.errors import RacnnError, RecipeError, escape_control, is_out_of_memory
from racnn_cli.events import EvalResult
from racnn_cli.run import Run

app = typer.Typer(
    name="racnn",
    help="Fine-grained image recognition from image labels alone: a network that learns where to zoom.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes_app = typer.Typer(help="List and show the built-in recipes and their keys.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


# ---- training


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"racnn {racnn_cli.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    pass


def _open_run(options: shared.RunOptions) -> tuple[Run, dict[str, Any]]:
    """The run to continue, and the recipe values to change in it."""
    changes = options.changes()
    return api.open_run(options.run, scales=changes.pop("model.scales", None)), changes


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_result(run: Run, result: EvalResult) -> None:
    from racnn_cli.results.tables import remarks, tables

    if not _is_main_process():
        return
    console = Console(width=None if sys.stdout.isatty() else 100, emoji=False)
    for table in tables(result, console.width):
        console.print(table)
    for line in remarks(result):
        console.print(escape(escape_control(line)), soft_wrap=True)
    files = {"report": run.report, "metrics": run.eval, "ONNX": run.onnx}
    written = ", ".join(f"{name} {path}" for name, path in files.items() if path.is_file())
    console.print(escape(f"files: {written}"), soft_wrap=True)
    console.print(escape(f"next: racnn predict YOUR-IMAGES --run {run.folder} --save images"), soft_wrap=True)


@app.command()
@shared.expand_options
def train(
    recipe: shared.RecipeName = None,
    *,
    resume: Annotated[
        bool, Option("--resume", help="continue a stopped run; with RECIPE and --out: continue or start it")
    ] = False,
    options: shared.NewRunOptions,
) -> None:
    """Run every stage of a recipe, then evaluate. Needs RECIPE, or --data for the default recipe."""
    starts = recipe is not None or options.starts_run()
    if resume and recipe is None and options.out is None:
        run, changes = _open_run(options)
        result = api.resume(run, changes)
    elif options.run is not None or (resume and (options.out is None or not starts)):
        raise RecipeError(
            "--run, and --resume without --out, continue an existing run; RECIPE and --out are for a new run",
            "`racnn train --resume --run DIR` continues a run, "
            "`racnn train RECIPE --out DIR --resume` continues it or starts it",
        )
    elif not starts:
        raise RecipeError(
            "train needs a RECIPE or --data",
            f"a recipe ({', '.join(recipes.names())}), a .toml file, or --data FOLDER for the default recipe; "
            "--resume continues the newest run",
        )
    else:
        changes = options.changes()
        run, result = api.train(recipes.load(recipe, (), changes), out=options.out, changes=changes, or_resume=resume)
    _print_result(run, result)


def _run_stage(name: str, recipe: str | None, options: shared.RunOptions, *, following: str) -> None:
    if recipe is not None and options.run is not None:
        raise RecipeError("RECIPE starts a new run and --run continues one", "omit one, or use --out DIR")
    if recipe is not None or (isinstance(options, shared.NewRunOptions) and options.starts_run()):
        changes = options.changes()
        run = api.stage(name, recipe=recipes.load(recipe, (), changes), out=options.out, changes=changes)
    elif options.out is not None:
        raise RecipeError(
            "--out is the folder of a new run, and this command continues a run",
            "`racnn pretrain-cnn RECIPE --out DIR` starts a new run; --run DIR continues one",
        )
    else:
        run, changes = _open_run(options)
        api.stage(name, run=run, changes=changes)
    if _is_main_process():
        typer.echo(f"{name} finished in {run.folder}; next: racnn {following}")


@app.command("pretrain-cnn")
@shared.expand_options
def pretrain_cnn(recipe: shared.RecipeName = None, *, options: shared.NewRunOptions) -> None:
    """Stage 1: fine-tune scale 1 on the labels and copy its weights to every scale.

    RECIPE, --data, --backbone, --weights or --pretrained starts a new run, unless --run is given.
    Without any of them, the newest run continues.
    """
    _run_stage("pretrain-cnn", recipe, options, following="pretrain-apn")


@app.command("pretrain-apn")
@shared.expand_options
def pretrain_apn(recipe: shared.RecipeName = None, *, options: shared.RunOptions) -> None:
    """Stage 2: train the APNs to propose the square around the strongest response.

    Continues the newest run, or the one of --run.
    """
    _run_stage("pretrain-apn", recipe, options, following="alternate")


@app.command()
@shared.expand_options
def alternate(recipe: shared.RecipeName = None, *, options: shared.RunOptions) -> None:
    """Stage 3: train CNNs and APNs in turn until neither loss changes, then the fusion head.

    Continues the newest run, or the one of --run.
    """
    _run_stage("alternate", recipe, options, following="eval")


# ---- using a trained network


@app.command("eval")
def evaluate(
    run: shared.RunFolder = None,
    split: Annotated[str | None, Option(help="train, val or test; default: test")] = None,
    data: Annotated[str | None, Option(help="use all images of this folder or CSV file instead")] = None,
    skip_bad: shared.SkipBad = False,
) -> None:
    """Measure accuracy, calibration and boxes of a run; print tables and write eval.json."""
    opened = api.open_run(run)
    _print_result(opened, api.evaluate(opened, split=split, data=data, skip_bad=skip_bad, must_write=False))


@app.command()
def export(
    run: shared.RunFolder = None,
    format: Annotated[api.ExportFormat | None, Option(help="format to write")] = None,
    onnx: Annotated[bool, Option("--onnx", help="ONNX file, checked against PyTorch")] = False,
    torch: Annotated[bool, Option("--torch", help=".pt2 file for torch.export.load()")] = False,
    safetensors: Annotated[bool, Option("--safetensors", help="folder for racnn_cli.load()")] = False,
    precision: Annotated[api.Precision | None, Option(help="ONNX: precision; default: float32")] = None,
    half: Annotated[bool, Option("--half", help="ONNX: 16-bit floats")] = False,
    int8: Annotated[bool, Option("--int8", help="ONNX: 8-bit integers, calibrated on images")] = False,
    check: Annotated[
        Path | None, Option(help="only compare the ONNX file with its run on the images of a folder")
    ] = None,
    out: Annotated[Path | None, Option(help="file or folder to write or check")] = None,
    raw: Annotated[bool, Option("--raw", help="ONNX, torch: input as decoded, (B, H, W, 3) uint8")] = False,
    crops: Annotated[bool, Option("--crops", help="ONNX, torch: also output the crops")] = False,
    top: Annotated[int | None, Option(min=1, help="ONNX, torch: number of labels in the output; default: 5")] = None,
    opset: Annotated[int, Option(help="ONNX: operator set version, 18 or 20")] = 20,
    early_exit: Annotated[
        bool, Option("--early-exit", help="ONNX: skip the finer scales when scale 1 is sure")
    ] = False,
    max_drop: Annotated[
        float | None, Option(min=0, help="accuracy that --precision or --early-exit may cost, in points; default: 0.5")
    ] = None,
) -> None:
    """Write the trained network for use elsewhere, e.g. `racnn export --onnx` or `--format onnx --precision int8`."""
    chosen = shared.select("--format", format, {"onnx": onnx, "torch": torch, "safetensors": safetensors})
    chosen_precision: api.Precision = shared.select("--precision", precision, {"half": half, "int8": int8}) or "float32"
    if check is not None:
        changed = (precision, half, int8, top is not None, opset != 20, max_drop is not None)
        if any((chosen, raw, crops, early_exit, *changed)):
            raise RecipeError("--check writes nothing and takes only --run and --out", "omit the other options")
        report = api.check_export(api.open_run(run), check, path=out)
    elif chosen is None:
        raise RecipeError("export needs a format", "--onnx, --torch or --safetensors; or --check FOLDER")
    else:
        opened = api.open_run(run)
        if top is not None and top > (classes := len(opened.classes())):
            typer.echo(f"note: --top {top} has the effect of --top {classes}: there are no more classes", err=True)
        report = api.export(
            opened,
            chosen,
            out=out,
            precision=chosen_precision,
            raw=raw,
            crops=crops,
            top=top,
            opset=opset,
            early_exit=early_exit,
            max_drop=max_drop,
        )
    typer.echo(api.describe_export(report))


@app.command()
def predict(
    images: Annotated[
        list[str],
        Argument(
            metavar="[MODEL.onnx|RUN] IMAGES...",
            help="images, videos, folders, patterns, camera:0, or - for a list on standard input. A run folder or an "
            "ONNX file before them is the network to use; default: the newest run. An ONNX file needs no torch.",
        ),
    ],
    run: shared.RunFolder = None,
    rows: Annotated[api.RowFormat, Option("--format", help="format of the rows")] = "table",
    save: Annotated[Path | None, Option(help="folder for images with the boxes drawn")] = None,
    source: Annotated[
        int | None, Option(min=16, max=16384, help="side of the square source in pixels; default: as trained")
    ] = None,
    batch: Annotated[int, Option(min=1, help="images per step")] = 16,
    every: Annotated[int, Option(min=1, help="use every n-th frame of a video")] = 1,
) -> None:
    """Print class, probability and attended region of each image, one row per image."""
    first, network = Path(images[0]), run
    if first.suffix == ".onnx" or (first / "recipe.toml").is_file():
        if run is not None:
            raise RecipeError(f"{first} and --run {run} both name a network", "give one of them")
        network, images = first, images[1:]
        if not images:
            raise RecipeError(f"{first} is a network; no images were given", f"`racnn predict {first} my-images`")
    if network is None or network.suffix != ".onnx":
        network = api.open_run(network).folder
    raise typer.Exit(api.predict_files(images, network, rows=rows, save=save, source=source, batch=batch, every=every))


@app.command()
def report(run: shared.RunFolder = None) -> None:
    """Write report.html: curves, metrics and example images on one page."""
    typer.echo(f"wrote {api.report(api.open_run(run))}")


# ---- benchmarks, data sets, backbones, recipes


@app.command()
def bench(
    name: Annotated[str, Argument(help="seeds, attention, ablation, fusion, folds, gradient or export")],
    json: Annotated[Path | None, Option(help="also write the figures to this file")] = None,
    seeds: Annotated[str | None, Option(help="benchmarks that take seeds: such as 0-4 or 0,3,7; default: 0-4")] = None,
    recipe: Annotated[
        str | None,
        Option(help="benchmarks that train; default: demo or clutter", autocompletion=shared.complete_recipe),
    ] = None,
    quick: Annotated[bool, Option("--quick", help="benchmarks that train: few images and epochs")] = False,
    data: Annotated[
        str | None,
        Option(
            help="benchmarks that train, except seeds: use other data, for attention with ground-truth boxes; "
            "for clutter, the folder of the four Fashion-MNIST files"
        ),
    ] = None,
    arm: Annotated[
        list[str] | None, Option(help="ablation, folds: only this arm and its reference; repeatable")
    ] = None,
    choose: Annotated[
        str | None, Option(help="attention: seeds on which each arm's learning rate is chosen first, such as 0-1")
    ] = None,
) -> None:
    """Run a benchmark and print its figures."""
    api.bench(name, json_path=json, seeds=seeds, recipe=recipe, quick=quick, data=data, arms=arm or (), choose=choose)


@app.command()
def samples(
    name: Annotated[str, Argument(help="plankton or fieldguide")],
    out: Annotated[Path, Option(help="folder to write, new or empty")],
    images: Annotated[
        int | None, Option(min=24, max=100_000, help="fieldguide: number of images; default: 480")
    ] = None,
    size: Annotated[int | None, Option(min=64, max=4096, help="fieldguide: side in pixels; default: 256")] = None,
    seed: Annotated[int | None, Option(min=0, help="fieldguide: seed of the drawings; default: 0")] = None,
) -> None:
    """Write a built-in data set to a folder, to inspect it or to train on it as your own data."""
    given = {"images": images, "size": size, "seed": seed}
    options = {option: value for option, value in given.items() if value is not None}
    typer.echo(f"wrote {api.write_samples(name, out, **options)}")
    if options and name == "plankton":
        flags = ", ".join(f"--{option}" for option in options)
        typer.echo(f"note: {flags}: no effect, because the images of plankton are not drawn", err=True)


@app.command()
def backbones(pattern: Annotated[str, Argument(help="part of a name, or a pattern such as 'resnet*'")] = "") -> None:
    """List the models that --backbone takes, with their native input size."""
    for model in api.list_backbones(pattern):
        typer.echo(f"{model.name:48} {model.size:4} px{', fixed' if model.fixed else ''}")


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the recipes."""
    for name, about in api.list_recipes().items():
        typer.echo(f"{name:12} {about}")


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, Argument(autocompletion=shared.complete_recipe)],
    sets: shared.Sets = None,
    quick: shared.Quick = False,
) -> None:
    """Print a recipe with every value."""
    changes = recipes.parse_sets(sets or ()) | ({"quick": True} if quick else {})
    typer.echo(api.show_recipe(name, changes), nl=False)


@recipes_app.command("keys")
def recipes_keys(pattern: Annotated[str, Argument(help="part of a key, or a pattern such as 'model.*'")] = "") -> None:
    """List the recipe keys with default, allowed values and description."""
    for info in api.list_keys(pattern):
        typer.echo(f"{info.key} = {info.default or '(required)'}  [{info.allowed}]\n    {info.description}")


# ---- entry point


def main() -> None:
    """Run the command line. Errors that a user can fix are printed as `error:` and `try:`, without a traceback."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    try:
        try:
            app(prog_name="racnn")
        finally:
            sys.stdout.flush()
    except RacnnError as error:
        _fail(error.message, error.hint, error.exit_code)
    except SystemExit as end:
        if end.code == 130:  # Typer exits silently on Ctrl-C
            _fail("stopped by SIGINT", "", 130)
        raise
    except BrokenPipeError:  # the reader has closed the pipe
        _discard_output()
        sys.exit(1)
    except OSError as error:
        name = escape_control(str(error.filename)) if error.filename else "the output"
        if len(name) > 200:
            name = f"{name[:200]}…"
        _discard_output()
        _fail(f"{name}: {error.strerror or error}", "check the path, its permissions and the free disk space", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        detail = (str(error).strip() or "no more memory").splitlines()[0]
        hint = "reduce model.sizes, data.source, model.apn_hidden, train.batch or data.workers"
        _fail(f"out of memory: {detail}", hint, 1)


def _discard_output() -> None:
    """Redirect standard output, so that Python does not fail again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, hint: str, code: int) -> NoReturn:
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(escape_control(message))}")
    if hint:
        console.print(f"[bold]try:[/] {escape(escape_control(hint))}")
    sys.exit(code)
