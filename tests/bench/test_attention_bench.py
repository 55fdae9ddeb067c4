"""`bench attention` and `bench ablation`: the arms do what they claim, and finished arms are not trained again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from racnn_cli import recipe as recipes
from racnn_cli.bench import Options, ablation, arms, attention, boxes, compute, run_bench
from racnn_cli.bench.arms import LEARNED, SeedExperiment
from racnn_cli.bench.boxes import AnnotatedDataset, bounding_box
from racnn_cli.bench.records import ArmResult
from racnn_cli.bench.summary import ABOVE, Claim
from racnn_cli.cli import app
from racnn_cli.core.attention import compose
from racnn_cli.core.metrics import iou
from racnn_cli.core.model import build, resolve
from racnn_cli.data.datasets.clutter import Clutter
from racnn_cli.data.index import Item
from racnn_cli.errors import DataError, RecipeError, RunError
from racnn_cli.run import Run
from racnn_cli.training import stages
from racnn_cli.training.trainer import Trainer

RECIPE = """
about = "the smallest recipe with every stage"
[data]
path = "clutter"
source = 160
val = 0.25
test = 0.3
[data.sample]
images = 80
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
rounds = 1
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
PLACE = Path("runs") / "bench-attention-mini"


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
    """The bench on two seeds, once for all tests that look at it: its folder, and what it printed."""
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


def figures(folder: Path) -> dict:
    return json.loads((folder / "f.json").read_text())


def test_the_table_shows_what_the_file_holds(bench) -> None:
    folder, output = bench
    found = figures(folder)
    assert (found["bench"], found["recipe"], found["seeds"]) == ("attention", "mini", [3, 4])
    assert found["images"] == 24
    given = [attention.TRUE_AT_TEST, "boxes taught", "true boxes", "random boxes"]
    assert list(found["arms"]) == ["learned", *given, "plain", "plain, equal compute"]
    for name, answers in found["arms"].items():
        whole = ["scale 1", "scale 2", "scale 3", "average", "fused"]
        assert list(answers) == (["scale 1"] if name.startswith("plain") else whole)
        row = next(line for line in output.splitlines() if re.match(rf"│ {re.escape(name)} +│", line))
        for answer, value in answers.items():
            each = [entry["arms"][name]["top1"][answer] for entry in found["runs"]]
            assert value["mean"] == pytest.approx(np.mean(each))
            assert value["deviation"] == pytest.approx(np.std(each, ddof=1))
            assert f"{value['mean']:.3f} ±{value['deviation']:.3f}" in row
    assert [claim["count"] for claim in found["claims"]].count(None) == 3
    for claim in found["claims"]:
        row = next(line for line in output.splitlines() if f"│ {claim['claim']} " in line)
        assert f"{claim['mean']:.3f}" in row


def test_boxes_are_measured_after_every_stage_and_phase(bench) -> None:
    folder, output = bench
    found = figures(folder)
    phases = ["alternate: CNN phase, round 1", "alternate: APN phase, round 1", "alternate"]
    assert [entry["moment"] for entry in found["moments"]] == ["pretrain-cnn", "pretrain-apn", *phases]
    assert [entry["epochs"] for entry in found["moments"]] == [1, 2, 3, 4, 5]
    for entry in found["moments"]:
        assert len(entry["test"]["boxes"]) == 2
        finest = entry["test"]["boxes"][-1]["iou_mean"]
        row = next(
            line
            for line in output.splitlines()
            if re.match(rf"│ {entry['moment'].removeprefix('alternate: ')} +│ *\d", line)
        )
        assert f"{finest['mean']:.3f} ±{finest['deviation']:.3f}" in row
    # On the validation split: what the log says, a phase's last epoch.
    for entry in found["runs"]:
        log = Run(folder / entry["folder"] / "learned").read_log()
        last = next(e for e in reversed(log) if e["event"] == "epoch" and e["phase"] == "APN phase")
        moment = next(m for m in entry["arms"]["learned"]["moments"] if "APN phase" in m["moment"])
        assert moment["val"]["rank"] == last["val"]["rank"]
        assert moment["val"]["top1"]["scale 2"] == last["val"]["scales"][1]["top1"]
        end = next(m for m in entry["arms"]["learned"]["moments"] if m["moment"] == "alternate")
        assert end["test"]["boxes"] == entry["arms"]["learned"]["boxes"]


def test_the_claims_are_those_figures_compared(bench) -> None:
    found = figures(bench[0])
    claims = {claim["claim"]: claim for claim in found["claims"]}
    gains = []
    for entry in found["runs"]:
        learned = entry["arms"]["learned"]
        gains.append(learned["boxes"][1]["iou_mean"] - learned["moments"][1]["test"]["boxes"][1]["iou_mean"])
    claim = claims["IoU of the finest box, end - after pretrain-apn"]
    assert claim["mean"] == pytest.approx(np.mean(gains))
    assert claim["count"] == [sum(gain >= 0.1 for gain in gains), 2]


def test_a_seed_counts_if_it_reaches_the_target() -> None:
    seeds = [
        {name: ArmResult(top1={"scale 1": top1}) for name, top1 in (("a", 0.5), ("b", b))} for b in (0.5, 0.4)
    ]

    def pair(arms: dict[str, ArmResult]) -> tuple[float, float]:
        return arms["a"].final, arms["b"].final

    assert Claim("", "", pair, margin=0.0).measure(seeds)["count"] == [2, 2]
    assert Claim("", "", pair, margin=ABOVE).measure(seeds)["count"] == [1, 2]
    assert Claim("", "", pair, margin=0.1).measure(seeds)["count"] == [1, 2]
    assert Claim("", "", pair, ratio=True).measure(seeds)["mean"] == pytest.approx(1.125)


def test_the_arms_differ_as_they_say(bench) -> None:
    seed = bench[0] / PLACE / "seed-3"
    given = Run(seed / "true-boxes")
    assert given.recipe().alternate.apn_epochs == 0
    assert given.recipe().alternate.jitter == 0
    phases = [event.phase for event in given.read_log() if event.event == "epoch"]
    assert phases == ["", "CNN phase", "fusion head"]
    # One pretrain-cnn for all: the log of the learned arm goes on in the others.
    first = [Run(seed / arm).read_log()[0] for arm in ("learned", "true-boxes", "random-boxes")]
    assert first[0] == first[1] == first[2]
    found = figures(bench[0])["runs"][0]["arms"]
    assert found["true boxes"]["boxes"][1]["iou_mean"] > 0.95
    assert found[attention.TRUE_AT_TEST]["boxes"] == found["true boxes"]["boxes"]
    assert found["random boxes"]["boxes"][1]["side_mean"] == pytest.approx(
        found["true boxes"]["boxes"][1]["side_mean"], rel=0.01
    )
    assert found["random boxes"]["boxes"][1]["iou_mean"] < 0.3
    taught = [
        event["train_loss"] for event in Run(seed / "boxes-taught").read_log() if event["event"] == "epoch"
    ]
    assert taught[1].keys() == taught[3].keys() == {"box 2", "box 3"}  # pretrain-apn and the APN phase
    plain = Run(seed / "plain").recipe()
    assert (plain.model.scales, plain.model.sizes, plain.pretrain_cnn.epochs) == (1, (32,), 2)
    assert Run(seed / "plain-equal-compute").recipe().model.sizes == (found["plain, equal compute"]["size"],)
    assert not (bench[0] / "runs" / "latest").exists()  # two processes would fight over it


def test_what_is_finished_is_not_trained_again(copy) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("runs/**/*") if file.is_file()}
    shutil.rmtree(copy / "items")  # not even read
    run_bench("attention", json_path=copy / "again.json", seeds="3-4", recipe="mini.toml", data="items")
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("runs/**/*") if file.is_file()} == before
    again = json.loads((copy / "again.json").read_text())
    assert again == figures(copy)


def test_an_interrupted_arm_goes_on_to_the_same_figures(copy, monkeypatch) -> None:
    shutil.rmtree(PLACE / "seed-3")
    whole = Trainer.run_stage

    def stopped(trainer: Trainer, name: str) -> None:
        if name == "alternate":
            raise KeyboardInterrupt
        whole(trainer, name)

    options = Options((3,), "mini.toml", data="items")
    monkeypatch.setattr(Trainer, "run_stage", stopped)
    with pytest.raises(KeyboardInterrupt):
        attention.run(options)
    monkeypatch.setattr(Trainer, "run_stage", whole)
    found = attention.run(options).values["runs"][0]["arms"]
    for name, arm in figures(copy)["runs"][0]["arms"].items():
        assert found[name]["top1"] == arm["top1"], name
        assert found[name].get("boxes") == arm.get("boxes")


def test_a_changed_recipe_is_refused(copy) -> None:
    (copy / "mini.toml").write_text(RECIPE.replace("apn_lr = 1e-2", "apn_lr = 2e-2"))
    with pytest.raises(RunError, match=r"alternate\.apn_lr is 0\.01 there and 0\.02 here"):
        attention.run(Options((3,), "mini.toml", data="items"))


def test_the_ablation_shares_the_learned_arm_and_its_start(copy) -> None:
    learned = PLACE / "seed-3" / "learned" / "bench.json"
    before = learned.stat().st_mtime_ns
    result = CliRunner().invoke(
        app, ["bench", "ablation", *WORDS[2:-1], "3", "--json", "ablation.json"], catch_exceptions=False
    )
    assert learned.stat().st_mtime_ns == before
    found = json.loads((copy / "ablation.json").read_text())
    assert list(found["arms"]) == [arm.name for arm in ablation.ARMS]
    assert found["arms"]["default"]["fused"]["mean"] == pytest.approx(
        json.loads(learned.read_text())["top1"]["fused"]
    )
    for name, arm in found["arms"].items():
        row = next(line for line in result.output.splitlines() if re.match(rf"│ {re.escape(name)} +│", line))
        assert f"{arm['fused']['mean']:.3f}" in row
        difference = arm["fused"]["mean"] - found["arms"]["default"]["fused"]["mean"]
        assert arm["fused_minus_default"]["mean"] == pytest.approx(difference)
    paper = Run(PLACE / "seed-3" / "paper").recipe()
    assert (paper.model.zoom, paper.model.gradient, paper.alternate.jitter) == ("nested", "boxcar", 0)
    centre = Run(PLACE / "seed-3" / "start-from-the-centre")
    assert "pretrain-apn" not in {e.stage for e in centre.read_log() if e.event == "epoch"}
    assert (found["recovered"]["count"][1], result.exit_code) == (1, 0)


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
    whole = torch.tensor([0.5, 0.5, 0.5]).expand(64, 3)
    for proposal in proposals:
        assert ((2 * proposal[:, 2] > 1 / 3 - 1e-6) & (2 * proposal[:, 2] < 0.95 + 1e-6)).all()
        whole = compose(whole, proposal)
        low, high = whole[:, :2] - whole[:, 2:], whole[:, :2] + whole[:, 2:]
        assert (low > -1e-5).all()
        assert (high < 1 + 1e-5).all()
        assert (low < images["box"][:, :2] + 1e-5).all()
        assert (high > images["box"][:, 2:] - 1e-5).all()
    assert iou(whole, images["box"]).min() > 0.99


def test_a_coarse_box_is_as_tight_as_it_may_be() -> None:
    first, _ = boxes.true_boxes(3, 1 / 3, 0.95)(batch())
    torch.testing.assert_close(2 * first[:, 2], torch.full((64,), 1 / 3))
    images = batch(sides=(0.02, 0.1))  # smaller than two zooms can show
    torch.testing.assert_close(
        2 * boxes.true_boxes(3, 1 / 3, 0.95)(images)[1][:, 2], torch.full((64,), 1 / 3)
    )


def test_a_images_without_a_box_is_seen_whole() -> None:
    images = batch(2)
    images["box"][1] = torch.nan
    for proposal in boxes.true_boxes(3, 1 / 3, 0.95)(images):
        torch.testing.assert_close(proposal[1], torch.tensor([0.5, 0.5, 0.475]))


def test_a_taught_box_is_the_item_from_wherever_the_scale_looks() -> None:
    images = batch(sides=(0.12, 0.2))
    teacher = boxes.true_targets(3, 1 / 3, 0.95)
    centre = (images["box"][:, :2] + images["box"][:, 2:]) / 2
    parent = torch.cat([0.25 + 0.5 * centre, torch.full((64, 1), 0.25)], dim=1)  # off centre
    reached = (images["box"][:, 2] - images["box"][:, 0]) > 0.5 / 3  # no smaller than the floor allows
    reached &= (0.5 * centre - 0.25).abs().amax(dim=1) < 0.15  # and inside the parent
    assert reached.sum() > 5
    assert iou(compose(parent, teacher(images, parent, 1)), images["box"])[reached].min() > 0.99
    # Outside of what the scale sees: the nearest box to it.
    away = torch.tensor([0.2, 0.2, 0.1]).expand(64, 3)
    found = teacher({"box": torch.tensor([0.7, 0.1, 0.9, 0.3]).expand(64, 4)}, away, 1)
    torch.testing.assert_close(found[0], torch.tensor([0.525, 0.5, 0.475]))


def test_apns_learn_what_a_teacher_says() -> None:
    """From features that hold the place: a bright square on black, its box the truth."""
    recipe = recipes.load("clutter", (), {"model.scales": 2, "pretrain_apn.lr": 1e-2})
    model = build(resolve(recipe).model, 2, source=160)
    samples = batch(32, sides=(0.34, 0.5))
    image = torch.zeros(32, 3, 160, 160)
    for canvas, (left, top, right, bottom) in zip(image, (160 * samples["box"]).int().tolist(), strict=True):
        canvas[:, top:bottom, left:right] = 1
    stage = stages.pretrain_apn(resolve(recipe), boxes.true_targets(2, 1 / 3, 0.95))
    optimizer = torch.optim.AdamW(stage.moving(model)[0].parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        ((name, loss),) = stage.losses(model, {"image": image, "label": torch.zeros(32), **samples})
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert name == "box 2"
    assert losses[-1] < 0.3 * losses[0]
    assert [parameter.grad for parameter in model.scale(0).backbone.parameters()] == [None] * 12


def test_random_boxes_have_the_true_sides_and_stay_where_they_are() -> None:
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
    some = {name: value[[5, 3]] for name, value in images.items()}
    for one, again in zip(random, boxes.random_boxes(guide, seed=7)(some), strict=True):
        torch.testing.assert_close(one[[5, 3]], again)
    other = boxes.random_boxes(guide, seed=8)(images)
    assert (other[0] - random[0]).abs().max() > 0.1


# ---- compute


def test_equal_compute_is_the_smallest_input_that_costs_as_much() -> None:
    recipe = resolve(recipes.load("clutter"))
    found = compute.equal_compute(recipe, 10)
    assert found.scales == compute.multiply_adds(build(recipe.model, 10, source=160, weights="none"))
    assert compute.at_size(recipe, 10, found.size) == found.plain >= found.scales
    assert compute.at_size(recipe, 10, found.size - 4) < found.scales  # 4: the backbone's stride
    assert found.size % 4 == 0
    # By hand, at 32 px: four 3×3 convolutions on 32, 16, 8 and 8 px, and the classifier.
    by_hand = 9 * (32**2 * 3 * 16 + 16**2 * 16 * 32 + 8**2 * 32 * 64 + 8**2 * 64 * 96) + 96 * 10
    assert compute.at_size(recipe, 10, 32) == by_hand
    assert found.scales > 3 * by_hand  # APNs, crops and fusion count too


# ---- other data, and what is refused


def test_drawn_images_have_boxes_too(here) -> None:
    text = RECIPE.replace('"clutter"', '"fieldguide"').replace("[data.sample]", "[data.sample]\nsize = 64")
    (here / "drawn.toml").write_text(text.replace("source = 160", "source = 64"))
    seed = SeedExperiment(Options((0,), "drawn.toml", quick=True), 0)
    seed.run_arm(LEARNED)
    assert seed.run_arm(attention.TRUE).boxes[-1].coverage_mean > 0.95


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.fit": "pad", "data.augment.flip": "both"},
        {"data.fit": "squash", "data.augment.scale": 1.0, "data.augment.rotate": 45.0},
    ],
)
def test_a_box_goes_the_way_of_its_varied_image(here, changes) -> None:
    """A white box on black: where the varied image is bright is where the box must be."""
    pixels = np.zeros((180, 120, 3), np.uint8)
    pixels[60:110, 30:70] = 255
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)  # upright once it is turned back
    exif = Image.Exif()
    exif[274] = 6
    stored.save(here / "white.png", exif=exif)
    data = recipes.load("clutter").override({"data.augment.color": 0.0, **changes}).data
    items = [Item(here / "white.png", 0, (60, 50, 50, 40))]
    varied = AnnotatedDataset(items, data, 96, seed=1, augment=True)
    plain = AnnotatedDataset(items, data, 96, seed=1, augment=False)
    seen = []
    for epoch in range(20):
        sample = varied[(epoch, 0)]
        bright = bounding_box(sample["image"][0].numpy() > 192)
        np.testing.assert_allclose(sample["box"].numpy(), bright, atol=2.5 / 96)
        seen.append(bright)
    assert np.ptp(seen, axis=0).min() > 0.05
    bright = bounding_box(plain[(0, 0)]["image"][0].numpy() > 128)
    np.testing.assert_allclose(plain[(0, 0)]["box"].numpy(), bright, atol=1.5 / 96)


def test_a_box_that_a_crop_leaves_out_is_none() -> None:
    assert np.isnan(bounding_box(np.zeros((4, 4), bool))).all()
    assert bounding_box(np.eye(4, dtype=bool)[:, :2]) == (0, 0, 1, 0.5)


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
    found = figures(here)
    assert list(found["arms"]) == ["default", "boxes never trained"]
    assert found["arms"]["default"]["fused"]["n"] == 2
    assert "iou_mean" not in found["arms"]["default"]
    assert "IoU" not in result.output
    assert "start from the centre" not in result.output
    assert not Path("runs/bench-attention-blobs/seed-0/paper").exists()
    with pytest.raises(RecipeError, match="no arm 'papers'; did you mean paper"):
        ablation.select_arms(["papers"])
    with pytest.raises(RecipeError, match="attention takes no --arm"):
        run_bench("attention", seeds="0", arms=["paper"])


def test_quick_and_data_reach_the_images(here) -> None:
    write_items(here / "items")
    (here / "mini.toml").write_text(RECIPE.replace("images = 80", "images = 8000"))
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
