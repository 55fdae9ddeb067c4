"""`bench attention` and `bench ablation`: the arms do what they claim, and finished arms are not trained again."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from racnn_cli import recipe as recipes
from racnn_cli.bench import Options, ablation, arms, attention, boxes, folds, run_bench
from racnn_cli.bench.arms import LEARNED, SeedExperiment
from racnn_cli.bench.records import ArmResult, Metrics
from racnn_cli.bench.summary import ABOVE, Claim
from racnn_cli.cli import app
from racnn_cli.core.attention import compose
from racnn_cli.core.metrics import iou
from racnn_cli.core.model import build, resolve
from racnn_cli.data.datasets.clutter import Clutter
from racnn_cli.errors import DataError, RecipeError, RunError
from racnn_cli.run import Run
from racnn_cli.training import compute, stages
from racnn_cli.training.phases import BoxSource, pretrain_apn
from racnn_cli.training.trainer import Trainer

RECIPE = """
about = "the smallest recipe with every stage"
[data]
path = "clutter"
source = 160
val = 0.25
test = 0.3
[data.sample]
images = 40
[model]
backbone = "small_cnn"
weights = "none"
scales = 3
sizes = [32, 32, 32]
[train]
batch = 16
[pretrain_cnn]
epochs = 1
lr = 3e-3
[pretrain_apn]
epochs = 1
[alternate]
rounds = 2
cnn_epochs = 1
apn_epochs = 1
apn_lr = 1e-2
apn_gradient = "perturb"
boxes = 2
jitter = 0.2
tighten = 0.4
settle = true
[fusion]
epochs = 1
"""
WORDS = ["bench", "attention", "--recipe", "mini.toml", "--data", "items", "--seeds", "3-4"]
BENCH_FOLDER = Path("runs") / "bench-attention-mini"


def write_items(folder: Path) -> None:
    """Four IDX files: bars whose number is the label, so that there is something to learn."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 120), ("t10k", 60)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        photographs = rng.integers(0, 40, (count, 28, 28)).astype(np.uint8)
        for photograph, label in zip(photographs, labels, strict=True):
            photograph[4 : 6 + 2 * label, 4:24] = 220
        for name, array in ((f"{part}-images-idx3", photographs), (f"{part}-labels-idx1", labels)):
            head = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{name}-ubyte").write_bytes(head + array.tobytes())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The bench on two seeds, run once for all tests: its folder and its output."""
    folder = tmp_path_factory.mktemp("attention")
    write_items(folder / "items")
    (folder / "mini.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, [*WORDS, "--json", "f.json"])
        assert result.exit_code == 0, (result.output, result.exception)
    return folder, result.output


@pytest.fixture
def copy(bench, tmp_path, monkeypatch):
    """A copy of its folder, to work in."""
    shutil.copytree(bench[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def read_results(folder: Path) -> dict:
    return json.loads((folder / "f.json").read_text())


def test_the_table_and_the_file_agree(bench) -> None:
    folder, output = bench
    results = read_results(folder)
    assert (results["bench"], results["recipe"], results["seeds"]) == ("attention", "mini", [3, 4])
    assert results["images"] == 12
    with_boxes = [attention.TRUE_AT_TEST, "boxes taught", "true boxes", "random boxes"]
    assert list(results["arms"]) == ["learned", *with_boxes, "plain", "plain, equal compute"]
    for name, answers in results["arms"].items():
        all_answers = ["scale 1", "scale 2", "scale 3", "average", "fused"]
        assert list(answers) == (["scale 1"] if name.startswith("plain") else all_answers)
        row = next(line for line in output.splitlines() if re.match(rf"│ {re.escape(name)} +│", line))
        for answer, value in answers.items():
            each = [entry["arms"][name]["top1"][answer] for entry in results["runs"]]
            assert value["mean"] == pytest.approx(np.mean(each))
            assert value["deviation"] == pytest.approx(np.std(each, ddof=1))
            assert f"{value['mean']:.3f} ±{value['deviation']:.3f}" in row
    assert [claim["count"] for claim in results["claims"]].count(None) == 3
    for claim in results["claims"]:
        row = next(line for line in output.splitlines() if f"│ {claim['claim']} " in line)
        assert f"{claim['mean']:.3f}" in row


def test_boxes_are_measured_after_every_stage_and_phase(bench) -> None:
    folder, output = bench
    results = read_results(folder)
    phases = ["CNN phase, round 1", "APN phase, round 2", "CNN phase, round 2"]
    milestones = ["pretrain-cnn", "pretrain-apn", *(f"alternate: {phase}" for phase in phases), "alternate"]
    assert [entry["moment"] for entry in results["moments"]] == milestones
    assert [entry["epochs"] for entry in results["moments"]] == [1, 2, 3, 4, 5, 6]
    for entry in results["moments"]:
        assert len(entry["test"]["boxes"]) == 2
        finest = entry["test"]["boxes"][-1]["iou_mean"]
        row = next(
            line
            for line in output.splitlines()
            if re.match(rf"│ {entry['moment'].removeprefix('alternate: ')} +│ *\d", line)
        )
        assert f"{finest['mean']:.3f} ±{finest['deviation']:.3f}" in row
    # On the validation split: as in the log, at the end of a phase.
    for entry in results["runs"]:
        epochs = Run(folder / entry["folder"] / "learned").epochs()
        last = next(epoch for epoch in reversed(epochs) if epoch.phase == "APN phase")
        learned = entry["arms"]["learned"]["moments"]
        milestone = next(milestone for milestone in learned if "APN phase" in milestone["moment"])
        assert milestone["val"]["rank"] == last.val.rank
        assert milestone["val"]["top1"]["scale 2"] == last.val.scales[1].top1
        end = next(milestone for milestone in learned if milestone["moment"] == "alternate")
        assert end["test"]["boxes"] == entry["arms"]["learned"]["boxes"]


def test_claims_compare_the_results(bench) -> None:
    results = read_results(bench[0])
    claims = {claim["claim"]: claim for claim in results["claims"]}
    gains = []
    for entry in results["runs"]:
        learned = entry["arms"]["learned"]
        gains.append(learned["boxes"][1]["iou_mean"] - learned["moments"][1]["test"]["boxes"][1]["iou_mean"])
    claim = claims["IoU of the finest box, end - after pretrain-apn"]
    assert claim["mean"] == pytest.approx(np.mean(gains))
    assert claim["count"] == [sum(gain >= 0.1 for gain in gains), 2]


def test_a_seed_counts_if_it_reaches_the_target() -> None:
    seeds = [{name: ArmResult(top1={"scale 1": top1}) for name, top1 in (("a", 0.5), ("b", b))} for b in (0.5, 0.4)]

    def pair(arms: dict[str, ArmResult]) -> tuple[float, float]:
        return arms["a"].final, arms["b"].final

    assert Claim("", "", pair, margin=0.0).measure(seeds)["count"] == [2, 2]
    assert Claim("", "", pair, margin=ABOVE).measure(seeds)["count"] == [1, 2]
    assert Claim("", "", pair, margin=0.1).measure(seeds)["count"] == [1, 2]
    assert Claim("", "", pair, ratio=True).measure(seeds)["mean"] == pytest.approx(1.125)


def test_each_arm_is_trained_as_described(bench) -> None:
    seed = bench[0] / BENCH_FOLDER / "seed-3"
    true_boxes = Run(seed / "true-boxes")
    assert true_boxes.recipe().alternate.apn_epochs == 0
    assert true_boxes.recipe().alternate.jitter == 0
    assert [epoch.phase for epoch in true_boxes.epochs()] == ["", "CNN phase", "CNN phase", "fusion head"]
    # One pretrain-cnn for all: the log of the learned arm continues in the others.
    first = [Run(seed / arm).read_log()[0] for arm in ("learned", "true-boxes", "random-boxes")]
    assert first[0] == first[1] == first[2]
    results = read_results(bench[0])["runs"][0]["arms"]
    assert results["true boxes"]["boxes"][1]["iou_mean"] > 0.95
    assert results[attention.TRUE_AT_TEST]["boxes"] == results["true boxes"]["boxes"]
    assert results["random boxes"]["boxes"][1]["side_mean"] == pytest.approx(
        results["true boxes"]["boxes"][1]["side_mean"], rel=0.01
    )
    assert results["random boxes"]["boxes"][1]["iou_mean"] < 0.3
    taught = [epoch.train_loss for epoch in Run(seed / "boxes-taught").epochs()]
    assert taught[1].keys() == taught[3].keys() == {"box 2", "box 3"}  # pretrain-apn and the APN phase
    assert results["learned"]["choices"][-2]["unit"] == "round"
    plain = Run(seed / "plain").recipe()
    assert (plain.model.scales, plain.model.sizes, plain.pretrain_cnn.epochs) == (1, (32,), 3)
    assert Run(seed / "plain-equal-compute").recipe().model.sizes == (results["plain, equal compute"]["size"],)
    assert not (bench[0] / "runs" / "latest").exists()  # two processes would fight over it


def test_a_finished_arm_is_not_trained_again(copy) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("runs/**/*") if file.is_file()}
    shutil.rmtree(copy / "items")  # not even read
    run_bench("attention", json_path=copy / "again.json", seeds="3-4", recipe="mini.toml", data="items")
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("runs/**/*") if file.is_file()} == before
    again = json.loads((copy / "again.json").read_text())
    assert again == read_results(copy)


def test_an_interrupted_arm_continues_to_the_same_results(copy, monkeypatch) -> None:
    shutil.rmtree(BENCH_FOLDER / "seed-3")
    run_stage = stages.run_stage

    def interrupt_alternate(trainer: Trainer, name: str) -> None:
        if name == "alternate":
            raise KeyboardInterrupt
        run_stage(trainer, name)

    options = Options((3,), "mini.toml", data="items")
    monkeypatch.setattr(stages, "run_stage", interrupt_alternate)
    with pytest.raises(KeyboardInterrupt):
        attention.run(options)
    monkeypatch.setattr(stages, "run_stage", run_stage)
    results = attention.run(options).values["runs"][0]["arms"]
    for name, arm in read_results(copy)["runs"][0]["arms"].items():
        assert results[name]["top1"] == arm["top1"], name
        assert results[name].get("boxes") == arm.get("boxes")


def test_a_changed_recipe_is_refused(copy) -> None:
    (copy / "mini.toml").write_text(RECIPE.replace("apn_lr = 1e-2", "apn_lr = 2e-2"))
    with pytest.raises(RunError, match=r"alternate\.apn_lr is 0\.01 there and 0\.02 here"):
        attention.run(Options((3,), "mini.toml", data="items"))


def test_the_ablation_shares_the_learned_arm_and_its_start(copy) -> None:
    learned = BENCH_FOLDER / "seed-3" / "learned" / "bench.json"
    before = learned.stat().st_mtime_ns
    result = CliRunner().invoke(
        app, ["bench", "ablation", *WORDS[2:-1], "3", "--json", "ablation.json"], catch_exceptions=False
    )
    assert learned.stat().st_mtime_ns == before
    results = json.loads((copy / "ablation.json").read_text())
    assert list(results["arms"]) == [arm.name for arm in ablation.ARMS]
    assert results["arms"]["default"]["fused"]["mean"] == pytest.approx(
        json.loads(learned.read_text())["top1"]["fused"]
    )
    for name, arm in results["arms"].items():
        row = next(line for line in result.output.splitlines() if re.match(rf"│ {re.escape(name)} +│", line))
        assert f"{arm['fused']['mean']:.3f}" in row
        difference = arm["fused"]["mean"] - results["arms"]["default"]["fused"]["mean"]
        assert arm["fused_minus_default"]["mean"] == pytest.approx(difference)
    recipes = [Run(BENCH_FOLDER / "seed-3" / folder).recipe() for folder in ("mask-gradient", "nested-crops")]
    assert [(recipe.model.gradient, recipe.model.zoom) for recipe in recipes] == [
        ("boxcar", "source"),
        ("exact", "nested"),
    ]
    centre = Run(BENCH_FOLDER / "seed-3" / "start-from-the-centre")
    assert "pretrain-apn" not in {epoch.stage for epoch in centre.epochs()}
    assert (results["recovered"]["count"][1], result.exit_code) == (1, 0)


def test_the_fusions_are_compared_on_the_same_networks(copy) -> None:
    learned = BENCH_FOLDER / "seed-3" / "learned"
    before = {file: file.read_bytes() for file in learned.iterdir() if file.is_file()}
    result = CliRunner().invoke(app, ["bench", "fusion", *WORDS[2:], "--json", "fusion.json"], catch_exceptions=False)
    assert {file: file.read_bytes() for file in learned.iterdir() if file.is_file()} == before
    results = json.loads((copy / "fusion.json").read_text())
    for entry in results["runs"]:
        top1 = json.loads((Path(entry["folder"]) / "learned" / "bench.json").read_text())["top1"]
        assert entry["head"]["top1"] == top1["fused"]
        assert entry["average"]["top1"] == top1["average"]
        assert (len(entry["weights"]["mixture"][0]), len(entry["both"]["mixture"][0])) == (3, 4)
        for kind in ("weights", "both"):
            assert sum(entry[kind]["mixture"][0]) == pytest.approx(1, abs=1e-5)
    for kind, row in results["fusions"].items():
        line = next(line for line in result.output.splitlines() if re.match(rf"│ {kind} +│", line))
        assert f"{row['top1']['mean']:.3f} ±{row['top1']['deviation']:.3f}" in line


# ---- folds


def test_folds_hold_every_training_image_once_and_no_test_image(here) -> None:
    rows = [
        f"{split}/{name}{number}.png,{name},{split}"
        for split, count in (("train", 7), ("val", 2), ("test", 4))
        for name in ("a", "b", "c")
        for number in range(count)
    ]
    for row in rows:
        file = here / row.split(",")[0]
        file.parent.mkdir(exist_ok=True)
        file.touch()  # only listed
    (here / "labels.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    files = folds.write_folds(recipes.load("own").override({"data.path": "labels.csv"}).data, here / "folds")
    contents = [list(csv.DictReader(file.open())) for file in files]
    tested = [row["path"] for content in contents for row in content if row["split"] == "test"]
    assert sorted(tested) == sorted(str(here / row.split(",")[0]) for row in rows if not row.startswith("test"))
    for content in contents:
        assert len({row["path"] for row in content}) == 27
        assert Counter((row["label"], row["split"]) for row in content if row["split"] == "test") == {
            (name, "test"): 3 for name in "abc"
        }
        assert sum(row["split"] == "val" for row in content) == 1  # a tenth of 18
    assert folds.write_folds(recipes.load("own").override({"data.path": "labels.csv"}).data, here / "folds") == files
    (here / "labels.csv").write_text("path,label\ntrain/a0.png,a\ntrain/a1.png,a\ntrain/b0.png,b\n")
    with pytest.raises(DataError, match="3 folds need 3 images of each class; too few of a, b"):
        folds.write_folds(recipes.load("own").override({"data.path": "labels.csv"}).data, here / "few")


def test_settings_are_compared_on_folds(here) -> None:
    from blobs import write_blobs

    write_blobs(here / "blobs", {"train": 12})
    text = RECIPE.replace('"clutter"', '"blobs"').replace("source = 160", "source = 64")
    (here / "blobs.toml").write_text(text)
    words = ["bench", "folds", "--recipe", "blobs.toml", "--data", "blobs", "--json", "f.json"]
    arms_ = ["--arm", "twice the epochs", "--arm", "plain, equal compute"]
    result = CliRunner().invoke(app, [*words, *arms_], catch_exceptions=False)
    results = read_results(here)
    expected = ["plain", "twice the epochs", "all scales", "plain, equal compute"]
    assert list(results["arms"]) == expected
    folder = Path("runs/bench-folds-blobs/fold-1")
    used = {name: Run(folder / name).recipe() for name in ("plain", "twice-the-epochs", "learned")}
    assert [recipe.model.scales for recipe in used.values()] == [1, 1, 3]
    assert (used["plain"].pretrain_cnn.epochs, used["twice-the-epochs"].pretrain_cnn.epochs) == (1, 2)
    for name, row in results["arms"].items():
        assert row["top1"]["n"] == 3
        line = next(line for line in result.output.splitlines() if re.match(rf"│ {re.escape(name)} +│", line))
        assert f"{row['top1']['mean']:.3f} ±{row['top1']['deviation']:.3f}" in line
    difference = results["arms"]["all scales"]["difference"]["mean"]
    means = [results["arms"][name]["top1"]["mean"] for name in ("all scales", "plain, equal compute")]
    assert difference == pytest.approx(means[0] - means[1])
    assert (
        results["arms"]["plain, equal compute"]["training"]["mean"] >= results["arms"]["all scales"]["training"]["mean"]
    )
    with pytest.raises(RecipeError, match="no arm 'label smothing'; did you mean label smoothing"):
        folds.select_arms(["label smothing"])


# ---- boxes


def batch(count: int = 64, sides: tuple[float, float] = (0.12, 0.3)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = sides[0] + (sides[1] - sides[0]) * torch.rand(count, 1, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (1 - side)
    return {"box": torch.cat([corner, corner + side], dim=1), "index": torch.arange(count)}


@pytest.mark.parametrize(("scales", "sides"), [(2, (0.34, 0.9)), (3, (0.12, 0.9)), (4, (0.04, 0.8))])
def test_true_boxes_hold_the_item_and_end_at_it(scales, sides) -> None:
    images = batch(sides=sides)
    proposals = boxes.true_boxes(scales, 1 / 3, 0.95)(images)
    assert len(proposals) == scales - 1
    box = torch.tensor([0.5, 0.5, 0.5]).expand(64, 3)
    for proposal in proposals:
        assert ((2 * proposal[:, 2] > 1 / 3 - 1e-6) & (2 * proposal[:, 2] < 0.95 + 1e-6)).all()
        box = compose(box, proposal)
        low, high = box[:, :2] - box[:, 2:], box[:, :2] + box[:, 2:]
        assert (low > -1e-5).all()
        assert (high < 1 + 1e-5).all()
        assert (low < images["box"][:, :2] + 1e-5).all()
        assert (high > images["box"][:, 2:] - 1e-5).all()
    assert iou(box, images["box"]).min() > 0.99


def test_a_coarse_box_is_as_tight_as_the_bounds_allow() -> None:
    first, _ = boxes.true_boxes(3, 1 / 3, 0.95)(batch())
    torch.testing.assert_close(2 * first[:, 2], torch.full((64,), 1 / 3))
    images = batch(sides=(0.02, 0.1))  # smaller than two zooms can show
    torch.testing.assert_close(2 * boxes.true_boxes(3, 1 / 3, 0.95)(images)[1][:, 2], torch.full((64,), 1 / 3))


def test_an_image_without_a_box_gets_the_largest_boxes() -> None:
    images = batch(2)
    images["box"][1] = torch.nan
    for proposal in boxes.true_boxes(3, 1 / 3, 0.95)(images):
        torch.testing.assert_close(proposal[1], torch.tensor([0.5, 0.5, 0.475]))


def test_a_target_is_the_item_wherever_the_scale_looks() -> None:
    images = batch(sides=(0.12, 0.2))
    target = boxes.true_targets(3, 1 / 3, 0.95)
    centre = (images["box"][:, :2] + images["box"][:, 2:]) / 2
    parent = torch.cat([0.25 + 0.5 * centre, torch.full((64, 1), 0.25)], dim=1)  # off centre
    reached = (images["box"][:, 2] - images["box"][:, 0]) > 0.5 / 3  # no smaller than the floor allows
    reached &= (0.5 * centre - 0.25).abs().amax(dim=1) < 0.15  # and inside the parent
    assert reached.sum() > 5
    assert iou(compose(parent, target(images, parent, 1)), images["box"])[reached].min() > 0.99
    # Outside of what the scale sees: the nearest box to it.
    away = torch.tensor([0.2, 0.2, 0.1]).expand(64, 3)
    outside = target({"box": torch.tensor([0.7, 0.1, 0.9, 0.3]).expand(64, 4)}, away, 1)
    torch.testing.assert_close(outside[0], torch.tensor([0.525, 0.5, 0.475]))


def test_apns_learn_their_targets() -> None:
    """From features that show the position: a bright square on black, with its box as the target."""
    recipe = recipes.load("clutter", (), {"model.scales": 2, "pretrain_apn.lr": 1e-2})
    model = build(resolve(recipe).model, 2, source=160)
    samples = batch(32, sides=(0.34, 0.5))
    image = torch.zeros(32, 3, 160, 160)
    for canvas, (left, top, right, bottom) in zip(image, (160 * samples["box"]).int().tolist(), strict=True):
        canvas[:, top:bottom, left:right] = 1
    phase = pretrain_apn(resolve(recipe), BoxSource(targets=boxes.true_targets(2, 1 / 3, 0.95)))
    modules = phase.modules(model)
    optimizer = torch.optim.AdamW(modules[0].parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        squares = {"image": image, "label": torch.zeros(32), **samples}
        ((name, loss),) = phase.losses(model, modules, squares)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert name == "box 2"
    assert losses[-1] < 0.3 * losses[0]
    assert [parameter.grad for parameter in model.scale(0).backbone.parameters()] == [None] * 12


def test_random_boxes_have_the_true_sides_and_fixed_positions() -> None:
    images = batch(400)
    guide = boxes.true_boxes(3, 1 / 3, 0.95)
    true = guide(images)
    random = boxes.random_boxes(guide, seed=7)(images)
    for one, other in zip(random, true, strict=True):
        torch.testing.assert_close(one[:, 2], other[:, 2])
        assert (one[:, :2] - one[:, 2:]).min() > -1e-6
        assert (one[:, :2] + one[:, 2:]).max() < 1 + 1e-6
    # Uniform over where it may lie, whatever the image holds.
    free = (random[0][:, :2] - random[0][:, 2:]) / (1 - 2 * random[0][:, 2:])
    assert free.mean().item() == pytest.approx(0.5, abs=0.05)
    assert free.std().item() == pytest.approx(12**-0.5, abs=0.03)
    # The same image in another batch, at another epoch.
    subset = {name: value[[5, 3]] for name, value in images.items()}
    for one, again in zip(random, boxes.random_boxes(guide, seed=7)(subset), strict=True):
        torch.testing.assert_close(one[[5, 3]], again)
    other = boxes.random_boxes(guide, seed=8)(images)
    assert (other[0] - random[0]).abs().max() > 0.1


# ---- compute


def test_the_plain_backbone_costs_at_least_as_much_as_all_scales() -> None:
    recipe = resolve(recipes.load("clutter"))
    size = compute.equal_size(recipe, 10)
    target = compute.prediction_flops(recipe, 10)
    costs = [compute.prediction_flops(compute.plain(recipe, side), 10) for side in (size - 4, size)]
    assert costs[0] < target <= costs[1]  # 4: the backbone's stride
    assert size % 4 == 0


def test_the_table_states_the_compute_and_the_epochs_that_were_kept(bench) -> None:
    folder, output = bench
    results = read_results(folder)
    learned, equal = (results["compute"][arm] for arm in ("learned", "plain, equal compute"))
    assert equal["prediction"]["mean"] >= learned["prediction"]["mean"]
    assert equal["training"]["mean"] >= learned["training"]["mean"]
    text = " ".join(output.split())
    training, prediction = learned["training"]["mean"] / 1e12, learned["prediction"]["mean"] / 1e6
    assert f"learned: {prediction:,.1f} MFLOPs per prediction, {training:,.3g} TFLOPs of training" in text
    choices = [entry["arms"]["learned"]["choices"][1] for entry in results["runs"]]
    kept, last = (np.mean([choice[f"{which}_val"]["top1"] for choice in choices]) for which in ("kept", "last"))
    assert f"learned: the round that was kept has {kept:.3f} on validation images, the last one {last:.3f}" in text


def test_every_arm_has_its_own_learning_rate_from_the_choosing_seeds(copy, monkeypatch) -> None:
    trained: list[tuple[int, str, float]] = []

    def run_arm(self: SeedExperiment, arm: arms.Arm) -> ArmResult:
        """The validation accuracy has its best value at twice the recipe's rate, of plain backbones at four times."""
        lr = arm.lr(self.recipe_of(arm)) if not arm.plain else float(arm.changes.get("pretrain_cnn.lr", 3e-3))
        trained.append((self.seed, arm.name, lr))
        best = 1.2e-2 if arm.plain else 2e-4
        top1 = {"scale 1": 0.5 - abs(np.log2(lr / best)) / 100}
        return ArmResult(top1=top1, val=Metrics(top1=top1))

    monkeypatch.setattr(SeedExperiment, "run_arm", run_arm)
    chosen, grid = attention.choose_learning_rates(Options((3,), "mini.toml", data="items", choose=(7, 8)))
    assert len(trained) == 2 * 4 * len(attention.ARMS)
    assert {seed for seed, *_ in trained} == {7, 8}
    for arm, rates in zip(chosen, grid.values(), strict=True):
        assert len(rates) == 4
        expected = {"pretrain_cnn.lr": 1.2e-2} if arm.plain else {"alternate.cnn_lr": 2e-4}
        assert arm.changes.items() >= expected.items()
        assert arm.folder_name.endswith("-lr-0.012" if arm.plain else "-lr-0.0002")
    with pytest.raises(RecipeError, match="seed 3 is in --choose and in --seeds"):
        run_bench("attention", seeds="3-4", choose="2-3", recipe="mini.toml")


# ---- other data, and what is refused


def test_drawn_images_have_boxes(here) -> None:
    text = RECIPE.replace('"clutter"', '"fieldguide"').replace("[data.sample]", "[data.sample]\nsize = 64")
    (here / "drawn.toml").write_text(text.replace("source = 160", "source = 64"))
    seed = SeedExperiment(Options((0,), "drawn.toml", quick=True), 0)
    seed.run_arm(LEARNED)
    assert seed.run_arm(attention.TRUE).boxes[-1].coverage_mean > 0.95


def test_images_without_boxes_are_refused(here) -> None:
    from blobs import write_blobs

    write_blobs(here / "blobs")
    (here / "blobs.toml").write_text(RECIPE.replace('"clutter"', '"blobs"'))
    with pytest.raises(DataError, match="no ground-truth boxes in its test split"):
        SeedExperiment(Options((0,), "blobs.toml"), 0).source  # noqa: B018
    with pytest.raises(DataError, match="no ground-truth boxes in its test split"):
        attention.run(Options((0,), "blobs.toml"))
    (here / "one.toml").write_text(RECIPE.replace("scales = 3", "scales = 1").replace("[32, 32, 32]", "[32]"))
    with pytest.raises(RecipeError, match="one scale"):
        SeedExperiment(Options((0,), "one.toml"), 0)


def test_an_ablation_of_some_arms_needs_no_boxes(here) -> None:
    from blobs import write_blobs

    write_blobs(here / "blobs")
    (here / "blobs.toml").write_text(RECIPE.replace('"clutter"', '"blobs"'))
    words = ["bench", "ablation", "--recipe", "blobs.toml", "--seeds", "0-1", "--json", "f.json"]
    result = CliRunner().invoke(app, [*words, "--arm", "boxes never trained"], catch_exceptions=False)
    results = read_results(here)
    assert list(results["arms"]) == ["default", "boxes never trained"]
    assert results["arms"]["default"]["fused"]["n"] == 2
    assert "iou_mean" not in results["arms"]["default"]
    assert "IoU" not in result.output
    assert "start from the centre" not in result.output
    assert not Path("runs/bench-attention-blobs/seed-0/nested-crops").exists()
    with pytest.raises(RecipeError, match="no arm 'nested crop'; did you mean nested crops"):
        ablation.select_arms(["nested crop"])
    with pytest.raises(RecipeError, match="attention takes no --arm"):
        run_bench("attention", seeds="0", arms=["no mask"])


def test_quick_and_data_reach_the_images(here, monkeypatch) -> None:
    monkeypatch.setattr(arms, "QUICK_IMAGES", 40)  # as many as there are items for
    write_items(here / "items")
    (here / "mini.toml").write_text(RECIPE.replace("images = 40", "images = 8000"))
    quick = SeedExperiment(Options((5,), "mini.toml", quick=True, data="items"), 5)
    assert quick.recipe.data.sample.images == arms.QUICK_IMAGES
    assert isinstance(quick.source, Clutter)
    assert (quick.source.folder, quick.source.seed) == (Path("items"), 5)
    assert quick.folder.parent.name == "bench-attention-mini-quick"
    with pytest.raises(RecipeError, match="gradient takes no --data"):
        run_bench("gradient", data="items")


def test_an_arm_without_the_ramp_has_as_many_cnn_epochs_in_all() -> None:
    seed = SeedExperiment(Options((0,), "clutter"), 0)
    (level,) = ablation.select_arms(["no ramp"])[1:]
    sections = [seed.recipe_of(arm).alternate for arm in (ablation.DEFAULT, level)]
    assert [(one.ramp, one.rounds, one.cnn_epochs) for one in sections] == [(True, 5, 3), (False, 4, 3)]
    assert [one.cnn_epochs_in(one.rounds) for one in sections] == [12, 12]
