"""`racnn bench seeds`: one recipe, trained once a seed, each with its own split: how good, and how surely.

Run folders: `runs/bench-NAME/seed-N`. A seed that is finished is not trained again, one that was interrupted
goes on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from racnn_cli import api
from racnn_cli import recipe as recipes
from racnn_cli.bench import Figures, Options
from racnn_cli.events import EvalResult
from racnn_cli.recipe import Recipe
from racnn_cli.run import RUNS, Run


def run(options: Options) -> Figures:
    """Train what is not trained yet, and put all seeds side by side.

    Raises:
        RacnnError: a folder holds a run of another recipe, or training fails.
    """
    console = Console(stderr=True, highlight=False)
    recipe = recipes.load(options.recipe, (), {"quick": True} if options.quick else {})
    parent = RUNS / f"bench-{recipe.name}{'-quick' if options.quick else ''}"
    found = []
    for seed in options.seeds:
        folder = parent / f"seed-{seed}"
        done = finished(folder, recipe.override({"seed": seed}).as_used())
        console.print(escape(f"seed {seed}: {'is there already' if done else 'trains'}, {folder}"))
        one = recipe.override({"seed": seed})
        result = done or api.train(one, out=folder, or_resume=True, quiet=True)[1]
        trained = Run(folder)
        found.append(
            {
                "seed": seed,
                "run": str(folder),
                "split": result.split,
                "images": result.images,
                "top1": {name: figures.top1 for name, figures in result.answers()},
                "seconds": _seconds(trained),
                "baseline_seconds": _seconds(Run(folder / "baseline")),
            }
        )
    return summary(recipe.name, found)


def finished(folder: Path, recipe: Recipe) -> EvalResult | None:
    """The figures of a seed that was trained to its end with this recipe; None if it was not.

    Raises:
        RacnnError: the folder holds a run of another recipe, whose figures would be passed off as this one's.
    """
    run = Run(folder)
    return run.read_eval() if api.same_recipe(folder, recipe) and run.eval.is_file() else None


def _seconds(run: Run) -> float:
    """Of training, without validation, reading the data set or evaluation; 0 if there is no such run."""
    return sum(event.seconds for event in run.epochs())


def summary(name: str, found: Sequence[Mapping[str, Any]]) -> Figures:
    """The table of `run`.

    Args:
        name: of the recipe.
        found: one entry a seed: `seed`, `images`, `split`, `top1` (line to share), `seconds`,
            `baseline_seconds`.
    """
    lines = list(found[0]["top1"])
    columns = {line: [entry["top1"][line] for entry in found] for line in lines}
    seconds = [entry["seconds"] for entry in found]
    values: dict[str, Any] = {
        "recipe": name,
        "runs": [dict(entry) for entry in found],
        "mean": {line: statistics.fmean(column) for line, column in columns.items()},
        "deviation": {line: _deviation(column) for line, column in columns.items()},
        "seconds_mean": statistics.fmean(seconds),
    }
    table = Table(title=f"Recipe {name}: top-1, a split and a seed each", title_justify="left")
    for column in ("seed", "images", *lines, "seconds"):
        table.add_column(column, justify="right")
    for entry in found:
        shown = [f"{entry['top1'][line]:.3f}" for line in lines]
        table.add_row(str(entry["seed"]), str(entry["images"]), *shown, _time(entry))
    table.add_section()
    table.add_row(
        "mean", "", *(f"{values['mean'][line]:.3f}" for line in lines), f"{values['seconds_mean']:.0f}"
    )
    if len(found) > 1:
        table.add_row("±", "", *(f"{values['deviation'][line]:.3f}" for line in lines), "", style="dim")
    notes = [f"images: of the {found[0]['split']} split; ±: standard deviation over the seeds"]
    notes.append("seconds: of training" + (" (+ the baseline's)" if "baseline" in lines else ""))
    if "baseline" in lines:
        difference = paired(columns["fused"], columns["baseline"])
        values["fused_minus_baseline"] = difference
        text = f"fused - baseline, paired: {difference['mean']:+.3f}"
        if difference["interval"] is not None:
            low, high = difference["interval"]
            # The images of one data set come up in several test splits.
            text += f", 95 % t interval {low:+.3f} to {high:+.3f}"
            text += " (too narrow as far as the splits share images)"
        notes.append(text)
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return Figures([table], values)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean of the differences, and their 95 % t interval (None for a single pair)."""
    from scipy import stats  # takes a second, which a command that trains nothing should not wait

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "interval": None}
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return {"mean": mean, "interval": [mean - half, mean + half]}


def _deviation(column: Sequence[float]) -> float | None:
    return statistics.stdev(column) if len(column) > 1 else None


def _time(entry: Mapping[str, Any]) -> str:
    extra = f" (+{entry['baseline_seconds']:.0f})" if entry["baseline_seconds"] else ""
    return f"{entry['seconds']:.0f}{extra}"
