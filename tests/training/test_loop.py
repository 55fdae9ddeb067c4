"""The training loop: learning rates, parameter groups, averaged weights, accumulation, and when a stage ends."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from blobs import tiny, write_blobs
from safetensors.torch import load_file, save_file
from torch import nn

from racnn_cli import api
from racnn_cli.core.metrics import ClassificationMetrics
from racnn_cli.core.model import RACNN, build, resolve
from racnn_cli.errors import RecipeError, RunError
from racnn_cli.events import Answer, BoxesEvent, Validation
from racnn_cli.recipe import Recipe
from racnn_cli.training import checkpoint, compute, phases, stages
from racnn_cli.training.baseline import baseline_recipe
from racnn_cli.training.ema import Ema
from racnn_cli.training.loop import fit, freeze_all_but, lr_factor, make_optimizer, set_training_mode
from racnn_cli.training.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data")


def make_model(recipe: Recipe) -> RACNN:
    torch.manual_seed(0)
    return build(recipe.model, 3, source=64)


# ---- learning rate


def lr_factors(data: Path, updates: int, per_epoch: int, **train: Any) -> list[float]:
    recipe = tiny(data, **{f"train__{key}": value for key, value in train.items()})
    return [lr_factor(recipe, update, updates, per_epoch) for update in range(updates)]


def test_cosine_schedule_with_warmup(data) -> None:
    factors = lr_factors(data, 10, 5, schedule="cosine", warmup=0.2)
    assert factors[:2] == [0.5, 1.0]
    assert factors[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)])
    assert factors[2] == 1.0
    assert factors[6] == pytest.approx(0.5)
    assert 0 < factors[9] < 0.05


def test_step_schedule(data) -> None:
    factors = lr_factors(data, 12, 2, schedule="step", warmup=0.0, step_epochs=2)
    assert factors == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 4)


def test_constant_schedule_with_and_without_warmup(data) -> None:
    assert lr_factors(data, 4, 2, schedule="constant", warmup=0.0) == [1.0] * 4
    assert lr_factors(data, 4, 2, schedule="constant", warmup=1.0) == [0.25, 0.5, 0.75, 1.0]
    assert lr_factors(data, 1, 1, schedule="cosine", warmup=0.1) == [1.0]


# ---- optimizer


def test_parameter_groups_of_the_optimizer(data) -> None:
    recipe = tiny(data, pretrain_cnn__lr=0.01, pretrain_cnn__head_lr=5.0, train__weight_decay=0.1)
    model = make_model(recipe)
    phase = phases.pretrain_cnn(recipe)
    trainable = freeze_all_but(model, phase.modules(model))
    optimizer = make_optimizer(recipe, phase, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    assert set(groups) == set(trainable)
    head = model.scale(0).classifier
    for parameter, group in groups.items():
        in_head = parameter is head.weight or parameter is head.bias
        assert group["lr"] == pytest.approx(0.05 if in_head else 0.01)
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)

    sgd = make_optimizer(tiny(data, train__optimizer="sgd", train__momentum=0.7), phase, model)
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["momentum"] == 0.7 for group in sgd.param_groups)


def test_embeddings_have_no_weight_decay_and_lower_layers_a_smaller_learning_rate(data) -> None:
    recipe = tiny(data, model__backbone="test_vit", train__layer_decay=0.5, train__weight_decay=0.05)
    recipe = recipe.override({"model.scales": 1, "model.sizes": [160], "pretrain_cnn.lr": 1e-3})
    model = build(recipe.model, 3)
    phase = phases.pretrain_cnn(recipe)
    freeze_all_but(model, phase.modules(model))
    groups = make_optimizer(recipe, phase, model).param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: settings[id(p)] for name, p in model.scale(0).named_parameters()}
    assert found["backbone.net.pos_embed"][1] == 0
    assert found["backbone.net.blocks.0.attn.qkv.weight"][1] == 0.05
    assert found["backbone.net.blocks.0.attn.qkv.bias"][1] == 0
    lowest, middle = (found[f"backbone.net.{name}.weight"][0] for name in ("patch_embed.proj", "blocks.0.attn.qkv"))
    assert lowest < middle < 1e-3
    assert middle == pytest.approx(2 * lowest)
    assert found["classifier.weight"][0] == pytest.approx(1e-3 * recipe.pretrain_cnn.head_lr)


def test_a_schedule_over_the_stage_continues_from_phase_to_phase(here, data) -> None:
    keys = {"train__span": "stage", "train__warmup": 0.0, "alternate__cnn_lr": 1.0, "alternate__apn_lr": 1.0}
    recipe = tiny(data, alternate__rounds=3, alternate__cnn_epochs=2, alternate__ramp=True, **keys)
    parts = [phases.cnn_phase(recipe, round_index=number) for number in range(3)]
    assert [(phase.epochs_before, phase.epochs, phase.span) for phase in parts] == [(0, 1, 5), (1, 2, 5), (3, 2, 5)]
    apn = [phases.apn_phase(recipe, round_index=number) for number in (1, 2)]
    assert [(phase.epochs_before, phase.epochs, phase.span) for phase in apn] == [(0, 1, 2), (1, 1, 2)]
    trainer = Trainer.start(recipe.override({"alternate.cnn_lr": 1e-6, "alternate.apn_lr": 1e-6}), quiet=True)
    stages.run_all(trainer)
    rates = [event.lr for event in trainer.run.epochs() if event.phase == "CNN phase"]
    per_epoch = math.ceil(24 / 6)
    last = [(number + 1) * per_epoch - 1 for number in range(5)]
    assert rates == pytest.approx([5e-7 * (1 + math.cos(math.pi * step / (5 * per_epoch))) for step in last])


def test_the_first_cnn_phase_may_be_longer(data) -> None:
    recipe = tiny(data, alternate__first_epochs=4, alternate__cnn_epochs=2, alternate__rounds=3, alternate__ramp=True)
    assert [phases.cnn_phase(recipe, round_index=number).epochs for number in range(3)] == [4, 2, 2]
    assert recipe.alternate.cnn_epochs_in(3) == 8


@pytest.mark.parametrize(("weights", "ramp"), [("none", True), ("weights.safetensors", False)])
def test_short_first_rounds_are_for_random_weights(data, weights, ramp) -> None:
    recipe = tiny(data, model__weights=weights)
    assert recipe.alternate.ramp == "auto"
    assert resolve(recipe).alternate.ramp is ramp
    assert resolve(recipe.override({"alternate.ramp": not ramp})).alternate.ramp is not ramp


def test_frozen_batchnorm_keeps_its_statistics(data) -> None:
    model = make_model(tiny(data))
    phase = phases.pretrain_cnn(tiny(data))
    norms = [m for m in model.scale(0).backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    modules = phase.modules(model)
    freeze_all_but(model, modules)
    set_training_mode(model, modules, freeze_batchnorm=True)
    assert not any(layer.training for layer in norms)
    assert all(p.requires_grad for layer in norms for p in layer.parameters())
    set_training_mode(model, modules, freeze_batchnorm=False)
    assert all(layer.training for layer in norms)


# ---- averaged weights


def test_averaged_weights_match_the_formula(data) -> None:
    model = make_model(tiny(data))
    head = model.scale(0).classifier
    ema = Ema(model, [head], 0.5)
    assert set(ema.values) == {"scales.0.classifier.weight", "scales.0.classifier.bias"}
    expected = head.bias.detach().clone()
    for update, value in enumerate((1.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 9.0), start=1):
        with torch.no_grad():
            head.bias.fill_(value)
        ema.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.values["scales.0.classifier.bias"], expected)
    with ema.applied():
        torch.testing.assert_close(head.bias.detach(), expected)
        torch.testing.assert_close(ema.values["scales.0.classifier.bias"], torch.full((3,), 9.0))
    torch.testing.assert_close(head.bias.detach(), torch.full((3,), 9.0))
    assert ema.updates == 10
    assert Ema(model, [head], 0.0).values == {}


def test_a_stage_ends_with_the_averaged_weights(here, data) -> None:
    trainer = Trainer.start(tiny(data, train__ema=0.9, pretrain_cnn__lr=0.01), out=here / "mine", quiet=True)
    fit(trainer, phases.pretrain_cnn(trainer.recipe))
    saved = load_file(checkpoint.list_checkpoints(trainer.run)[0])
    averages = {k.removeprefix("averaged."): v for k, v in saved.items() if k.startswith("averaged.")}
    assert len(averages) > 20
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in averages.items())
    differ = [name for name, value in averages.items() if not torch.equal(saved[f"model.{name}"], value)]
    assert "scales.0.classifier.weight" in differ


# ---- accumulation


def weights_after(recipe: Recipe, folder: Path, stage: str = "pretrain-cnn") -> dict[str, torch.Tensor]:
    trainer = Trainer.start(recipe, out=folder, quiet=True)
    stages.run_stage(trainer, stage)
    return load_file(trainer.run.weights)


@pytest.mark.parametrize("batches", [(4, 2, 8), (5, 2, 10)], ids=["even", "uneven"])
def test_accumulated_batches_match_one_large_batch(here, data, batches) -> None:
    batch, accumulate, large = batches  # of 24 images
    keys = {"model__backbone": "test_convnext", "train__optimizer": "sgd", "pretrain_cnn__lr": 0.01}
    keys |= {"train__momentum": 0.9, "pretrain_cnn__epochs": 1, "model__scales": 1, "model__sizes": [64]}
    accumulated = weights_after(tiny(data, train__batch=batch, train__accumulate=accumulate, **keys), here / "a")
    large_batch = weights_after(tiny(data, train__batch=large, **keys), here / "b")
    small_batch = weights_after(tiny(data, train__batch=batch, **keys), here / "c")
    name = "scales.0.classifier.weight"
    if batches[0] == 4:
        torch.testing.assert_close(accumulated[name], large_batch[name], rtol=1e-4, atol=1e-6)
    assert (accumulated[name] - small_batch[name]).abs().max() > 1e-4
    distance = (accumulated[name] - large_batch[name]).abs().max()
    assert distance < (small_batch[name] - large_batch[name]).abs().max() / 5


def test_workers_give_the_same_weights_as_one_process(here, data) -> None:
    keys = {"pretrain_cnn__epochs": 1, "model__scales": 1, "model__sizes": [64]}
    without = weights_after(tiny(data, **keys), here / "a")
    with_workers = weights_after(tiny(data, data__workers=2, **keys), here / "b")
    assert all(torch.equal(without[name], with_workers[name]) for name in without)


# ---- when a stage ends


def val(nll: float, *, rank: float = 0.1, top1: float = 0.5) -> Validation:
    """Validation figures with the same loss for all scales, their average and the fusion head."""
    entry = {"top1": top1, "nll": nll}
    box = {"side_mean": 0.5, "side_std": 0.0, "centre_std": 0.1, "at_floor": 0.0, "at_ceiling": 0.0}
    return Validation.model_validate(
        {"scales": [entry, entry], "average": entry, "fused": entry, "rank": rank, "boxes": [box]}
    )


def test_early_stopping_waits_for_its_patience_and_restores_the_best_epoch(here, data, monkeypatch) -> None:
    losses = iter([1.0, 0.8, 0.9, 0.81, 0.5])
    states: list[torch.Tensor] = []

    def validate(self: Trainer, *rest: Any, **keys: Any) -> Validation:
        states.append(self.model.scale(0).classifier.weight.detach().clone())
        return val(next(losses))

    monkeypatch.setattr(Trainer, "validate", validate)
    recipe = tiny(data, pretrain_cnn__epochs=9, pretrain_cnn__patience=2)
    trainer = Trainer.start(recipe, out=here / "mine", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    run = trainer.run
    assert [e.epoch for e in run.read_log() if e.event == "epoch"] == [1, 2, 3, 4]
    best = load_file(run.weights)["scales.0.classifier.weight"]
    assert torch.equal(best, states[1])
    assert not torch.equal(best, states[3])


def test_epochs_are_chosen_by_top1_and_ties_by_the_calibrated_loss() -> None:
    def answer(top1: float, nll: float, calibrated: float) -> Answer:
        return Answer(top1=top1, nll=nll, temperature=2.0, calibrated_nll=calibrated)

    ranked = [answer(0.8, 2.0, 0.9), answer(0.79, 0.5, 0.4), answer(0.79, 0.4, 0.5)]
    assert sorted([ranked[2], ranked[0], ranked[1]], key=lambda one: one.score, reverse=True) == ranked


def test_the_best_epoch_of_pretrain_cnn_is_kept_and_the_last_one_is_named(here, data, monkeypatch) -> None:
    figures = iter([val(0.5, top1=0.6), val(0.9, top1=0.7), val(0.2, top1=0.65)])
    states: list[torch.Tensor] = []

    def validate(self: Trainer, *rest: Any, **keys: Any) -> Validation:
        states.append(self.model.scale(0).classifier.weight.detach().clone())
        return next(figures)

    monkeypatch.setattr(Trainer, "validate", validate)
    trainer = Trainer.start(tiny(data, pretrain_cnn__epochs=3), out=here / "mine", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    assert torch.equal(load_file(trainer.run.weights)["scales.0.classifier.weight"], states[1])
    (choice,) = trainer.run.choices()
    assert (choice.stage, choice.unit, choice.kept, choice.last) == ("pretrain-cnn", "epoch", 2, 3)
    assert choice.describe() == "epoch 2 of 3 is kept: validation top-1 0.700 (epoch 3: 0.650)"


def test_a_round_with_better_accuracy_and_worse_loss_is_kept(here, data) -> None:
    """The case that a review measured: on memorised images the loss follows over-confidence."""
    trainer = start_alternate(here, data, rounds=2, tolerance=0.0)
    assert end_rounds(trainer, iter([val(1.2, top1=0.767), val(1.5, top1=0.794)])) == [False, True]
    assert trainer.progress.best_round is not None
    assert trainer.progress.best_round.number == 2


def end_rounds(trainer: Trainer, validations: Iterator[Validation]) -> list[bool]:
    """End rounds with these validation figures; returns for each round whether it was the last one."""
    trainer.validate = lambda *_: next(validations)  # type: ignore[method-assign]
    results = []
    for _ in range(20):
        results.append(stages.end_round(trainer))
        if results[-1]:
            break
    return results


def start_alternate(here: Path, data: Path, **keys: Any) -> Trainer:
    changes = {f"alternate__{key}": value for key, value in keys.items()}
    return Trainer.start(tiny(data, **changes), out=here / "mine", quiet=True)


def test_alternate_ends_when_neither_loss_changes(here, data) -> None:
    trainer = start_alternate(here, data, rounds=20, patience=2, tolerance=0.01)
    # Smoothed by one half: 1, 0.75, 0.625, 0.5625, 0.53125, ... The first seven change by more than 1 %.
    validations = (val(1.0 if number == 0 else 0.5) for number in range(20))
    results = end_rounds(trainer, validations)
    smoothed = [1.0]
    while len(smoothed) < 3 or any(a - b > 0.01 * a for a, b in zip(smoothed[-3:], smoothed[-2:], strict=False)):
        smoothed.append(0.5 * smoothed[-1] + 0.25)
    assert len(results) == len(smoothed) == 9
    assert trainer.progress.best_round is not None
    assert trainer.progress.best_round.number == 2
    last = [e for e in trainer.run.read_log() if e.event == "round"][-1]
    assert last.still == 2
    assert last.smoothed["classification"] == pytest.approx(0.5 + 0.5**9)


def test_alternate_continues_while_only_the_rank_loss_changes(here, data) -> None:
    trainer = start_alternate(here, data, rounds=6, patience=1, tolerance=0.01)
    assert end_rounds(trainer, (val(0.5, rank=0.1 * 0.7**n) for n in range(20))) == [False] * 5 + [True]


def test_alternate_without_any_change_ends_after_its_patience(here, data) -> None:
    trainer = start_alternate(here, data, rounds=20, patience=3, tolerance=0.0)
    assert end_rounds(trainer, (val(0.5) for _ in range(20))) == [False, False, False, True]


def test_the_best_round_is_restored(here, data, monkeypatch) -> None:
    trainer = start_alternate(here, data, rounds=3, tolerance=0.0, cnn_lr=1e-2, apn_lr=1e-2, margin=1.0)
    validations = iter([val(0.9), val(0.4), val(0.7)])  # after each round; the end of the stage is measured itself
    states: list[dict[str, torch.Tensor]] = []

    validate = Trainer.validate

    def validate_round(self: Trainer, scales: int | None = None) -> Validation:
        if sys._getframe(1).f_code.co_name == "_validate":  # at the end of an epoch
            return validate(self, scales)
        states.append({name: t.clone() for name, t in self.model.state_dict().items()})
        return next(validations)

    stages.run_stage(trainer, "pretrain-cnn")
    stages.run_stage(trainer, "pretrain-apn")
    monkeypatch.setattr(Trainer, "validate", validate_round)
    stages.run_stage(trainer, "alternate")
    final = load_file(trainer.run.weights)
    names = [name for name in final if "fusion" not in name]
    assert len(states) == 3
    names.remove("temperatures")  # fitted at the end
    assert all(torch.equal(final[name], states[1][name]) for name in names)
    for state in (states[0], states[2]):
        assert not torch.equal(final["scales.1.classifier.weight"], state["scales.1.classifier.weight"])
        assert not torch.equal(final["scales.0.apn.box.weight"], state["scales.0.apn.box.weight"])


def test_the_first_rounds_are_short(here, data) -> None:
    recipe = tiny(data, alternate__rounds=5, alternate__cnn_epochs=3, alternate__ramp=True)
    assert [phases.cnn_phase(recipe, round_index=number).epochs for number in range(5)] == [1, 2, 3, 3, 3]
    constant = recipe.override({"alternate.ramp": False})
    assert [phases.cnn_phase(constant, round_index=number).epochs for number in range(5)] == [3] * 5
    trainer = start_alternate(here, data, rounds=2, cnn_epochs=2, tolerance=0.0)
    stages.run_all(trainer)
    events = [event for event in trainer.run.epochs() if event.phase == "CNN phase"]
    assert [(event.round, event.epoch) for event in events] == [(1, 1), (2, 1), (2, 2)]


def test_without_apn_epochs_the_apns_do_not_change(here, data) -> None:
    trainer = start_alternate(here, data, apn_epochs=0)
    stages.run_stage(trainer, "pretrain-cnn")
    stages.run_stage(trainer, "pretrain-apn")
    before = load_file(trainer.run.weights)
    stages.run_stage(trainer, "alternate")
    after = load_file(trainer.run.weights)
    apn = [name for name in before if ".apn." in name]
    assert apn
    assert all(torch.equal(before[name], after[name]) for name in apn)
    assert not torch.equal(before["scales.1.classifier.weight"], after["scales.1.classifier.weight"])


# ---- the baseline


def test_the_baseline_has_the_same_budget(data) -> None:
    recipe = resolve(tiny(data, model__scales=3, model__sizes=[64, 64, 64]))
    epochs = {
        ("pretrain-cnn", ""): 10,
        ("pretrain-apn", ""): 2,
        ("alternate", "CNN phase"): 6,
        ("alternate", "APN phase"): 2,
        ("alternate", "fusion head"): 3,
    }
    baseline = baseline_recipe(recipe, classes=3, epochs=epochs)
    (size,) = baseline.model.sizes
    assert (baseline.model.scales, baseline.data.source, baseline.baseline) == (1, size, False)
    own, plain = (compute.prediction_flops(one, 3) for one in (recipe, baseline))
    assert own <= plain < 1.1 * own
    target = compute.training_flops(recipe, 3, epochs)
    per_epoch = compute.training_flops(baseline, 3, {("pretrain-cnn", ""): 1})
    assert target <= baseline.pretrain_cnn.epochs * per_epoch < target + per_epoch


def test_every_phase_is_counted_forward_and_backward(data) -> None:
    """In units of scale 1's forward pass, which convolutions and the classifier make up: a backward pass costs two."""
    recipe = resolve(tiny(data, model__scales=3, model__sizes=[64, 64, 64], alternate__boxes=4))
    unit = compute.prediction_flops(compute.plain(recipe, 64), 3)
    # By hand: four 3×3 convolutions on 64, 32, 16 and 8 px, and the classifier; a multiply-add is two operations.
    maps = ((64, 3, 16), (32, 16, 32), (16, 32, 64), (16, 64, 96))
    assert unit == 2 * (9 * sum(side**2 * before * after for side, before, after in maps) + 96 * 3)
    first = 2 * 9 * 64**2 * 3 * 16 / unit  # the first convolution has no gradient for its input
    expected = {
        ("pretrain-cnn", ""): 3 - first,
        ("pretrain-apn", ""): 2,  # scales 1 and 2, whose features the APNs read
        ("alternate", "CNN phase"): 3 * (3 - first),
        ("alternate", "APN phase"): 1 + 4 + 1 + 4,  # each APN tries four boxes
        ("alternate", "fusion head"): 3,
    }
    for phase, units in expected.items():
        counted = compute.training_flops(recipe, 3, {phase: 1}) / unit
        assert units <= counted < 1.25 * units, (phase, units, counted)  # and crops, APNs and the fusion head
    seven = compute.training_flops(recipe, 3, {("pretrain-cnn", ""): 7})
    assert seven == 7 * round(expected["pretrain-cnn", ""] * unit)


@pytest.mark.parametrize(("gained", "lost", "rolled_back"), [(4, 9, True), (4, 6, False), (0, 1, False), (0, 2, True)])
def test_an_apn_phase_that_is_worse_is_rolled_back(here, data, monkeypatch, gained, lost, rolled_back) -> None:
    trainer = start_alternate(here, data, rounds=2, tolerance=0.0, apn_lr=1e-2, margin=1.0)
    stages.run_stage(trainer, "pretrain-cnn")
    stages.run_stage(trainer, "pretrain-apn")
    monkeypatch.setattr(ClassificationMetrics, "compare", lambda self, other: (gained, lost))
    boxes = []
    trainer.after_phase = lambda stage, phase, round_: boxes.append(
        {name: value.clone() for name, value in trainer.model.state_dict().items() if ".apn." in name}
    )
    stages.run_stage(trainer, "alternate")
    first, second = boxes[0], boxes[1]  # after the first CNN phase, and after the APN phase
    assert all(torch.equal(first[name], second[name]) for name in first) == rolled_back
    (event,) = [event for event in trainer.run.read_log() if isinstance(event, BoxesEvent)]
    assert (event.round, event.gained, event.lost, event.rolled_back) == (2, gained, lost, rolled_back)
    assert f"gain {gained} and lose {lost}" in event.describe()
    assert not (trainer.run.state / "before-apn.safetensors").exists()


def test_the_images_that_two_networks_classify_right_are_compared_one_by_one() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    predictions = torch.tensor([[0, 1, 2, 1, 2, 0], [0, 0, 0, 0, 2, 2]])
    both = []
    for row in predictions:
        both.append(ClassificationMetrics(3))
        for part in (slice(0, 2), slice(2, 6)):
            both[-1].add(F.one_hot(row[part], 3).float().log_softmax(dim=1), labels[part])
    assert both[0].compare(both[1]) == (2, 2)
    assert both[0].compare(both[0]) == (0, 0)


def test_alternate_ends_with_a_cnn_phase_on_the_boxes_that_are_kept(here, data) -> None:
    trainer = start_alternate(here, data, rounds=3, cnn_epochs=2, tolerance=0.0)
    stages.run_all(trainer)
    order = [(event.round, event.phase) for event in trainer.run.epochs() if event.stage == "alternate"]
    assert list(dict.fromkeys(order)) == [
        (1, "CNN phase"),
        (2, "APN phase"),
        (2, "CNN phase"),
        (3, "APN phase"),
        (3, "CNN phase"),
        (3 + 1, "fusion head"),
    ]


def test_every_image_of_an_epoch_weighs_the_same(here, data) -> None:
    """Small steps of SGD over batches of 10, 10 and 4 images add up to the step over all 24."""
    keys = {"model__backbone": "test_convnext", "train__optimizer": "sgd", "train__momentum": 0.0, "train__clip": 0.0}
    keys |= {"pretrain_cnn__epochs": 1, "model__scales": 1, "model__sizes": [64], "train__schedule": "constant"}
    keys |= {"train__warmup": 0.0, "train__weight_decay": 0.0}
    changes = []
    for batch, folder in ((24, "one"), (10, "three")):
        lr = 1e-4 * batch / 24  # so small that the gradient stays the same
        trainer = Trainer.start(
            tiny(data, train__batch=batch, pretrain_cnn__lr=lr, **keys), out=here / folder, quiet=True
        )
        before = trainer.model.scale(0).classifier.weight.detach().clone().double()
        fit(trainer, phases.pretrain_cnn(trainer.recipe))
        changes.append(trainer.model.scale(0).classifier.weight.detach().double() - before)
    torch.testing.assert_close(changes[1], changes[0], rtol=0.02, atol=0.02 * changes[0].abs().max().item())


def test_training_with_a_baseline_evaluates_both(here, data) -> None:
    recipe = tiny(data, baseline=True, alternate__rounds=1)
    run, result = api.train(recipe, out=here / "mine", quiet=True)
    assert set(result.to_json()["baseline"]) >= {"top1", "nll"}
    assert (run.folder / "baseline" / "weights.safetensors").is_file()
    assert Path("runs/latest").resolve() == run.folder.resolve()
    log = (run.folder / "baseline" / "log.jsonl").read_text()
    api.resume(run, quiet=True)
    assert (run.folder / "baseline" / "log.jsonl").read_text() == log  # not trained again


# ---- sizes that BatchNorm cannot train on

ONE = {"model__scales": 1, "model__sizes": [64], "pretrain_cnn__epochs": 1}


def test_a_last_batch_of_one_image_trains_under_batchnorm(here) -> None:
    data = write_blobs(here / "data", {"train": 3, "val": 1, "test": 1})
    # skresnet18 has BatchNorm over pooled features, one value per channel and image.
    run, _ = api.train(tiny(data, model__backbone="skresnet18", train__batch=4, **ONE), out="mine", quiet=True)
    assert run.epochs()[0].views == 1
    assert math.isfinite(run.epochs()[0].train_loss["classification 1"])


def write_weights(here: Path) -> Path:
    """A file with weights of skresnet18, so that it does not count as random."""
    save_file(timm.create_model("skresnet18").state_dict(), here / "weights.safetensors")
    return here / "weights.safetensors"


def test_frozen_statistics_of_random_weights_are_not_kept(here, data, capsys) -> None:
    """They are 0 and 1, whatever the layers get."""
    trainer = Trainer.start(tiny(data, train__batchnorm="frozen"), out=here / "mine")
    assert trainer.recipe.train.batchnorm == "train"
    assert trainer.run.recipe().train.batchnorm == "train"
    assert "train.batchnorm = train instead of frozen: random weights have no" in capsys.readouterr().err


def test_batches_of_one_image_under_batchnorm_are_refused_before_training(here, data) -> None:
    recipe = tiny(data, model__backbone="skresnet18", train__batch=1, **ONE)
    with pytest.raises(
        RecipeError, match=r"^train\.batch = 1: skresnet18 cannot .* layer backbone\..* at 64 px"
    ) as error:
        api.train(recipe, out="mine", quiet=True)
    assert not (here / "mine").exists()
    assert "train.batch=2" in error.value.hint
    assert "without BatchNorm" in error.value.hint
    assert "frozen" not in error.value.hint  # random weights have no statistics to keep
    with pytest.raises(RecipeError, match="cannot train on a single image"):
        api.train(recipe.override({"train.batchnorm": "frozen"}), out="mine", quiet=True)
    pretrained = recipe.override({"model.weights": str(write_weights(here))})
    with pytest.raises(RecipeError) as error:
        api.train(pretrained, out="mine", quiet=True)
    assert "train.batchnorm=frozen" in error.value.hint
    api.train(pretrained.override({"train.batchnorm": "frozen", "data.limit": 2}), out="frozen", quiet=True)
    # Layers with several values per channel of an image train as before.
    small = tiny(data, model__backbone="test_resnet", train__batch=1, data__limit=2, **ONE)
    api.train(small, out="maps", quiet=True)
    with pytest.raises(RecipeError, match=r"train\.batch = 1: test_resnet cannot train on a single image per step"):
        api.train(small.override({"model.sizes": [16]}), out="small", quiet=True)


def test_torchs_own_error_about_a_single_value_is_explained(here, data, monkeypatch) -> None:
    monkeypatch.setattr("racnn_cli.training.trainer.single_value_layer", lambda model: "")
    with pytest.raises(
        RunError, match="a layer of skresnet18 cannot train on one value per channel: Expected"
    ) as error:
        api.train(
            tiny(data, model__backbone="skresnet18", train__batch=1, **ONE, model__weights=str(write_weights(here))),
            out="mine",
            quiet=True,
        )
    assert "train.batchnorm=frozen" in error.value.hint
    assert error.value.exit_code == 1
