"""Warnings about a run's validation figures: each is printed once, with what to try."""

from __future__ import annotations

from pathlib import Path

import pytest
from blobs import tiny, write_blobs, write_recipe

from racnn_cli import api
from racnn_cli.data.types import Index, Item
from racnn_cli.events import Validation
from racnn_cli.run import Run
from racnn_cli.training.health import imbalance, warnings


def validation(*top1: float, **box: float) -> Validation:
    boxes = {"at_floor": 0.0, "at_ceiling": 0.0, "centre_std": 0.1, "side_mean": 0.5, "side_std": 0.05} | box
    scales = [{"top1": value, "nll": 1.0} for value in top1]
    return Validation.model_validate({"scales": scales, "boxes": [boxes] * (len(top1) - 1)})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("empty"))


def test_no_warnings_for_good_figures(recipe) -> None:
    assert warnings(validation(0.7, 0.8), recipe, 200) == {}
    assert warnings(validation(0.3), recipe, 200) == {}


@pytest.mark.parametrize(
    ("box", "kind", "words"),
    [
        ({"at_floor": 0.83}, "floor 2", ("83%", "scale 2", "0.33", "model.floor")),
        ({"at_ceiling": 0.6}, "ceiling 2", ("60%", "0.95", "alternate.tighten")),
        ({"centre_std": 0.004}, "alike 2", ("same place in every image", "0.004", "pretrain_apn.lr")),
    ],
)
def test_a_warning_about_boxes_names_its_figure_and_a_key(recipe, box, kind, words) -> None:
    texts = warnings(validation(0.7, 0.8, **box), recipe, 200)
    assert list(texts) == [kind]
    assert all(word in texts[kind] for word in words), texts[kind]


def test_a_significantly_less_accurate_finer_scale_is_named(recipe) -> None:
    assert list(warnings(validation(0.8, 0.6, 0.7), recipe, 200)) == ["worse 1"]
    assert warnings(validation(0.8, 0.76), recipe, 200) == {}  # within two standard errors
    assert list(warnings(validation(0.8, 0.76), recipe, 20_000)) == ["worse 1"]
    assert warnings(validation(1.0, 0.5), recipe, 10) == {}
    assert warnings(validation(0.8, 0.1), recipe, 200, finer=False) == {}  # not trained yet


def test_a_run_prints_and_logs_a_warning_once(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    # Every box is within 2% of both bounds.
    bounds = {"model__floor": 0.495, "model__side": 0.5, "model__ceiling": 0.5025}
    data = write_blobs(tmp_path / "data")
    run, _ = api.train(tiny(data, alternate__rounds=3, **bounds), out=tmp_path / "run")
    logged = [event.kind for event in run.read_log() if event.event == "warning"]
    assert {"floor 2", "ceiling 2"} <= set(logged)
    assert len(logged) == len(set(logged))
    err = capfd.readouterr().err
    assert err.count("warning: 100% of scale 2's boxes have the smallest size allowed (side 0.49)") == 1


def index_of(**counts: int) -> Index:
    items = [Item(Path("x"), label, None) for label, count in enumerate(counts.values()) for _ in range(count)]
    return Index(classes=list(counts), splits={"train": items}, skipped=[], notes=[], fingerprint="")


def test_a_strong_imbalance_names_the_two_classes() -> None:
    assert imbalance(index_of(a=30, b=3, c=7)) == {}
    assert imbalance(index_of(a=5)) == {}
    (text,) = imbalance(index_of(middle=7, common=31, rare=3)).values()
    assert "31 images of 'common' and 3 of 'rare'" in text
    assert "data.limit" in text
    assert "mean_class" in text


def test_an_imbalanced_run_warns_at_its_start_and_of_classes_never_predicted(here, racnn) -> None:
    data = write_blobs(here / "data", {"train": 11, "val": 2, "test": 2})
    for name in ("green", "red"):
        for number in range(1, 11):
            (data / "train" / name / f"{number:02}.png").unlink()
    file = write_recipe(here / "mine.toml", data, model__scales=1, model__sizes=[64], baseline=True)
    result = racnn("train", file, "--out", "mine", "--set", "pretrain_cnn.lr=1e-9")
    assert result.code == 0
    assert result.err.count("warning: the training split has 11 images of 'blue' and 1 of ") == 1
    run = Run(here / "mine")
    evaluated, kinds = run.read_eval(), [event.kind for event in run.read_log() if event.event == "warning"]
    never = [
        name for number, name in enumerate(evaluated.per_class) if number not in {c[1] for c in evaluated.confusion}
    ]
    assert never  # three classes by chance, at a learning rate that trains nothing
    assert kinds[0] == "imbalance"
    assert "never predicted" in kinds
    (warning,) = evaluated.warnings
    assert all(f"{name!r} (2 images)" in warning for name in never)
    assert f"warning: {warning}" in result.out
    assert warning in (here / "mine" / "report.html").read_text().replace("&#39;", "'")
    log = run.log.read_text()
    racnn("train", "--resume", "--run", "mine")
    assert run.log.read_text() == log
