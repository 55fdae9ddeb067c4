"""The stages: run one by one from the command line, what they change and what stays frozen, and that they learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blobs import tiny, write_blobs, write_recipe
from PIL import Image
from safetensors.torch import load_file

import racnn_cli
from racnn_cli import api
from racnn_cli.core import attention, store
from racnn_cli.run import Run
from racnn_cli.training import phases, stages
from racnn_cli.training.loop import fit
from racnn_cli.training.phases import Phase
from racnn_cli.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data")


# ---- from the command line


def test_the_stages_as_commands(racnn, here, data) -> None:
    three = {"model__scales": 3, "model__sizes": [64, 64, 64], "alternate__rounds": 1}
    file = write_recipe(here / "mine.toml", data, **three)

    code, out, _ = racnn("pretrain-cnn", file)
    assert code == 0
    assert "next: racnn pretrain-apn" in out
    run = Run.open(None)
    state = load_file(run.weights)
    for name in [n.removeprefix("scales.0.") for n in state if n.startswith("scales.0.") and ".apn." not in n]:
        for finer in ("scales.1.", "scales.2."):
            assert torch.equal(state["scales.0." + name], state[finer + name]), name

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
    code, out, err = racnn("export", "--safetensors", "--out", "exported")
    assert code == 0, err
    image = next((data / "test" / "red").glob("*.png"))
    exported = racnn_cli.predict("exported", [image])[0]
    prediction = racnn_cli.load(run.folder).predict([image])[0]
    assert (exported.label, exported.probability) == (prediction.label, prediction.probability)
    assert exported.label in ("blue", "green", "red")

    code, _, err = racnn("pretrain-apn")
    assert code == 2
    assert "past pretrain-apn already" in err
    finished = [e.stage for e in run.read_log() if e.event == "stage"]
    assert finished == ["pretrain-cnn", "pretrain-apn", "alternate"]
    assert run.recipe().fusion.epochs == 1


def test_every_epoch_is_one_line_of_the_log(here, data) -> None:
    run, result = api.train(tiny(data), out=here / "mine", quiet=True)
    events = [event.to_json() for event in run.read_log()]
    epochs = [e for e in events if e["event"] == "epoch"]
    names = ["", "", "", "", "CNN phase", "APN phase", "CNN phase", "fusion head", "fusion head"]
    assert [e["phase"] for e in epochs] == names
    assert [e["round"] for e in epochs] == [0] * 4 + [1, 2, 2, 3, 3]
    assert [e["views"] for e in epochs] == list(range(1, 10))
    assert [set(e["train_loss"]) for e in epochs[:-1:2]] == [
        {"classification 1"},
        {"box 2"},
        {"classification 1", "classification 2"},
        {"classification 1", "classification 2"},
    ]
    assert set(epochs[-1]["train_loss"]) == {"classification fused"}
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


@pytest.mark.parametrize(("fit", "expected"), [("crop", 96), ("pad", 120)])
def test_the_source_is_chosen_from_the_files_and_said(here, fit, expected, capsys) -> None:
    for number in range(12):
        folder = here / "data" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        size = (120, 96) if number < 8 else (400, 300)
        Image.new("RGB", size, (20 * number, 90, 90)).save(folder / f"{number}.png")
    changes = {"data__source": 0, "data__fit": fit, "data__val": 0.3, "data__test": 0.3}
    trainer = Trainer.start(tiny(here / "data", **changes), out=here / "mine")
    assert trainer.recipe.data.source == trainer.run.recipe().data.source == expected
    assert f"chosen from files of {expected} px (median)" in capsys.readouterr().err
    assert trainer.train[(0, 0)]["image"].shape == (3, expected, expected)
    trainer.close()
    run, _ = api.train(tiny(here / "data", **changes), out=here / "mine", or_resume=True, quiet=True)  # the same run
    assert run.recipe().data.source == expected


def test_quick_runs_every_stage(here, data) -> None:
    run, _ = api.train(tiny(data, quick=True), out=here / "mine", quiet=True)
    recipe = run.recipe()
    assert recipe.alternate.rounds == 2
    assert [e.stage for e in run.read_log() if e.event == "stage"] == list(stages.NAMES)


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(here, data) -> None:
    short = {"model__scales": 1, "model__sizes": [64], "pretrain_cnn__epochs": 1}
    states = []
    for number, seed in enumerate((1, 1, 2)):
        run, _ = api.train(tiny(data, seed=seed, **short), out=here / str(number), quiet=True)
        states.append(load_file(run.weights))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "scales.0.classifier.weight"
    assert not torch.equal(states[0][name], states[2][name])


# ---- frozen parameters and buffers

PHASES: list[tuple[Callable[..., Phase], Callable[[str], bool]]] = [
    (phases.pretrain_cnn, lambda name: name.startswith("scales.0.") and ".apn." not in name),
    (phases.pretrain_apn, lambda name: ".apn." in name),
    (phases.cnn_phase, lambda name: name.startswith("scales.") and ".apn." not in name),
    (phases.apn_phase, lambda name: ".apn." in name),
    (phases.fusion, lambda name: name.startswith("fusion.")),
]


@pytest.mark.parametrize("batchnorm", ["train", "frozen"])
def test_each_phase_changes_what_it_trains_and_nothing_else(here, data, batchnorm) -> None:
    recipe = tiny(
        data,
        model__scales=3,
        model__sizes=[64, 64, 64],
        train__batchnorm=batchnorm,
        alternate__margin=1.0,  # so that the rank loss always has a gradient
        model__side=0.6,
        fusion__lr=0.1,
        **{f"{section}__epochs": 1 for section in ("pretrain_cnn", "pretrain_apn", "fusion")},
    )
    trainer = Trainer.start(recipe, out=here / "mine", quiet=True)
    trainer.recipe = trainer.recipe.override({"train.batchnorm": batchnorm})  # a new run with random weights cannot
    model = trainer.model
    with torch.no_grad():  # classifiers with weights near 0 give the features hardly any gradient
        for number in range(3):
            model.scale(number).classifier.weight.normal_()
    for make_phase, is_trained in PHASES:
        phase = make_phase(recipe)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fit(trainer, phase)
        buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in model.state_dict().items():
            same = torch.equal(before[name], tensor)
            if not is_trained(name) or (name in buffers and batchnorm == "frozen"):
                assert same, f"{phase.title} changed {name}"
            elif phase.part != "fusion":  # the fusion head is restored to its start if that had the lowest loss
                assert not same, f"{phase.title} did not change {name}"
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["weights", "both"])
def test_a_fitted_mixture_is_stored_evaluated_and_exported(here, data, kind) -> None:
    run, result = api.train(tiny(data, model__fuse=kind), out=here / "mine", quiet=True)
    phases_run = [event.phase for event in run.epochs()]
    assert ("fusion head" in phases_run) == (kind == "both")
    model, _ = store.load(run.folder)
    assert model.mixture is not None
    weights, temperatures = model.mixture
    assert len(weights) == (3 if kind == "both" else 2)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert temperatures.min() > 0
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        output = model(images)
        parts = [
            values.div(t).softmax(dim=1) * w for values, w, t in zip(output.logits, weights, temperatures, strict=False)
        ]
    if kind == "weights":
        torch.testing.assert_close(output.fused.exp(), sum(parts), rtol=1e-4, atol=1e-6)
    scaled = (output.fused / model.temperatures[-1]).softmax(dim=1)
    torch.testing.assert_close(output.probabilities, scaled)
    assert result.fused.temperature == pytest.approx(model.temperatures[-1].item())
    api.export(run)  # checks the file against the network


def test_the_fusion_head_learns_where_the_scales_disagree(here, data) -> None:
    """With the classifier of scale 2 negated, the mean of the scales is wrong; a trained head can correct it."""
    recipe = tiny(data, fusion__epochs=6, fusion__lr=0.05, data__augment__color=0.0, pretrain_cnn__epochs=8)
    trainer = Trainer.start(recipe, out=here / "mine", quiet=True)
    changes = {"alternate.cnn_epochs": 8, "alternate.ramp": False, "alternate.cnn_lr": 3e-3}
    fit(trainer, phases.cnn_phase(recipe.override(changes)))
    with torch.no_grad():
        trainer.model.scale(1).classifier.weight.mul_(-3)
    stages.start_fusion(trainer)
    before = trainer.validate().fused.nll
    fit(trainer, phases.fusion(recipe))
    after = trainer.validate()
    assert after.fused.nll < 0.7 * before
    assert after.fused.nll < after.average.nll


# ---- learning

EASY = {
    "train__batch": 8,
    "pretrain_cnn__epochs": 8,
    "pretrain_cnn__lr": 2e-3,
    "data__augment__color": 0.0,
    "data__augment__rotate": 0.0,
}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])
def test_colors_are_learned_in_seconds(here, tmp_path_factory, backbone) -> None:
    easy = write_blobs(tmp_path_factory.mktemp("easy") / "data", {"train": 16, "val": 6, "test": 8})
    recipe = tiny(easy, model__backbone=backbone, alternate__cnn_lr=5e-4, **EASY)
    _, result = api.train(recipe, out=here / "mine", quiet=True)
    assert result.fused.top1 >= 0.95
    assert all(scale.top1 >= 0.9 for scale in result.scales)


@pytest.mark.parametrize("gradient", ["perturb", "backprop"])
def test_the_apns_learn_where_the_objects_are(here, tmp_path_factory, gradient) -> None:
    """The discs are always up and left of the center: pre-training and rank loss both move the boxes there."""
    folder = tmp_path_factory.mktemp("corner") / "data"
    corner = write_blobs(folder, {"train": 16, "val": 4, "test": 4}, centre=(0.28, 0.3), radius=9, noise=60)
    recipe = tiny(
        corner,
        model__backbone="test_resnet",
        data__augment__scale=1.0,
        data__augment__flip="none",
        pretrain_apn__epochs=8,
        pretrain_apn__lr=3e-3,
        alternate__jitter=0.4,
        alternate__cnn_epochs=4,
        alternate__cnn_lr=1e-3,
        alternate__apn_epochs=8,
        alternate__apn_lr=5e-3,
        alternate__apn_gradient=gradient,
        **EASY,
    )
    trainer = Trainer.start(recipe, out=here / "mine", quiet=True)
    apn = trainer.model.scale(0).apn
    assert apn is not None

    def mean_box() -> tuple[torch.Tensor, float]:
        """Mean box (3,) on the training images, and its mean distance to the peak target."""
        boxes, targets = [], []
        with torch.no_grad():
            for batch in trainer.batches("train", augment=False):
                output = trainer.model.eval()(batch["image"])
                features = trainer.model.scale(0).backbone(output.views[0])
                boxes.append(output.proposals[0])
                targets.append(attention.peak_target(features, recipe.model.side))
        distances = (torch.cat(boxes) - torch.cat(targets)).abs().sum(1)
        return torch.cat(boxes).mean(0), distances.mean().item()

    untrained = {name: tensor.clone() for name, tensor in apn.state_dict().items()}
    stages.run_stage(trainer, "pretrain-cnn")
    untrained_box, distance_before = mean_box()
    stages.run_stage(trainer, "pretrain-apn")
    pretrained_box, distance_after = mean_box()
    assert distance_after < 0.6 * distance_before
    assert (pretrained_box[:2] < untrained_box[:2] - 0.1).all()

    fit(trainer, phases.cnn_phase(recipe))
    apn.load_state_dict(untrained)  # undo the pre-training: the rank loss has to move the boxes
    with torch.no_grad():  # from a start that is far from the discs
        apn.box.weight.zero_()
        apn.box.bias.copy_(torch.tensor([1.0, 1.0, 0.0]))
    start_box, _ = mean_box()
    fit(trainer, phases.apn_phase(recipe))
    trained_box, _ = mean_box()
    losses = [e.train_loss["rank 1-2"] for e in trainer.run.epochs() if "rank 1-2" in e.train_loss]
    excess = [loss - recipe.alternate.margin for loss in losses]
    assert excess[0] > 0.02
    assert excess[-1] < 0.3 * excess[0]
    assert (trained_box[:2] < start_box[:2] - 0.02).all()
