"""`racnn bench fusion`: the fusion head, a mixture of the scales, and a mixture of both, on the same trained networks.

The networks are those of the arm `learned` of `racnn bench attention`. Only the fusion differs, so the comparison costs
no training beyond theirs. The mixtures are fitted on the validation split; all are compared on the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from racnn_cli.bench import BenchResult, Options
from racnn_cli.bench.arms import LEARNED, SeedExperiment
from racnn_cli.bench.summary import SPREAD_NOTE, format_paired, format_spread, new_table, paired, spread
from racnn_cli.core.model import build
from racnn_cli.training import stages
from racnn_cli.training.trainer import Trainer

KINDS = ("head", "weights", "both")
FIGURES = ("top1", "nll", "calibrated_nll", "calibrated_ece")


def run(options: Options) -> BenchResult:
    """Train what is not finished, and compare the three fusions over the seeds.

    Raises:
        RunError: a folder holds a run of another recipe, or training fails.
    """
    entries = []
    for number in options.seeds:
        experiment = SeedExperiment(options, number, needs_boxes=False)
        experiment.run_arm(LEARNED)
        with experiment.finished(LEARNED) as trainer:
            entries.append({"seed": number, "folder": str(experiment.folder)} | compare(trainer))
    return summarize(experiment.recipe.name, entries)


def compare(trainer: Trainer) -> dict[str, Any]:
    """Fit and measure every kind of fusion on the scales of a trained network.

    Returns:
        `images`, the `average` of the scales, and per kind its figures, with the `mixture` it was fitted to.
    """
    trained, recipe = trainer.model, trainer.recipe.model
    result: dict[str, Any] = {}
    for kind in KINDS:
        model = build(recipe.model_copy(update={"fuse": kind}), trained.classes, source=trained.source, weights="none")
        state = trained.state_dict() | {name: value for name, value in model.state_dict().items() if name == "mixture"}
        model.load_state_dict({name: value for name, value in state.items() if name in model.state_dict()})
        trainer.model = model.to(trainer.device).eval()
        if model.mixture is not None:
            stages.fit_mixture(trainer)
        model.temperatures.copy_(trainer.measure("val").temperatures())
        measured = trainer.measure("test")
        fused, average = measured.fused.compute(), measured.average.compute()
        result[kind] = {name: fused[name] for name in FIGURES}
        result[kind]["mixture"] = [] if model.mixture is None else model.mixture.tolist()
        result["images"] = measured.images
        result["average"] = {name: average[name] for name in FIGURES}
    trainer.model = trained
    return result


def summarize(name: str, entries: Sequence[dict[str, Any]]) -> BenchResult:
    """Summarize the results of recipe `name` as a table and values."""
    images = entries[0]["images"]
    table = new_table(
        f"Recipe {name}: fusion of the same scales, on {images} test images",
        text=["fusion"],
        numbers=["top-1", "NLL", "NLL/T", "ECE/T", "top-1 - head [95 % t interval]"],
        notes=[SPREAD_NOTE, "average: mean probability of the scales; weights, both: fitted on the validation split"],
    )
    head = [entry["head"]["top1"] for entry in entries]
    rows: dict[str, Any] = {}
    for kind in ("average", *KINDS):
        spreads = {figure: spread([entry[kind][figure] for entry in entries]) for figure in FIGURES}
        difference = paired([entry[kind]["top1"] for entry in entries], head)
        rows[kind] = {**spreads, "minus_head": difference}
        cells = [format_spread(spreads[figure]) for figure in FIGURES]
        table.add_row(kind, *cells, "" if kind == "head" else format_paired(difference))
    return BenchResult([table], {"recipe": name, "images": images, "runs": list(entries), "fusions": rows})
