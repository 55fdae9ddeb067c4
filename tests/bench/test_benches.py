"""The benches: what they print is what they write, and their measures tell right from wrong."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from racnn_cli import recipe as recipes
from racnn_cli.bench import Options, backbones, crop, export, gradient, growth, parse_seeds, run_bench, seeds
from racnn_cli.cli import app
from racnn_cli.core.attention import zoom
from racnn_cli.core.model import build, resolve
from racnn_cli.data.datasets.fieldguide import draw
from racnn_cli.errors import RacnnError
from racnn_cli.run import Run, write_json
from racnn_cli.training import stages


def test_a_misspelt_name_gets_the_near_ones() -> None:
    with pytest.raises(RacnnError) as error:
        run_bench("gradent", None, None)
    assert "did you mean gradient?" in error.value.message
    assert all(name in error.value.hint for name in ("seeds", "gradient", "backbones", "export", "crop"))


def test_an_option_that_a_bench_does_not_take_is_refused() -> None:
    with pytest.raises(RacnnError, match="crop takes no --seeds and no --quick"):
        run_bench("crop", None, "0-2", quick=True)
    with pytest.raises(RacnnError, match="gradient takes no --recipe"):
        run_bench("gradient", None, "0", recipe="tiny")


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse_seeds("0-4") == (0, 1, 2, 3, 4)
    assert parse_seeds("3, 0-2,1") == (3, 0, 1, 2)
    for wrong in ("", "a", "4-2", "-3", "1-", "0,,1", "1.5", "0-99999999999999"):
        with pytest.raises(RacnnError, match="--seeds"):
            parse_seeds(wrong)


def test_the_command_prints_the_table_and_writes_the_same_figures(here, monkeypatch) -> None:
    monkeypatch.setattr(crop, "run", lambda options: crop.measure(batch=2, source=64, size=32, turns=3))
    result = CliRunner().invoke(app, ["bench", "crop", "--json", "figures.json"])
    assert result.exit_code == 0, result.output
    figures = json.loads((here / "figures.json").read_text())
    assert (figures["bench"], figures["machine"]["torch"]) == ("crop", torch.__version__)
    for name, milliseconds in figures["milliseconds"].items():
        line = next(
            line for line in result.output.splitlines() if line.startswith(f"│ {name} ") and "│" in line
        )
        assert f"{milliseconds:.1f}" in line
        assert f"{figures['ratio_to_zoom'][name]:.2f} ×" in line
    assert figures["ratio_to_zoom"]["zoom"] == 1
    assert f"torch {torch.__version__}" in result.output.replace("\n", " ")


def test_the_three_ways_to_cut_see_the_same() -> None:
    images = random_images(96)[:2].float()
    # A box at whole pixels, enlarged: but for mask and border, all three are the same bilinear crop.
    boxes = torch.tensor([[0.5, 0.5, 0.25], [0.375, 0.5, 0.25]])
    cut = zoom(images, boxes, 96, k=math.inf)
    torch.testing.assert_close(crop.grid_sample(images, boxes, 96), cut, atol=1e-5, rtol=0)
    soft = zoom(images, boxes, 96, k=crop.K)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    torch.testing.assert_close(crop.one_by_one(images, boxes, 96)[inner], soft[inner], atol=0.03, rtol=0)


def random_images(side: int) -> torch.Tensor:
    drawn = [torch.from_numpy(draw(label, size=side, seed=3, index=label)[0].copy()) for label in range(4)]
    return torch.stack(drawn).permute(0, 3, 1, 2).double() / 127.5 - 1


def test_the_true_gradient_agrees_with_differences_and_the_aliased_mask_does_not() -> None:
    images, boxes, _ = gradient.draw(random_images(160), 40, seed=0)
    counts = gradient.agreement(images, boxes.double(), 48, gradient.linear(48, seed=0))
    figures = gradient.summary({"A": counts}, 40)
    share = {(r["gradient"], r["k"]): r["A_6px"] for r in figures.values["rows"]}
    for axis in gradient.AXES:
        assert share["exact", 0.5][axis] >= 0.75
        assert share["bilinear", "inf"][axis] >= 0.75
        assert share["exact", 0.5][axis] > share["boxcar", 10.0][axis] + 0.1


def test_agreement_is_a_matter_of_sign() -> None:
    """On a ramp every sign is known; on a flat image the derivative of 0 agrees with nothing."""
    images, boxes, _ = gradient.draw(random_images(96), 6, seed=1)
    ramp = torch.linspace(-1, 1, 96, dtype=torch.float64).expand(6, 3, 96, 96)
    counts = gradient.agreement(ramp, boxes.double(), 24, lambda crops: crops.mean(dim=(1, 2, 3)))
    by = dict(zip(gradient.CHOICES, counts.tolist(), strict=True))
    assert [step[0] for step in by["bilinear", math.inf]] == [6, 6]  # brighter to the right, for every box
    flat = gradient.agreement(
        torch.zeros_like(images), boxes.double(), 24, lambda crops: crops.mean(dim=(1, 2, 3))
    )
    assert flat.sum() == 0


def test_a_backbone_trains_every_stage_and_exports() -> None:
    figures = backbones.measure({"test_resnet": (64, 64, 64)})
    for entry in figures.values["models"]:
        assert entry["error"] == ""
        assert list(entry["milliseconds"]) == list(backbones.STAGES)
        assert 0 <= entry["onnx_difference"] < 1e-3
    assert figures.values["models"][0]["sizes"] == [64, 64, 64]
    assert figures.tables[0].row_count == 1


def test_a_backbone_that_fails_is_a_line_of_the_table() -> None:
    found = backbones.measure({"test_vit": (100, 100, 100), "resnet18x": ()}).values["models"]
    assert "100" in found[0]["error"]
    assert "resnet18x" in found[1]["error"]


def test_an_exported_run_passes_its_check_and_is_timed() -> None:
    figures = export.measure({"test_resnet": 64, "resnet18x": 64})
    entry, missing = figures.values["models"]
    assert entry["error"] == ""
    assert entry["agreement"] == [40, 40]  # twenty in the export, twenty more in the check
    assert max(entry["max_difference"].values()) < 1e-3
    assert entry["int8_bytes"] < 0.5 * entry["bytes"]
    assert min(entry["over_torch"], entry["int8_over_float32"]) > 0
    assert "resnet18x" in missing["error"]
    assert figures.tables[0].row_count == 2


def test_a_frozen_tensor_that_moves_is_found(monkeypatch) -> None:
    honest = backbones.freeze_all_but

    def leaky(model, moving):
        parameters = honest(model, moving)
        model.scale(1).backbone.train()  # its BatchNorm statistics drift: the classical error
        return parameters

    monkeypatch.setattr(backbones, "freeze_all_but", leaky)
    monkeypatch.setattr(backbones, "STAGES", {"APN phase": stages.apn_phase})
    error = backbones.one("test_resnet", (64, 64, 64))["error"]
    assert "frozen tensors moved" in error
    assert "scales.1" in error


def test_a_paired_interval_is_that_of_the_t_test() -> None:
    ours, theirs = [0.9, 0.86, 0.95, 0.9, 0.81], [0.86, 0.86, 0.9, 0.95, 0.76]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = seeds.paired(ours, theirs)
    assert found["interval"] == pytest.approx([low, high], rel=1e-5)
    assert seeds.paired([0.9], [0.8])["interval"] is None


def test_seeds_with_a_baseline_are_compared_in_pairs() -> None:
    found = [
        {"seed": seed, "images": 21, "split": "test", "seconds": 60.0, "baseline_seconds": 30.0}
        | {"top1": {"baseline": low, "scale 1": 0.8, "average": 0.85, "fused": high}}
        for seed, (low, high) in enumerate([(0.8, 0.9), (0.7, 0.9), (0.9, 0.9)])
    ]
    values = seeds.summary("demo", found).values
    assert values["mean"]["fused"] == pytest.approx(0.9)
    assert values["deviation"]["baseline"] == pytest.approx(0.1)
    assert values["fused_minus_baseline"]["mean"] == pytest.approx(0.1)
    assert values["fused_minus_baseline"]["interval"][0] == pytest.approx(
        0.1 - 4.302653 * 0.1 / 3**0.5, rel=1e-4
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`bench seeds` on two seeds, once for all tests that look at it."""
    folder = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["bench", "seeds", "--recipe", "tiny", "--quick", "--seeds", "0-1", "--json", "f.json"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (result.output, result.exception)
    return folder, result.output


def test_seeds_trains_each_seed_and_says_what_its_runs_say(trained) -> None:
    folder, output = trained
    figures = json.loads((folder / "f.json").read_text())
    assert figures["seeds"] == [0, 1]
    fused = []
    for entry in figures["runs"]:
        run = Run(folder / entry["run"])
        assert run.folder == folder / "runs" / "bench-tiny-quick" / f"seed-{entry['seed']}"
        assert run.recipe().seed == entry["seed"]
        assert list(entry["top1"]) == ["scale 1", "scale 2", "scale 3", "average", "fused"]
        assert entry["top1"]["fused"] == run.read_eval().to_json()["fused"]["top1"]
        assert entry["seconds"] > 0
        fused.append(entry["top1"]["fused"])
    assert figures["mean"]["fused"] == pytest.approx(sum(fused) / 2)
    assert "fused_minus_baseline" not in figures
    assert f"{figures['mean']['fused']:.3f}" in output


def test_a_finished_seed_is_not_trained_again_and_an_interrupted_one_goes_on(
    trained, tmp_path, monkeypatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    monkeypatch.chdir(folder)
    place = folder / "runs" / "bench-tiny-quick"
    first, second = Run(place / "seed-0"), Run(place / "seed-1")
    write_json(
        first.eval,
        first.read_eval().to_json() | {"fused": first.read_eval().to_json()["fused"] | {"top1": 0.12345}},
    )
    whole = second.read_eval().to_json()
    second.eval.unlink()
    found = seeds.run(Options((0, 1), "tiny", True)).values["runs"]
    assert found[0]["top1"]["fused"] == 0.12345
    assert second.read_eval().to_json()["fused"] == whole["fused"]
    # Another recipe's figures are not passed off as this one's.
    text = first.recipe_file.read_text().replace("batch = 16", "batch = 8")
    first.recipe_file.write_text(text)
    with pytest.raises(RacnnError, match=r"train\.batch is 8 there and 16 here"):
        seeds.run(Options((0,), "tiny", True))


def test_the_names_are_known_without_torch() -> None:
    import subprocess

    code = "import sys, racnn_cli.bench; print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


# ---- growth


def test_growth_counts_what_a_phase_computes(here) -> None:
    two = {"model.scales": 2, "model.sizes": [64, 64], "data.source": 64, "train.device": "cpu"}
    recipe = resolve(recipes.load("tiny").override(two))
    found = growth.measure(recipe)
    cost = {phase.name: phase for phase in found.phases}
    assert [phase.epochs for phase in found.phases] == [
        recipe.pretrain_cnn.epochs,
        recipe.pretrain_apn.epochs,
        recipe.alternate.cnn_epochs_in(recipe.alternate.rounds),
        recipe.alternate.rounds * recipe.alternate.apn_epochs,
        recipe.fusion.epochs,
    ]
    # Two equal scales: a CNN phase is scale 1 twice, and the crop and the APN between them.
    assert 1.95 < cost["alternate: CNN phase"].operations / cost["pretrain-cnn"].operations < 2.1
    # Nothing moves there but the head: a third of the CNN phase, and 10,000 outputs.
    assert 2.5 < cost["alternate: CNN phase"].operations / cost["alternate: fusion head"].operations < 3.1
    model = build(recipe.model, growth.CLASSES, source=recipe.data.source)
    first = model.scale(0)
    weights = sum(p.numel() for part in (first.backbone, first.classifier) for p in part.parameters())
    assert cost["pretrain-cnn"].message == 4 * weights
    assert found.checkpoint > 4 * sum(p.numel() for p in model.parameters()) + cost["pretrain-cnn"].message
    assert min(found.read, found.checked, found.disk, *(phase.seconds for phase in found.phases)) > 0
    assert found.checked > found.read
    assert 200 < found.listed < 2000
    assert not list(here.iterdir())


def measured(**changes) -> growth.Measured:
    phase = growth.Phase("alternate: CNN phase", 10, 10**9, 0.001, 10**8)
    given = {
        "phases": (phase,),
        "images": 50,
        "read": 100.0,
        "checked": 1000.0,
        "listed": 700.0,
        "checkpoint": 10**8,
        "disk": 1e9,
    }
    return growth.Measured(**(given | {"forward": 10**8} | changes))


def test_growth_by_hand() -> None:
    """One GPU: 10 epochs, 1e9 operations an image at 1e12 a second, 16 cores that read 100 a second each."""
    found = growth.estimate(measured(), 1, 1, 1e12)
    assert found["images_per_second"] == pytest.approx(1000)
    assert found["bottleneck"] == "computing"
    hours = {name: value * 3600 for name, value in found["parts"].items()}
    assert hours["computing"] == pytest.approx(10 * growth.TRAIN / 1000)
    assert (hours["reading"], hours["messages"]) == (0, 0)
    assert hours["checkpoints"] == pytest.approx(10 * 0.1)
    assert hours["evaluation"] == pytest.approx(growth.VAL / 1600 + growth.VAL / 4000)
    assert found["hours"] == pytest.approx(sum(found["parts"].values()))
    fast = growth.estimate(measured(), 1, 1, 1e14)
    assert (fast["bottleneck"], fast["images_per_second"]) == ("reading", pytest.approx(1600))
    assert growth.estimate(measured(), 1, 1, 0)["images_per_second"] == pytest.approx(1000)  # as timed
    apart = growth.estimate(measured(images=1), 2, 1, 1e12)
    assert apart["bottleneck"] == "messages"
    assert apart["images_per_second"] == pytest.approx(2 / (0.001 + 1e8 / growth.NETWORK))


def test_growth_prints_every_layout(here, monkeypatch, racnn) -> None:
    monkeypatch.setattr(growth, "measure", lambda recipe: measured())
    code, out, err = racnn("bench", "growth", "--recipe", "tiny", "--json", "growth.json")
    assert code == 0, err
    rows = json.loads((here / "growth.json").read_text())["layouts"]
    assert {row["layout"] for row in rows} == set(growth.LAYOUTS)
    for row in rows:
        line = next(line for line in out.splitlines() if f"{row['images_per_second']:,.0f} " in line)
        assert row["bottleneck"] in line
