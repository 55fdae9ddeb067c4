"""The training loop: learning rates, parameter groups, averaged weights, accumulation, and when a stage ends."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blobs import tiny, write_blobs
from safetensors.torch import load_file
from torch import nn

from racnn_cli import api
from racnn_cli.core.model import RACNN, build
from racnn_cli.errors import RecipeError, RunError
from racnn_cli.events import Validation
from racnn_cli.recipe import Recipe
from racnn_cli.training import checkpoint, phases, stages
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


def val(nll: float, *, rank: float = 0.1) -> Validation:
    """Validation figures with the same loss for all scales, their average and the fusion head."""
    entry = {"top1": 0.5, "nll": nll}
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
    assert trainer.progress.best_round == 2
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
    recipe = tiny(
        data,
        model__scales=3,
        model__sizes=[64, 64, 64],
        pretrain_cnn__epochs=10,
        alternate__cnn_epochs=2,
        alternate__apn_epochs=1,
        alternate__rounds=9,
    )
    baseline = baseline_recipe(recipe.override({"alternate.ramp": False}), rounds=3)
    assert baseline.model.scales == 1
    assert baseline.model.sizes == (96,)  # sqrt(3 * 64²) = 110.9, and 3.46 * 32 rounds to 96
    assert baseline.data.source == 96
    cost = 10 * 64**2 + 3 * (2 + 1) * 3 * 64**2
    assert baseline.pretrain_cnn.epochs == math.ceil(cost / 96**2) == 17
    assert baseline.baseline is False
    ramped = baseline_recipe(recipe, rounds=3).pretrain_cnn.epochs
    cost -= 3 * 64**2  # with ramp, the first round has one CNN epoch less
    assert ramped == math.ceil(cost / 96**2) == 16


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


def test_batches_of_one_image_under_batchnorm_are_refused_before_training(here, data) -> None:
    recipe = tiny(data, model__backbone="skresnet18", train__batch=1, **ONE)
    with pytest.raises(
        RecipeError, match=r"^train\.batch = 1: skresnet18 cannot .* layer backbone\..* at 64 px"
    ) as error:
        api.train(recipe, out="mine", quiet=True)
    assert not (here / "mine").exists()
    for part in ("train.batch=2", "train.batchnorm=frozen", "without BatchNorm"):
        assert part in error.value.hint
    api.train(recipe.override({"train.batchnorm": "frozen", "data.limit": 2}), out="frozen", quiet=True)
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
        api.train(tiny(data, model__backbone="skresnet18", train__batch=1, **ONE), out="mine", quiet=True)
    assert "train.batchnorm=frozen" in error.value.hint
    assert error.value.exit_code == 1
