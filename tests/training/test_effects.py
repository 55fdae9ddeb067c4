"""Values that change nothing say so: with the other values, and for stages that are finished."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from blobs import tiny, write_blobs

from racnn_cli import api
from racnn_cli import recipe as recipes
from racnn_cli.data.types import Index
from racnn_cli.errors import RunError
from racnn_cli.run import Run
from racnn_cli.training import stages
from racnn_cli.training.effects import RULES, Context, without_effect
from racnn_cli.training.trainer import Trainer

INDEX = Index(classes=[], splits={}, skipped=[], notes=[], fingerprint="", own_splits=frozenset({"train", "val"}))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "data", {"train": 4, "val": 2, "test": 2})


def reasons(given: dict[str, Any], *, device: str = "cuda", world: int = 2, **values: Any) -> dict[str, str]:
    changes = given | {key.replace("__", "."): value for key, value in values.items()}
    recipe = tiny(Path("own")).override(changes).as_used()
    return without_effect(given, Context(recipe=recipe, index=INDEX, device=device, world=world))


@pytest.mark.parametrize(
    ("key", "value", "without", "having", "words"),
    [
        ("train.momentum", 0.5, {}, {"train__optimizer": "sgd"}, "train.optimizer = adamw"),
        ("train.step_epochs", 3, {}, {"train__schedule": "step"}, "has no steps"),
        ("alternate.boxes", 8, {"alternate__apn_gradient": "backprop"}, {}, "no boxes are perturbed"),
        ("alternate.spread", 0.1, {"alternate__apn_epochs": 0}, {}, "alternate.apn_epochs = 0"),
        ("alternate.apn_lr", 0.1, {"alternate__apn_epochs": 0}, {}, "APN phases are skipped"),
        ("alternate.rounds", 2, {"model__scales": 1, "model__sizes": [64]}, {}, "model.scales = 1"),
        ("pretrain_apn.epochs", 2, {"model__scales": 1, "model__sizes": [64]}, {}, "model.scales = 1"),
        ("fusion.lr", 0.1, {"model__scales": 1, "model__sizes": [64]}, {}, "model.scales = 1"),
        ("model.floor", 0.4, {"model__scales": 1, "model__sizes": [64]}, {}, "model.scales = 1"),
        ("pretrain_apn.lr", 0.1, {"pretrain_apn__epochs": 0}, {}, "pretrain_apn.epochs = 0"),
        ("model.gradient", "bilinear", {}, {"alternate__apn_gradient": "backprop"}, "not differentiated"),
        (
            "model.k",
            2.0,
            {"alternate__apn_gradient": "backprop", "model__gradient": "bilinear"},
            {"alternate__apn_gradient": "backprop"},
            "no mask",
        ),
        ("alternate.ramp", False, {}, {"alternate__cnn_epochs": 2}, "alternate.cnn_epochs = 1"),
        ("alternate.settle", False, {"alternate__rounds": 1}, {}, "alternate.rounds = 1"),
        ("train.amp", False, {"device": "cpu"}, {}, "CUDA only"),
        ("train.batchnorm", "synced", {"world": 1}, {}, "one process"),
        ("data.sample.images", 99, {}, {"data__path": "clutter"}, "not drawn"),
        ("data.sample.size", 99, {"data__path": "clutter"}, {"data__path": "fieldguide"}, "size of the source"),
        (
            "data.sample.distance",
            2,
            {"data__path": "fieldguide"},
            {"data__path": "clutter:x"},
            "only the data set clutter",
        ),
        ("data.augment.flip", "none", {"data__path": "clutter"}, {}, "drawn anew"),
        ("data.skip_bad", True, {"data__path": "clutter"}, {}, "drawn anew"),
        ("fusion.epochs", 9, {"quick": True}, {}, "quick replaces it by 1"),
        ("alternate.rounds", 9, {"quick": True}, {}, "quick replaces it by 2"),
    ],
)
def test_a_value_without_effect_is_named_with_its_reason(key, value, without, having, words) -> None:
    assert words in reasons({key: value}, **without)[key]
    assert reasons({key: value}, **having) == {}


def test_shares_of_splits_that_the_data_bring() -> None:
    assert reasons({"data.val": 0.1, "data.test": 0.1}) == {"data.val": "the data have a val split of their own"}


def test_every_rule_names_keys_that_exist() -> None:
    for patterns, _, reason in RULES:
        assert reason
        assert all(recipes.describe_keys(pattern) for pattern in patterns)


def test_only_values_that_were_given_are_noted(here, data, racnn) -> None:
    file = here / "mine.toml"
    file.write_text(recipes.dump(tiny(data, train__momentum=0.5, pretrain_cnn__epochs=1)))
    result = racnn("pretrain-cnn", file, "--out", "mine")
    assert "no effect" not in result.err
    result = racnn("pretrain-cnn", file, "--out", "yours", "--set", "train.momentum=0.4", "--set", "data.test=0.3")
    assert [line for line in result.err.splitlines() if "no effect" in line] == [
        "note: train.momentum has no effect: the optimizer is AdamW (train.optimizer = adamw)",
        "note: data.test has no effect: the data have a test split of their own",
    ]


def test_changes_of_a_finished_run_are_refused(here, data, racnn) -> None:
    run, _ = api.train(tiny(data), out="mine", quiet=True)
    log, recipe = run.log.read_text(), run.recipe_file.read_text()
    for change in ("pretrain_cnn.epochs=30", "alternate.rounds=5", "train.batch=3"):
        result = racnn("train", "--resume", "--run", "mine", "--set", change)
        assert result.code == 2
        assert f"error: mine is finished, so {change.partition('=')[0]} would change nothing" in result.err
        assert f"`racnn train mine/recipe.toml --out DIR --set {change}`" in result.err
    assert racnn("train", "--resume", "--run", "mine", "--set", "train.batch=6").code == 0  # as it is
    assert (run.log.read_text(), run.recipe_file.read_text()) == (log, recipe)
    # The last stage can be run again, and then its keys count.
    result = racnn("alternate", "--run", "mine", "--set", "fusion.epochs=1", "--set", "pretrain_apn.lr=0.1")
    assert result.code == 0
    assert "note: pretrain_apn.lr has no effect: pretrain-apn is finished" in result.err
    assert "fusion.epochs has" not in result.err


def test_keys_of_finished_stages_are_noted_and_the_others_count(here, data, capfd) -> None:
    trainer = Trainer.start(tiny(data, pretrain_cnn__epochs=1), out=Path("mine"), quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    trainer.close()
    changes = {"pretrain_cnn.lr": 0.1, "alternate.rounds": 1, "train.momentum": 0.1}
    resumed = Trainer.resume(trainer.run, changes=changes)
    resumed.close()
    assert resumed.recipe.alternate.rounds == 1
    assert [line for line in capfd.readouterr().err.splitlines() if "no effect" in line] == [
        "note: pretrain_cnn.lr has no effect: pretrain-cnn is finished",
        "note: train.momentum has no effect: the optimizer is AdamW (train.optimizer = adamw)",
    ]


def test_a_baseline_that_is_not_finished_may_still_change(here, data) -> None:
    run, _ = api.train(tiny(data, baseline=True), out="mine", quiet=True)
    with pytest.raises(RunError, match=r"mine is finished, so train\.batch would change nothing"):
        api.resume(run, {"train.batch": 3}, quiet=True)
    shutil.rmtree(run.folder / "baseline")
    api.resume(run, {"train.batch": 3}, quiet=True)
    assert Run(run.folder / "baseline").recipe().train.batch == 3
