"""The stages: as typed one by one, what moves and what does not, and that they teach what they promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blobs import tiny, write_blobs, write_recipe
from safetensors.torch import load_file

import racnn_cli
from racnn_cli import api
from racnn_cli.core import attention
from racnn_cli.run import Run
from racnn_cli.training import phases, stages
from racnn_cli.training.loop import fit
from racnn_cli.training.phases import Phase
from racnn_cli.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data")


# ---- as typed


def test_the_stages_as_typed(racnn, here, data) -> None:
    three = {"model__scales": 3, "model__sizes": [64, 64, 64], "alternate__rounds": 1}
    file = write_recipe(here / "mine.toml", data, **three)

    code, out, _ = racnn("pretrain-cnn", file)
    assert code == 0
    assert "next: racnn pretrain-apn" in out
    run = Run.open(None)
    state = load_file(run.weights)
    for name in [n.removeprefix("scales.0.") for n in state if n.startswith("scales.0.") and ".apn." not in n]:
        for other in ("scales.1.", "scales.2."):
            assert torch.equal(state["scales.0." + name], state[other + name]), name

    code, _, err = racnn("alternate", "--scales", 3)
    assert code == 2
    assert "alternate needs pretrain-apn" in err
    assert "racnn pretrain-apn --run" in err

    code, out, _ = racnn("pretrain-apn", "--run", run.folder)
    assert code == 0
    assert "next: racnn alternate" in out
    code, out, _ = racnn("alternate", "--scales", 3, "--set", "fusion.epochs=1")
    assert code == 0
    assert "next: racnn eval" in out

    code, out, _ = racnn("eval")
    assert code == 0
    figures = json.loads(run.eval.read_text())
    assert (figures["split"], figures["images"], figures["classes"]) == ("test", 12, 3)
    assert len(figures["scales"]) == 3
    assert len(figures["boxes"]) == 2
    assert {"top1", "top5", "nll", "ece"} <= set(figures["fused"])
    assert "fused" in out

    code, out, err = racnn("export", "--onnx")
    assert code == 0, err
    assert run.onnx.is_file()
    code, out, err = racnn("export", "--safetensors", "--out", "shipped")
    assert code == 0, err
    image = next((data / "test" / "red").glob("*.png"))
    one = racnn_cli.predict("shipped", [image])[0]
    two = racnn_cli.load(run.folder).predict([image])[0]
    assert (one.label, one.probability) == (two.label, two.probability)
    assert one.label in ("blue", "green", "red")

    code, _, err = racnn("pretrain-apn")
    assert code == 2
    assert "past pretrain-apn already" in err
    stages_done = [e.stage for e in run.read_log() if e.event == "stage"]
    assert stages_done == ["pretrain-cnn", "pretrain-apn", "alternate"]
    assert run.recipe().fusion.epochs == 1


def test_every_epoch_is_one_line_of_the_log(here, data) -> None:
    run, result = api.train(tiny(data), out=here / "mine", quiet=True)
    events = [event.to_json() for event in run.read_log()]
    epochs = [e for e in events if e["event"] == "epoch"]
    phases = ["", "", "", "", "CNN phase", "APN phase", "CNN phase", "APN phase", "fusion head", "fusion head"]
    assert [e["phase"] for e in epochs] == phases
    assert [e["round"] for e in epochs] == [0] * 4 + [1, 1, 2, 2, 3, 3]
    assert [e["views"] for e in epochs] == list(range(1, 11))
    assert [set(e["train_loss"]) for e in epochs[::2]] == [
        {"classification 1"},
        {"box 2"},
        {"classification 1", "classification 2"},
        {"classification 1", "classification 2"},
        {"classification fused"},
    ]
    assert set(epochs[5]["train_loss"]) == {"rank 1-2"}
    for event in epochs:
        assert event["seconds"] > 0
        assert event["images_per_second"] > 0
    for event in epochs[2:]:
        assert len(event["val"]["scales"]) == 2
        assert set(event["val"]["boxes"][0]) == {"side_mean", "side_std", "centre_std", "at_floor", "at_ceiling"}
    for event in (e for e in events if e["event"] == "stage"):
        assert len(event["val"]["scales"]) == 2
        assert event["val"]["rank"] >= 0
    assert result.images == 12


def test_quick_goes_the_whole_way(here, data) -> None:
    run, _ = api.train(tiny(data, quick=True), out=here / "mine", quiet=True)
    recipe = run.recipe()
    assert recipe.alternate.rounds == 1
    assert [e.stage for e in run.read_log() if e.event == "stage"] == list(stages.NAMES)


def test_the_same_seed_is_the_same_run_and_another_seed_is_not(here, data) -> None:
    short = {"model__scales": 1, "model__sizes": [64], "pretrain_cnn__epochs": 1}
    states = []
    for number, seed in enumerate((1, 1, 2)):
        run, _ = api.train(tiny(data, seed=seed, **short), out=here / str(number), quiet=True)
        states.append(load_file(run.weights))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "scales.0.classifier.weight"
    assert not torch.equal(states[0][name], states[2][name])


# ---- frozen is frozen

KINDS: list[tuple[Callable[..., Phase], Callable[[str], bool]]] = [
    (phases.pretrain_cnn, lambda name: name.startswith("scales.0.") and ".apn." not in name),
    (phases.pretrain_apn, lambda name: ".apn." in name),
    (phases.cnn_phase, lambda name: name.startswith("scales.") and ".apn." not in name),
    (phases.apn_phase, lambda name: ".apn." in name),
    (phases.fusion, lambda name: name.startswith("fusion.")),
]


@pytest.mark.parametrize("batchnorm", ["train", "frozen"])
def test_what_is_frozen_stays_bit_identical_and_the_rest_moves(here, data, batchnorm) -> None:
    recipe = tiny(
        data,
        model__scales=3,
        model__sizes=[64, 64, 64],
        train__batchnorm=batchnorm,
        alternate__margin=1.0,  # so that the rank loss always has a slope
        model__side=0.6,
        fusion__lr=0.1,
        **{f"{phase}__epochs": 1 for phase in ("pretrain_cnn", "pretrain_apn", "fusion")},
    )
    context = Trainer.start(recipe, out=here / "mine", quiet=True)
    model = context.model
    with torch.no_grad():  # classifiers that start near 0 give the features hardly any gradient
        for number in range(3):
            model.scale(number).classifier.weight.normal_()
    for make, moves in KINDS:
        stage = make(recipe)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fit(context, stage)
        buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in model.state_dict().items():
            same = torch.equal(before[name], tensor)
            if not moves(name) or (name in buffers and batchnorm == "frozen"):
                assert same, f"{stage.title} changed {name}"
            elif stage.part != "fusion":  # the fusion head goes back to its start where that was the best
                assert not same, f"{stage.title} did not move {name}"
        assert not any(p.requires_grad for p in model.parameters())


def test_the_fusion_head_learns_where_the_scales_disagree(here, data) -> None:
    """The classifiers of scale 2 are turned upside down: their mean is useless, a learned head is not."""
    recipe = tiny(data, fusion__epochs=6, fusion__lr=0.05, data__augment__color=0.0, pretrain_cnn__epochs=8)
    started = Trainer.start(recipe, out=here / "mine", quiet=True)
    context = started
    longer = {"alternate.cnn_epochs": 8, "alternate.ramp": False, "alternate.cnn_lr": 3e-3}
    fit(context, phases.cnn_phase(recipe.override(longer)))
    with torch.no_grad():
        context.model.scale(1).classifier.weight.mul_(-3)
    stages.start_fusion(started)
    before = started.validate().fused.nll
    fit(context, phases.fusion(recipe))
    after = started.validate()
    assert after.fused.nll < 0.7 * before
    assert after.fused.nll < after.average.nll


# ---- it learns

EASY = {
    "train__batch": 8,
    "pretrain_cnn__epochs": 8,
    "pretrain_cnn__lr": 2e-3,
    "data__augment__color": 0.0,
    "data__augment__rotate": 0.0,
}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])
def test_colours_are_learned_in_seconds(here, tmp_path_factory, backbone) -> None:
    easy = write_blobs(tmp_path_factory.mktemp("easy") / "data", {"train": 16, "val": 6, "test": 8})
    recipe = tiny(easy, model__backbone=backbone, alternate__cnn_lr=5e-4, **EASY)
    _, result = api.train(recipe, out=here / "mine", quiet=True)
    assert result.fused.top1 >= 0.95
    assert all(scale.top1 >= 0.9 for scale in result.scales)


@pytest.mark.parametrize("slope", ["perturb", "backprop"])
def test_the_apns_learn_where_to_look(here, tmp_path_factory, slope) -> None:
    """Discs that are always up and left of the centre: peak pre-training and rank loss both go there."""
    place = tmp_path_factory.mktemp("corner") / "data"
    corner = write_blobs(place, {"train": 16, "val": 4, "test": 4}, centre=(0.28, 0.3), radius=9, noise=60)
    recipe = tiny(
        corner,
        data__augment__scale=1.0,
        data__augment__flip="none",
        pretrain_apn__epochs=8,
        pretrain_apn__lr=3e-3,
        alternate__jitter=0.4,
        alternate__cnn_epochs=4,
        alternate__cnn_lr=1e-3,
        alternate__apn_epochs=8,
        alternate__apn_lr=5e-3,
        alternate__apn_gradient=slope,
        **EASY,
    )
    started = Trainer.start(recipe, out=here / "mine", quiet=True)
    context = started
    apn = context.model.scale(0).apn
    assert apn is not None

    def looking() -> tuple[torch.Tensor, float]:
        """Mean box on the training images, and mean distance to the peak target."""
        boxes, targets = [], []
        with torch.no_grad():
            for batch in context.batches("train", augment=False):
                output = context.model.eval()(batch["image"])
                features = context.model.scale(0).backbone(output.views[0])
                boxes.append(output.proposals[0])
                targets.append(attention.peak_target(features, recipe.model.side))
        found, wanted = torch.cat(boxes), torch.cat(targets)
        return found.mean(0), (found - wanted).abs().sum(1).mean().item()

    untrained = {name: tensor.clone() for name, tensor in apn.state_dict().items()}
    stages.run_stage(started, "pretrain-cnn")
    at_start, far = looking()
    stages.run_stage(started, "pretrain-apn")
    after_peak, near = looking()
    assert near < 0.6 * far
    assert (after_peak[:2] < at_start[:2] - 0.1).all()

    fit(context, phases.cnn_phase(recipe))
    apn.load_state_dict(untrained)  # forget the peak, so that the rank loss has to find the way,
    with torch.no_grad():  # from a place that is far from it
        apn.box.weight.zero_()
        apn.box.bias.copy_(torch.tensor([1.0, 1.0, 0.0]))
    away, _ = looking()
    fit(context, phases.apn_phase(recipe))
    after_rank, _ = looking()
    log = [e.train_loss["rank 1-2"] for e in context.run.epochs() if "rank 1-2" in e.train_loss]
    excess = [loss - recipe.alternate.margin for loss in log]
    assert excess[0] > 0.02
    assert excess[-1] < 0.3 * excess[0]
    assert (after_rank[:2] < away[:2] - 0.02).all()
