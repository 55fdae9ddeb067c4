"""The command line: one function a command, each a few words around `api`.

Nothing heavy is imported here at module level: `racnn --help` and shell completion must answer at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

import racnn_cli
from racnn_cli import recipe as recipes
from racnn_cli.errors import RacnnError, escape_control, is_out_of_memory
from racnn_cli.events import EvalResult
from racnn_cli.recipe import Recipe
from racnn_cli.run import Run

app = typer.Typer(
    name="racnn",
    help="Fine-grained image recognition from image labels alone: a network that learns where to zoom.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes_app = typer.Typer(help="The recipes that come with racnn.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


def _complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipes.names() if name.startswith(incomplete)]


def _complete_key(incomplete: str) -> list[str]:
    return [f"{key}=" for key in recipes.key_names() if key.startswith(incomplete)]


RecipeName = Annotated[
    str | None,
    typer.Argument(
        help="name of a recipe, or a TOML file", autocompletion=_complete_recipe, show_default=False
    ),
]
RunFolder = Annotated[
    Path | None, typer.Option("--run", help="run folder; by default runs/latest", show_default=False)
]
DataPath = Annotated[
    str | None, typer.Option("--data", help="folder with a folder a class, CSV, plankton or fieldguide")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="folder of a new run; by default runs/NAME", show_default=False)
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="any recipe value, as key=value; may be repeated", autocompletion=_complete_key
    ),
]
Scales = Annotated[
    int | None, typer.Option("--scales", min=1, max=5, help="number of scales; 1: plain backbone")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="seed of everything random, the split too")]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="none, pretrained, a .safetensors or .pth file, or package:NAME"),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="ImageNet weights from timm's hub (network)")]
Quick = Annotated[
    bool, typer.Option("--quick", help="the whole way on a small share of the data, to try it out")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="go on without unreadable files, and count them")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"racnn {racnn_cli.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def _changes(
    data: str | None,
    scales: int | None,
    seed: int | None,
    weights: str | None,
    pretrained: bool,
    quick: bool,
    skip_bad: bool,
) -> dict[str, Any]:
    """The recipe keys that the short options stand for."""
    if weights is not None and pretrained and weights != "pretrained":
        raise RacnnError("--weights and --pretrained contradict each other", "give one of the two")
    values = {
        "data.path": data,
        "model.scales": scales,
        "seed": seed,
        "model.weights": "pretrained" if pretrained else weights,
        "quick": quick or None,
        "data.skip_bad": skip_bad or None,
    }
    return {key: value for key, value in values.items() if value is not None}


def _open(folder: Path | None, changes: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """The run to continue with, and what of the changes is new to it."""
    run = Run.open(folder)
    wanted = changes.pop("model.scales", None)
    has = run.recipe().model.scales
    if wanted is not None and wanted != has:
        raise RacnnError(
            f"{run.folder} has {has} scale(s) and {has - 1} APN(s); --scales {wanted} does not fit",
            f"leave --scales out, or start a run with `racnn pretrain-cnn RECIPE --scales {wanted}`",
        )
    return run, changes


def _load(recipe: str | None, sets: list[str] | None, changes: dict[str, Any]) -> Recipe:
    if recipe is None:
        raise RacnnError(
            "which recipe? none was named",
            f"one of {', '.join(recipes.names())}, or your own .toml file; or --resume",
        )
    return recipes.load(recipe, sets or (), changes)


def _print_result(run: Run, result: EvalResult) -> None:
    from racnn_cli.results.tables import tables

    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in tables(result):
        console.print(table)
    kinds = {"page": run.report, "figures": run.eval, "ONNX": run.onnx}
    made = ", ".join(f"{kind} {path}" for kind, path in kinds.items() if path.is_file())
    console.print(escape(f"look next: {made}"), soft_wrap=True)
    console.print(escape(f"  racnn predict YOUR-IMAGES --run {run.folder} --save images"), soft_wrap=True)


@app.command()
def train(
    recipe: RecipeName = None,
    data: DataPath = None,
    out: Out = None,
    sets: Sets = None,
    scales: Scales = None,
    seed: Seed = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    quick: Quick = False,
    skip_bad: SkipBad = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="continue with a run that was stopped; with RECIPE and --out, or start it"
        ),
    ] = False,
    run: RunFolder = None,
) -> None:
    """Run every stage of a recipe, then evaluate."""
    changes = _changes(data, scales, seed, weights, pretrained, quick, skip_bad)
    if resume and recipe is None and out is None:
        opened, changes = _open(run, {**recipes.parse_sets(sets or ()), **changes})
        from racnn_cli import api

        result = api.resume(opened, changes)
    else:
        if run is not None or (resume and (recipe is None or out is None)):
            raise RacnnError(
                "--run, and --resume alone, are for a run that exists, a recipe and --out for a new one",
                "`racnn train --resume --run DIR` continues a run, "
                "`racnn train RECIPE --out DIR --resume` continues it or starts it",
            )
        loaded = _load(recipe, sets, changes)
        from racnn_cli import api

        opened, result = api.train(loaded, out=out, or_resume=resume)
    if result:
        _print_result(opened, result)


def _stage(
    name: str,
    recipe: str | None,
    sets: list[str] | None,
    changes: dict[str, Any],
    out: Path | None,
    run: Path | None,
    following: str,
) -> None:
    if recipe is not None:
        if run is not None:
            raise RacnnError(
                "a recipe starts a new run, --run names one that exists: give one of the two", "--out DIR"
            )
        loaded = recipes.load(recipe, sets or (), changes)
        from racnn_cli import api

        done = api.stage(name, recipe=loaded, out=out)
    else:
        if out is not None:
            raise RacnnError(
                "--out names the folder of a new run, and that needs a recipe",
                f"`racnn {name} RECIPE --out DIR`",
            )
        opened, changes = _open(run, {**recipes.parse_sets(sets or ()), **changes})
        from racnn_cli import api

        done = api.stage(name, run=opened, changes=changes)
    typer.echo(f"{name} is done in {done.folder}; next: {following}")


@app.command("pretrain-cnn")
def pretrain_cnn(
    recipe: RecipeName = None,
    data: DataPath = None,
    out: Out = None,
    sets: Sets = None,
    scales: Scales = None,
    seed: Seed = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    quick: Quick = False,
    skip_bad: SkipBad = False,
    run: RunFolder = None,
) -> None:
    """Stage 1: fine-tune scale 1 on the labels and give every scale its weights. A recipe starts a new run."""
    changes = _changes(data, scales, seed, weights, pretrained, quick, skip_bad)
    _stage("pretrain-cnn", recipe, sets, changes, out, run, "racnn pretrain-apn")


@app.command("pretrain-apn")
def pretrain_apn(
    recipe: RecipeName = None,
    data: DataPath = None,
    out: Out = None,
    sets: Sets = None,
    scales: Scales = None,
    seed: Seed = None,
    skip_bad: SkipBad = False,
    run: RunFolder = None,
) -> None:
    """Stage 2: teach the APNs the square around the strongest response. Goes on with the newest run."""
    _stage(
        "pretrain-apn",
        recipe,
        sets,
        _changes(data, scales, seed, None, False, False, skip_bad),
        out,
        run,
        "racnn alternate",
    )


@app.command()
def alternate(
    recipe: RecipeName = None,
    data: DataPath = None,
    out: Out = None,
    sets: Sets = None,
    scales: Scales = None,
    seed: Seed = None,
    skip_bad: SkipBad = False,
    run: RunFolder = None,
) -> None:
    """Stage 3: train CNNs and APNs in turn until neither loss changes, then the fusion head."""
    _stage(
        "alternate",
        recipe,
        sets,
        _changes(data, scales, seed, None, False, False, skip_bad),
        out,
        run,
        "racnn eval",
    )


@app.command("eval")
def evaluate(
    run: RunFolder = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test; by default test", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="measure on all images of this folder or CSV file instead")
    ] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Accuracy, calibration and boxes of a run, as a table and as eval.json."""
    opened = Run.open(run)
    from racnn_cli.evaluation import evaluate as measure

    _print_result(opened, measure(opened, split=split, data=data, skip_bad=skip_bad))


@app.command()
def export(
    run: RunFolder = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="one ONNX file, checked against PyTorch before it gets its name")
    ] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="a folder that racnn_cli.load() reads")
    ] = False,
    program: Annotated[
        bool, typer.Option("--torch", help="a .pt2 file that torch.export.load() reads, without racnn")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", help="write nothing: hold the ONNX file against its run on this folder's images"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="file or folder to write, or to check", show_default=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="ONNX: takes images as decoded, (B, H, W, 3) uint8")
    ] = False,
    crops: Annotated[
        bool, typer.Option("--crops", help="ONNX: gives what the finer scales saw, too")
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="ONNX: how many labels it names")] = 5,
    opset: Annotated[int, typer.Option("--opset", help="ONNX: version of the operators, 18 or 20")] = 20,
    half: Annotated[bool, typer.Option("--half", help="ONNX: the backbones in 16-bit floats")] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="ONNX: the backbones in 8-bit integers, calibrated on training images"),
    ] = False,
    exits: Annotated[
        bool,
        typer.Option("--early-exit", help="ONNX: finer scales only for images that scale 1 is unsure of"),
    ] = False,
    max_drop: Annotated[
        float,
        typer.Option(
            "--max-drop", min=0, help="points of accuracy that --half, --int8 or --early-exit may cost"
        ),
    ] = 0.5,
) -> None:
    """Write the trained network for use elsewhere."""
    if [onnx, program, safetensors, check is not None].count(True) != 1:
        raise RacnnError(
            "export to what? name one format", "--onnx, --torch or --safetensors, or --check FOLDER"
        )
    if not (onnx or program) and (raw or crops or top != 5):
        raise RacnnError("--raw, --crops and --top are for --onnx and --torch", "leave them away")
    if not onnx and (half or int8 or exits or opset != 20):
        raise RacnnError(
            "--half, --int8, --early-exit and --opset are for --onnx", "add --onnx, or leave them away"
        )
    if half and int8:
        raise RacnnError("--half and --int8 are two precisions", "name one of them")
    if opset not in (18, 20):
        raise RacnnError(f"--opset {opset}: exports are written and tried in 18 and 20", "--opset 18 or 20")
    opened = Run.open(run)
    from racnn_cli.export import onnx as exporter
    from racnn_cli.export.graph import Form

    if onnx:
        report = exporter.export_onnx(
            opened,
            out,
            form=Form(raw, top, crops),
            opset=opset,
            precision="half" if half else "int8" if int8 else "float32",
            exits=exits,
            max_drop=max_drop,
        )
        typer.echo(exporter.describe(report))
    elif program:
        report = exporter.export_program(opened, out, form=Form(raw, top, crops))
        worst = max(report["max_difference"].values())
        typer.echo(
            f"wrote {report['path']}: {report['bytes'] / 2**20:.1f} MiB, largest difference {worst:.1e}"
        )
    elif check is not None:
        typer.echo(exporter.describe(exporter.check(opened, out, check)))
    else:
        typer.echo(f"wrote {exporter.export_safetensors(opened, out or opened.folder / 'export')}")


@app.command()
def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL.onnx|RUN] IMAGES...",
            help="image and video files, folders, patterns, camera:0, - for a list on standard input; "
            "first of all, if it is not the newest run, what answers: a run folder or an ONNX file, which needs "
            "no torch",
            show_default=False,
        ),
    ],
    run: RunFolder = None,
    rows: Annotated[
        Literal["table", "jsonl", "csv"], typer.Option("--format", help="how the rows are written")
    ] = "table",
    save: Annotated[
        Path | None, typer.Option("--save", help="folder for images with the boxes drawn")
    ] = None,
    source: Annotated[
        int | None,
        typer.Option(
            "--source",
            min=16,
            max=16384,
            help="side in pixels of the square that all boxes are cut from; default as trained",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="images at a time")] = 16,
    every: Annotated[int, typer.Option("--every", min=1, help="of a video, every so many-th frame")] = 1,
) -> None:
    """Class, probability and where the network looked: one row an image, as it comes."""
    first = Path(images[0])
    trained = run
    if first.suffix == ".onnx" or (first / "recipe.toml").is_file():
        if run is not None:
            raise RacnnError(f"{first} and --run {run} are two networks", "name one of them")
        trained, images = first, images[1:]
        if not images:
            raise RacnnError(f"{first} answers for which images?", f"`racnn predict {first} my-images`")
    if trained is None or trained.suffix != ".onnx":
        trained = Run.open(trained).folder
    from racnn_cli.export.prediction import load
    from racnn_cli.results import predict as predictor

    sources = predictor.gather(images)
    code = predictor.predict_command(
        load(trained, source=source), sources, rows=rows, save=save, batch=batch, every=every
    )
    if code:
        raise typer.Exit(code)


@app.command()
def report(run: RunFolder = None) -> None:
    """Write report.html, one page with curves, figures and images."""
    opened = Run.open(run)
    from racnn_cli.results.report import write_report

    typer.echo(f"wrote {write_report(opened)}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="seeds, attention, ablation, gradient, backbones or export")],
    json: Annotated[Path | None, typer.Option("--json", help="write the figures to this file too")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            help="not for backbones and export: such as 0-4 or 0,3,7; default 0-4",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="for seeds, attention and ablation; default demo, clutter and clutter",
            autocompletion=_complete_recipe,
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="for seeds, attention and ablation: a small share of the data")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="for attention (with true boxes) and ablation: other data than the recipe's; "
            "of clutter, the folder of the four Fashion-MNIST files",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", help="for ablation: only this arm and the default; may be given several times"),
    ] = None,
) -> None:
    """Print the figures that README quotes."""
    from racnn_cli.bench import run_bench

    run_bench(name, json_path=json, seeds=seeds, recipe=recipe, quick=quick, data=data, arms=arm or ())


@app.command()
def samples(
    name: Annotated[str, typer.Argument(help="plankton or fieldguide")],
    out: Annotated[Path, typer.Option("--out", help="folder to write, new or empty")],
    images: Annotated[int, typer.Option(min=24, max=100_000, help="fieldguide: number of images")] = 480,
    size: Annotated[int, typer.Option(min=64, max=4096, help="fieldguide: side in pixels")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="fieldguide: seed of the drawings")] = 0,
) -> None:
    """Write a built-in data set to a folder, to look at it or to train on it as your own."""
    from racnn_cli.data.datasets import write

    typer.echo(f"wrote {write(name, out, recipes.Sample(images=images, size=size), seed)}")


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the recipes."""
    for name in recipes.names():
        typer.echo(f"{name:12} {recipes.load(name).about}")


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(autocompletion=_complete_recipe)],
    sets: Sets = None,
    quick: Quick = False,
) -> None:
    """Print a recipe with every value as used."""
    typer.echo(
        recipes.dump(recipes.load(name, sets or (), {"quick": True} if quick else {}).as_used()), nl=False
    )


def main() -> None:
    """Entry of the command `racnn`: a error that a user can fix is two lines, never a traceback."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    try:
        try:
            app(prog_name="racnn")
        finally:
            sys.stdout.flush()
    except RacnnError as error:
        _stop(error)
    except BrokenPipeError:  # who reads has seen enough
        _silence()
        sys.exit(1)
    except OSError as error:  # whatever the system refuses where nothing else explains it
        what = escape_control(str(error.filename)) if error.filename else "the output"
        if len(what) > 200:
            what = f"{what[:200]}…"
        _silence()
        hint = "check the name, its rights and the space on the disk"
        _stop(RacnnError(f"{what}: {error.strerror or error}", hint, failure=True))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).strip() or "no more memory").splitlines()[0]
        hint = "smaller model.sizes, data.source, model.apn_hidden or train.batch, or fewer data.workers"
        _stop(RacnnError(f"the memory is not enough: {said}", hint, failure=True))


def _silence() -> None:
    """What could not be written to standard output is not tried again at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(error: RacnnError) -> NoReturn:
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    out.print(f"[bold red]error:[/] {escape(escape_control(error.message))}")
    if error.hint:
        out.print(f"[bold]try:[/] {escape(escape_control(error.hint))}")
    sys.exit(error.exit_code)
