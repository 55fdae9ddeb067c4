"""The benches: tables and JSON agree, and the measurements detect what they are meant to detect."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from racnn_cli.bench import NAMES, Options, export, gradient, parse_seeds, run_bench, seeds, summary
from racnn_cli.cli import app
from racnn_cli.data.datasets.fieldguide import draw
from racnn_cli.errors import RecipeError, RunError
from racnn_cli.run import Run, write_json

RECIPE = """
about = "the smallest drawn set and network"
[data]
path = "fieldguide"
source = 64
[data.sample]
images = 24
size = 64
[model]
backbone = "small_cnn"
weights = "none"
scales = 3
sizes = [32, 32, 32]
"""


def test_a_misspelled_name_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError) as error:
        run_bench("gradent")
    assert "did you mean gradient?" in error.value.message
    assert all(name in error.value.hint for name in NAMES)


def test_an_option_that_a_bench_does_not_take_is_refused() -> None:
    with pytest.raises(RecipeError, match="export takes no --seeds and no --quick"):
        run_bench("export", seeds="0-2", quick=True)
    with pytest.raises(RecipeError, match="gradient takes no --recipe"):
        run_bench("gradient", seeds="0", recipe="tiny")


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse_seeds("0-4") == (0, 1, 2, 3, 4)
    assert parse_seeds("3, 0-2,1") == (3, 0, 1, 2)
    for wrong in ("", "a", "4-2", "-3", "1-", "0,,1", "1.5", "0-99999999999999"):
        with pytest.raises(RecipeError, match="--seeds"):
            parse_seeds(wrong)


def test_backbones_are_exported_checked_and_timed(here, monkeypatch) -> None:
    sizes = {"test_resnet": (64, 48, 48), "test_vit": (100, 100, 100), "resnet18x": (64, 64, 64)}
    monkeypatch.setattr(export, "MODELS", sizes)
    result = CliRunner().invoke(app, ["bench", "export", "--json", "results.json"])
    assert result.exit_code == 0, result.output
    results = json.loads((here / "results.json").read_text())
    assert (results["bench"], results["machine"]["torch"]) == ("export", torch.__version__)
    assert f"torch {torch.__version__}" in result.output.replace("\n", " ")
    measured, wrong_size, unknown = results["models"]
    assert measured["error"] == ""
    assert (measured["side"], measured["sizes"]) == (64, [64, 48, 48])
    assert measured["agreement"] == [40, 40]  # twenty in the export, twenty more in the check
    assert 0 <= max(measured["max_difference"].values()) < 1e-3
    assert measured["int8_bytes"] < 0.5 * measured["bytes"]
    assert min(measured["over_torch"], measured["int8_over_float32"]) > 0
    rows = {name: next(line for line in result.output.splitlines() if line.startswith(f"│ {name} ")) for name in sizes}
    for cell in ("64/48/48", f"{measured['bytes'] / 2**20:.0f}", "40 of 40", f"{measured['over_torch']:.2f}", "ok"):
        assert f" {cell} " in rows["test_resnet"]
    assert f" {measured['max_difference']['boxes']:.0e} " in rows["test_resnet"]
    # A backbone that fails is a row of the table.
    assert "100" in wrong_size["error"]
    assert "resnet18x" in unknown["error"]
    assert "FAILED" in rows["test_vit"]
    assert "FAILED" in rows["resnet18x"]


def random_images(side: int) -> torch.Tensor:
    drawn = [torch.from_numpy(draw(label, size=side, seed=3, index=label)[0].copy()) for label in range(4)]
    return torch.stack(drawn).permute(0, 3, 1, 2).double() / 127.5 - 1


def test_the_exact_gradient_agrees_with_differences_and_the_aliased_mask_does_not() -> None:
    images, boxes, _ = gradient.draw(random_images(160), 40, seed=0)
    counts = gradient.count_agreement(images, boxes.double(), size=48, loss=gradient.linear_loss(48, seed=0))
    result = gradient.summarize({"A": counts}, 40)
    share = {(row["gradient"], row["k"]): row["A_6px"] for row in result.values["rows"]}
    for axis in gradient.AXES:
        assert share["exact", 0.5][axis] >= 0.75
        assert share["bilinear", "inf"][axis] >= 0.75
        assert share["exact", 0.5][axis] > share["boxcar", 10.0][axis] + 0.1


def brightness(crops: torch.Tensor) -> torch.Tensor:
    return crops.mean(dim=(1, 2, 3))


def test_agreement_compares_signs() -> None:
    """On a ramp every sign is known; on a flat image the derivative is 0, which never agrees."""
    images, boxes, _ = gradient.draw(random_images(96), 6, seed=1)
    ramp = torch.linspace(-1, 1, 96, dtype=torch.float64).expand(6, 3, 96, 96)
    counts = gradient.count_agreement(ramp, boxes.double(), size=24, loss=brightness)
    agreement = dict(zip(gradient.CHOICES, counts.tolist(), strict=True))
    assert [step[0] for step in agreement["bilinear", math.inf]] == [6, 6]  # brighter to the right, for every box
    flat = gradient.count_agreement(torch.zeros_like(images), boxes.double(), size=24, loss=brightness)
    assert flat.sum() == 0


def test_a_paired_interval_is_that_of_the_t_test() -> None:
    ours, theirs = [0.9, 0.86, 0.95, 0.9, 0.81], [0.86, 0.86, 0.9, 0.95, 0.76]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert summary.paired(ours, theirs)["interval"] == pytest.approx([low, high], rel=1e-5)
    assert summary.paired([0.9], [0.8])["interval"] is None


def test_seeds_with_a_baseline_are_compared_in_pairs() -> None:
    answer = {"top1": 0.8, "top5": 1.0, "nll": 0.5, "ece": 0.1}
    kept, last = ({"top1": top1, "nll": 0.5} for top1 in (0.75, 0.5))
    choice = {"event": "choice", "stage": "pretrain-cnn", "unit": "epoch", "kept": 2, "last": 3}
    choice |= {"kept_val": kept, "last_val": last}
    budget = {
        "run": {"prediction": 10**9, "training": 10**13},
        "baseline": {"prediction": 2 * 10**9, "training": 10**14},
    }
    entries = [
        {"seed": seed, "images": 21, "split": "test", "seconds": 60.0, "baseline_seconds": 30.0}
        | {"top1": {"baseline": low, "scale 1": 0.8, "average": 0.85, "fused": high}}
        | {"baseline": {**answer, "size": 64, "budget": budget, "choices": [choice]}}
        | {"choices": [choice, {**choice, "stage": "alternate", "unit": "round", "last": 2, "last_val": kept}]}
        for seed, (low, high) in enumerate([(0.8, 0.9), (0.7, 0.9), (0.9, 0.9)])
    ]
    result = seeds.summarize("demo", entries)
    notes = str(result.tables[0].caption).splitlines()
    assert "the run: the round that was kept has 0.750 on validation images, the last one 0.750" in notes
    assert "the baseline: the epoch that was kept has 0.750 on validation images, the last one 0.500" in notes
    assert "the run: 1,000.0 MFLOPs per prediction, 10 TFLOPs of training" in notes
    assert "the baseline: 2,000.0 MFLOPs per prediction, 100 TFLOPs of training" in notes
    values = result.values
    assert values["mean"]["fused"] == pytest.approx(0.9)
    assert values["deviation"]["baseline"] == pytest.approx(0.1)
    assert values["fused_minus_baseline"]["mean"] == pytest.approx(0.1)
    assert values["fused_minus_baseline"]["interval"][0] == pytest.approx(0.1 - 4.302653 * 0.1 / 3**0.5, rel=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`bench seeds` on two seeds, run once for all tests: its folder and its output."""
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "tiny.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["bench", "seeds", "--recipe", "tiny.toml", "--quick", "--seeds", "0-1", "--json", "f.json"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (result.output, result.exception)
    return folder, result.output


def test_seeds_trains_each_seed_and_reports_its_runs(trained) -> None:
    folder, output = trained
    results = json.loads((folder / "f.json").read_text())
    assert results["seeds"] == [0, 1]
    fused = []
    for entry in results["runs"]:
        run = Run(folder / entry["run"])
        assert run.folder == folder / "runs" / "bench-tiny-quick" / f"seed-{entry['seed']}"
        assert run.recipe().seed == entry["seed"]
        assert list(entry["top1"]) == ["scale 1", "scale 2", "scale 3", "average", "fused"]
        assert entry["top1"]["fused"] == run.read_eval().to_json()["fused"]["top1"]
        assert entry["seconds"] > 0
        fused.append(entry["top1"]["fused"])
    assert results["mean"]["fused"] == pytest.approx(sum(fused) / 2)
    assert "fused_minus_baseline" not in results
    assert f"{results['mean']['fused']:.3f}" in output


def test_a_finished_seed_is_not_trained_again_and_an_interrupted_one_continues(trained, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    monkeypatch.chdir(folder)
    parent = folder / "runs" / "bench-tiny-quick"
    first, second = Run(parent / "seed-0"), Run(parent / "seed-1")
    changed = first.read_eval().to_json()
    write_json(first.eval, changed | {"fused": changed["fused"] | {"top1": 0.12345}})
    expected = second.read_eval().to_json()
    second.eval.unlink()
    entries = seeds.run(Options((0, 1), "tiny.toml", quick=True)).values["runs"]
    assert entries[0]["top1"]["fused"] == 0.12345
    assert second.read_eval().to_json()["fused"] == expected["fused"]
    # Results of another recipe are not reported as this one's.
    text = first.recipe_file.read_text().replace("batch = 16", "batch = 8")
    first.recipe_file.write_text(text)
    with pytest.raises(RunError, match=r"train\.batch is 8 there and 16 here"):
        seeds.run(Options((0,), "tiny.toml", quick=True))


def test_the_names_are_known_without_torch() -> None:
    code = "import sys, racnn_cli.bench; print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
