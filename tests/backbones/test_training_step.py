"""One training step of every stage, for backbones of many families: the loss and the gradient are finite, what is
trained changes, and everything else stays bit-identical."""

from __future__ import annotations

import math

import pytest
import torch
from blobs import tiny

from racnn_cli.core.model import RACNN, build
from racnn_cli.recipe import Recipe
from racnn_cli.training import phases
from racnn_cli.training.loop import freeze_all_but, make_optimizer, set_training_mode
from racnn_cli.training.phases import Batch, Classifier, Phase
from racnn_cli.training.trainer import seed_step

FAMILIES = {
    "vgg11": 64,
    "resnet18": 64,
    "test_resnet": 64,
    "regnetx_002": 64,
    "densenet121": 64,
    "mobilenetv3_small_050": 64,
    "test_efficientnet": 64,
    "ghostnet_100": 64,
    "test_convnext": 64,
    "test_mambaout": 64,
    "swin_tiny_patch4_window7_224": 64,
    "test_vit": 64,
}
"""Backbone to the size of each of three scales."""
PHASES = (phases.pretrain_cnn, phases.pretrain_apn, phases.cnn_phase, phases.apn_phase, phases.fusion)
CLASSES, BATCH = 4, 2


@pytest.fixture
def make(tmp_path):
    """Build a network of three scales and a batch of noise for it, from the name of a backbone."""

    def make_model(name: str) -> tuple[Recipe, RACNN, Batch]:
        size = FAMILIES[name]
        changes = {"model__backbone": name, "model__scales": 3, "model__sizes": [size] * 3, "train__batch": BATCH}
        recipe = tiny(tmp_path, data__source=size, **changes)
        seed_step(0)
        model = build(recipe.model, CLASSES, source=size)
        images = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8)
        return recipe, model, {"image": images, "label": torch.arange(BATCH) % CLASSES}

    return make_model


def tensors(model: RACNN) -> dict[str, torch.Tensor]:
    """Name every parameter and buffer, including those that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_step(recipe: Recipe, phase: Phase, model: RACNN, batch: Batch) -> None:
    """Make one update of one phase, as the training loop does, and check what it changed."""
    modules = phase.modules(model)
    parameters = freeze_all_but(model, modules)
    set_training_mode(model, modules, freeze_batchnorm=False)
    optimizer = make_optimizer(recipe, phase, model)
    before = {name: tensor.detach().clone() for name, tensor in tensors(model).items()}
    for name, loss in phase.losses(model, modules, batch):
        assert math.isfinite(loss.item()), f"{phase.title}: the loss `{name}` is {loss.item()}"
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip)
    optimizer.step()
    assert norm.isfinite(), f"{phase.title}: the norm of the gradient is {norm.item()}"
    changed = {name: tensor for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    trained = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    leaked = [name for name, tensor in changed.items() if id(tensor) not in trained]
    assert not leaked, f"{phase.title}: frozen tensors changed: {leaked}"
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unreached, f"{phase.title}: weights got no gradient: {unreached}"
    changed_ids = {id(tensor) for tensor in changed.values()}
    # Per module, not per weight: a residual branch whose last scale starts at 0 passes no gradient at first.
    for part in [part for m in modules for part in (m.children() if isinstance(m, Classifier) else [m])]:
        own = {id(parameter) for parameter in part.parameters()}
        assert not own or own & changed_ids, f"{phase.title}: {type(part).__name__} did not change"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_stage_changes_only_what_is_trained(make, name: str) -> None:
    recipe, model, batch = make(name)
    for make_phase in PHASES:
        check_step(recipe, make_phase(recipe), model, batch)


def test_batchnorm_in_training_mode_would_be_noticed(make, monkeypatch) -> None:
    set_mode = set_training_mode

    def leave_batchnorm_in_training_mode(model, modules, *, freeze_batchnorm):
        set_mode(model, modules, freeze_batchnorm=freeze_batchnorm)
        model.scale(1).backbone.train()  # the usual bug: BatchNorm statistics keep changing

    recipe, model, batch = make("test_resnet")
    monkeypatch.setitem(globals(), "set_training_mode", leave_batchnorm_in_training_mode)
    with pytest.raises(AssertionError, match=r"frozen tensors changed: .*scales\.1"):
        check_step(recipe, phases.apn_phase(recipe), model, batch)
