"""`racnn bench folds`: a recipe on the folds of a data set, and what single settings are worth there.

The training and validation images are cut into three folds; test images are left out. Each fold is the test split of
one run, whose validation split is a tenth of the other folds. Settings are compared on the plain backbone at the first
view's size, because that is cheap and because the baseline gets them too. Run folders:
`runs/bench-folds-RECIPE/fold-N/ARM`.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from racnn_cli import recipe as recipes
from racnn_cli.bench import BenchResult, Options
from racnn_cli.bench.arms import LEARNED, Arm, SeedExperiment, check_names
from racnn_cli.bench.records import SeedResult
from racnn_cli.bench.summary import SPREAD_NOTE, describe_kept, format_paired, format_spread, new_table, paired, spread
from racnn_cli.core.model import sizes_of
from racnn_cli.data.index import list_rows
from racnn_cli.errors import DataError, RecipeError
from racnn_cli.run import RUNS, write_text

FOLDS = 3
VAL_SHARE = 0.1
PLAIN = Arm("plain", "one scale at the first view's size", pretrained=False)
SETTINGS = (
    PLAIN,
    Arm("label smoothing", "label smoothing of 0.1", {"train.label_smoothing": 0.1}),
    Arm("averaged weights", "moving average of the weights, decay 0.99", {"train.ema": 0.99}),
    Arm("smaller crops", "random crops from 0.35 of the area", {"data.augment.scale": 0.35}),
    Arm("stronger color", "color changes of 0.4", {"data.augment.color": 0.4}),
    Arm("erasing", "random erasing of a quarter of the images", {"data.augment.erase": 0.25}),
    Arm("dropout", "dropout of 0.3 before the classifier", {"model.dropout": 0.3}),
    Arm("stochastic depth", "residual branches skipped with up to 0.2", {"model.drop_path": 0.2}),
    Arm("weight decay", "weight decay of 0.1", {"train.weight_decay": 0.1}),
    Arm("twice the epochs", "twice the epochs", {}),
    Arm("half the learning rate", "half the learning rate", {}),
    Arm("twice the learning rate", "twice the learning rate", {}),
)
EQUAL = Arm("plain, equal compute", "one scale that costs what all scales cost", plain="equal compute")
ALL = replace(LEARNED, name="all scales", folder=LEARNED.folder_name)
ARMS = (*SETTINGS, ALL, EQUAL)


def run(options: Options) -> BenchResult:
    """Train what is not finished, and compare the arms over the folds.

    Raises:
        DataError: problems of the data.
        RecipeError: an unknown arm.
        RunError: a folder holds a run of another recipe, or training fails.
    """
    recipe = recipes.load(options.recipe)
    if options.data is None and not recipe.data.path:
        raise RecipeError(f"recipe {recipe.name} names no data", "--data FOLDER")
    arms, parent = select_arms(options.arms), RUNS / f"bench-folds-{recipe.name}{'-quick' if options.quick else ''}"
    files = write_folds(recipe.override({"data.path": options.data or recipe.data.path}).data, parent)
    entries = []
    for number, file in enumerate(files):
        for seed in options.seeds:
            folder = parent / f"fold-{number}" if options.seeds == (0,) else parent / f"fold-{number}-seed-{seed}"
            given = replace(options, data=str(file))
            experiment = SeedExperiment(given, seed, needs_boxes=False, folder=folder, milestones=False)
            entries.append(experiment.run_arms(_resolve(arm, experiment.recipe) for arm in arms))
    return summarize(recipe.name, arms, entries)


def select_arms(names: Sequence[str]) -> list[Arm]:
    """Return the named arms in the order of `ARMS`, with those that they are compared with; all if there are no names.

    Raises:
        RecipeError: an unknown arm.
    """
    check_names(names, ARMS)
    wanted = set(names) or {arm.name for arm in ARMS}
    wanted |= {PLAIN.name} if wanted & {arm.name for arm in SETTINGS} else set()
    wanted |= {ALL.name} if EQUAL.name in wanted else set()  # it sets the budget
    return [arm for arm in ARMS if arm.name in wanted]


def _resolve(arm: Arm, recipe: recipes.Recipe) -> Arm:
    """The arm with what depends on the recipe: its single scale, and multiples of the recipe's values."""
    if arm not in SETTINGS:
        return arm
    section = recipe.pretrain_cnn
    relative: dict[str, dict[str, object]] = {
        "twice the epochs": {"pretrain_cnn.epochs": 2 * section.epochs},
        "half the learning rate": {"pretrain_cnn.lr": section.lr / 2},
        "twice the learning rate": {"pretrain_cnn.lr": 2 * section.lr},
    }
    scale = {"model.scales": 1, "model.sizes": [sizes_of(recipe.model)[0]]}
    return replace(arm, changes={**scale, **arm.changes, **relative.get(arm.name, {})}, pretrained=False)


def write_folds(data: recipes.Data, folder: Path) -> list[Path]:
    """Write a CSV file per fold, whose `split` column has train, val and test, and return their paths.

    Args:
        data: where the images are; those of its test split are left out.
        folder: to write to.

    Raises:
        DataError: problems of the data, or a class with fewer images than folds.
    """
    by_class = defaultdict(list)
    for row in list_rows(data):
        if row.split != "test":
            by_class[row.label].append(row.path.absolute())
    small = [name for name, paths in by_class.items() if len(paths) < FOLDS]
    if small or not by_class:
        raise DataError(f"{FOLDS} folds need {FOLDS} images of each class; too few of {', '.join(small) or 'any'}")
    # Of each class in turn, so that the folds are of equal size.
    numbers, assigned = np.random.default_rng(0), list[tuple[str, Path, int]]()
    for name, paths in sorted(by_class.items()):
        assigned += [
            (name, paths[position], len(assigned) + n) for n, position in enumerate(numbers.permutation(len(paths)))
        ]
    files = []
    for fold in range(FOLDS):
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["path", "label", "split"])
        others = 0
        for name, path, number in assigned:
            split = "test"
            if number % FOLDS != fold:
                others += 1
                split = "val" if others % round(1 / VAL_SHARE) == 0 else "train"
            writer.writerow([path, name, split])
        files.append(folder / f"fold-{fold}.csv")
        if not files[-1].is_file() or files[-1].read_text(encoding="utf-8") != text.getvalue():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(files[-1], text.getvalue())
    return files


def summarize(name: str, arms: Sequence[Arm], entries: Sequence[SeedResult]) -> BenchResult:
    """Summarize the results of recipe `name`, one entry per fold and seed, as a table and values."""
    results = {arm.name: [entry.arms[arm.name] for entry in entries] for arm in arms}
    top1 = {name: [result.final for result in ones] for name, ones in results.items()}
    rows: dict[str, Any] = {}
    table = new_table(
        f"Recipe {name}: top-1 on the fold that was left out, {FOLDS} folds",
        text=["arm"],
        numbers=["top-1", "validation", "difference [95 % t interval]", "training, TFLOPs"],
        notes=[SPREAD_NOTE.replace("seeds", "folds"), "difference: to plain; of all scales, to plain, equal compute"]
        + [f"{arm.name}: {arm.about}" for arm in arms]
        + [describe_kept(name, [result.choices for result in ones]) for name, ones in results.items()],
    )
    for arm in arms:
        reference = EQUAL.name if arm is ALL else PLAIN.name
        compared = arm.name != reference and reference in top1 and arm is not EQUAL
        rows[arm.name] = {
            "about": arm.about,
            "top1": spread(top1[arm.name]),
            "val": spread([result.val_final for result in results[arm.name]]),
            "training": spread([result.compute.training for result in results[arm.name] if result.compute]),
            "difference": paired(top1[arm.name], top1[reference]) if compared else None,
        }
        row = rows[arm.name]
        difference = format_paired(row["difference"]) if compared else ""
        cells = [format_spread(row["top1"]), format_spread(row["val"]), difference]
        table.add_row(arm.name, *cells, f"{row['training']['mean'] / 1e12:.1f}")
    return BenchResult(
        [table], {"recipe": name, "folds": FOLDS, "runs": [entry.to_json() for entry in entries], "arms": rows}
    )
