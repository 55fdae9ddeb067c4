"""`racnn bench seeds`: one recipe, trained once per seed, each with its own split.

Run folders: `runs/bench-NAME/seed-N`. A finished seed is not trained again; an interrupted one continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from racnn_cli import api
from racnn_cli import recipe as recipes
from racnn_cli.bench import BenchResult, Options
from racnn_cli.bench.summary import describe_compute, describe_kept, format_paired, new_table, paired, report, spread
from racnn_cli.events import Baseline, ChoiceEvent
from racnn_cli.run import RUNS, Run


def run(options: Options) -> BenchResult:
    """Train what is not finished, and compare the seeds.

    Raises:
        RunError: a folder holds a run of another recipe, or training fails.
    """
    recipe = recipes.load(options.recipe, (), {"quick": True} if options.quick else {})
    parent = RUNS / f"bench-{recipe.name}{'-quick' if options.quick else ''}"
    entries = []
    for seed in options.seeds:
        seeded, trained = recipe.override({"seed": seed}), Run(parent / f"seed-{seed}")
        finished = api.same_recipe(trained.folder, seeded.as_used()) and trained.eval.is_file()
        report(f"seed {seed}: {'is already trained' if finished else 'trains'}, {trained.folder}")
        if not finished:
            api.train(seeded, out=trained.folder, or_resume=True, quiet=True)
        result = trained.read_eval()
        entries.append(
            {
                "seed": seed,
                "run": str(trained.folder),
                "split": result.split,
                "images": result.images,
                "top1": {name: answer.top1 for name, answer in result.answers()},
                "mean_class": {name: answer.mean_class for name, answer in result.answers()},
                "seconds": _training_seconds(trained),
                "baseline_seconds": _training_seconds(Run(trained.folder / "baseline")),
                "choices": [choice.to_json() for choice in result.choices],
                "baseline": result.baseline.to_json() if result.baseline else None,
            }
        )
    return summarize(recipe.name, entries)


def _training_seconds(run: Run) -> float:
    """Sum the seconds of all epochs; 0 if there is no such run."""
    return sum(event.seconds for event in run.epochs())


def _choices(values: Sequence[Any]) -> list[ChoiceEvent]:
    return [ChoiceEvent.model_validate(value) for value in values]


def summarize(name: str, entries: Sequence[dict[str, Any]]) -> BenchResult:
    """Summarize the results of recipe `name` as a table and values.

    Args:
        name: of the recipe.
        entries: per seed `seed`, `split`, `images`, `top1` (answer to accuracy), `seconds`, `baseline_seconds`, and as
            in eval.json `choices` and `baseline`.
    """
    columns = {answer: [entry["top1"][answer] for entry in entries] for answer in entries[0]["top1"]}
    spreads = {answer: spread(column) for answer, column in columns.items()}
    seconds = spread([entry["seconds"] for entry in entries])["mean"]
    values: dict[str, Any] = {
        "recipe": name,
        "runs": list(entries),
        "mean": {answer: value["mean"] for answer, value in spreads.items()},
        "deviation": {answer: value["deviation"] for answer, value in spreads.items()},
        "seconds_mean": seconds,
    }
    notes = [
        f"images: of the {entries[0]['split']} split; ±: standard deviation over the seeds",
        "seconds: of training, + the baseline's",
    ]
    notes.append(describe_kept("the run", [_choices(entry.get("choices", ())) for entry in entries]))
    if "baseline" in columns:
        baselines = [Baseline.model_validate(entry["baseline"]) for entry in entries if entry.get("baseline")]
        notes.append(describe_kept("the baseline", [baseline.choices for baseline in baselines]))
        budgets = [baseline.budget for baseline in baselines if baseline.budget is not None]
        if budgets:
            notes.append(describe_compute("the run", [budget.run for budget in budgets]))
            notes.append(describe_compute("the baseline", [budget.baseline for budget in budgets]))
        values["fused_minus_baseline"] = difference = paired(columns["fused"], columns["baseline"])
        notes.append(f"fused - baseline, paired: {format_paired(difference)}")
        notes.append("[95 % t interval]: too narrow to the extent that the test splits of the seeds share images")
    title = f"Recipe {name}: top-1, one split per seed"
    table = new_table(title, text=[], numbers=["seed", "images", *columns, "seconds"], notes=notes)
    for entry in entries:
        accuracies = (f"{entry['top1'][answer]:.3f}" for answer in columns)
        extra = f" (+{entry['baseline_seconds']:.0f})" if entry["baseline_seconds"] else ""
        table.add_row(str(entry["seed"]), str(entry["images"]), *accuracies, f"{entry['seconds']:.0f}{extra}")
    table.add_section()
    table.add_row("mean", "", *(f"{value['mean']:.3f}" for value in spreads.values()), f"{seconds:.0f}")
    if len(entries) > 1:
        table.add_row("±", "", *(f"{value['deviation']:.3f}" for value in spreads.values()), style="dim")
    return BenchResult([table], values)
