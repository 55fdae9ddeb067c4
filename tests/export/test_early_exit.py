"""The graph that looks closer only where it must."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from untrained import CLASSES, SIDE, make_run, write_data

from racnn_cli.data.square import load_source
from racnn_cli.errors import RacnnError
from racnn_cli.export import early_exit
from racnn_cli.export import onnx as export
from racnn_cli.export.graph import Form
from racnn_cli.export.prediction import load
from racnn_cli.run import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("early") / "data")


@pytest.fixture(scope="module")
def run(data: Path) -> Run:
    return make_run(data.parent.parent / "three", data, scales=3)


@pytest.fixture(scope="module")
def exported(run: Run) -> dict:
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # scale 1 of this run says what all scales say: all might stop
        patch.setattr(early_exit, "choose", lambda sure, *_: float(np.median(sure)))
        return export.export_onnx(run, run.folder / "early.onnx", form=Form(crops=True), exits=True)


def test_only_unsure_images_are_looked_at_closer(run: Run, exported: dict, data: Path) -> None:
    files = sorted(data.parent.glob("val-*.png"))
    squares = np.stack([load_source(file, "crop", SIDE)[0] for file in files])
    image = np.ascontiguousarray(squares.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    session = onnxruntime.InferenceSession(exported["path"])

    def answers(**given) -> dict[str, np.ndarray]:
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, {"image": image, **given}), strict=True))

    export.export_onnx(run, form=Form(crops=True))
    plain = onnxruntime.InferenceSession(run.onnx)
    names = [value.name for value in plain.get_outputs()]
    whole = dict(zip(names, plain.run(names, {"image": image}), strict=True))

    found, told = answers(), exported["early_exit"]
    sure = whole["scales"][:, 0].max(axis=1)
    stops = sure >= told["threshold"]
    assert stops.sum() == len(files) / 2
    assert found["ran"].tolist() == np.where(stops, 1, 3).tolist()
    for name in names:
        assert np.abs(found[name][~stops] - whole[name][~stops]).max() < 1e-3 * (
            SIDE if name == "boxes" else 1
        ), name
    assert np.abs(found["probabilities"][stops] - whole["scales"][stops, 0]).max() < 1e-4
    assert (found["labels"][stops, 0] == whole["scales"][stops, 0].argmax(axis=1)).all()
    for name in ("boxes", "crop_2", "crop_3"):
        assert not found[name][stops].any(), name
    assert not found["scales"][stops, 1:].any()

    labels = np.array([run.classes().index(CLASSES[int(file.name[4])]) for file in files])
    shares = [float((some["labels"][:, 0] == labels).mean()) for some in (whole, found)]
    assert shares == pytest.approx([told["before"], told["after"]])
    assert (told["stopped"], told["images"]) == (stops.sum(), len(files))

    never = np.array(early_exit.NEVER, np.float32)
    assert np.abs(answers(threshold=never)["probabilities"] - whole["probabilities"]).max() < 1e-3
    assert set(answers(threshold=np.array(0, np.float32))["ran"]) == {1}


def test_its_file_is_verified_described_and_checked_again(run: Run, exported: dict, data: Path) -> None:
    assert exported["agreement"] == [60, 60]  # twenty images: none, all and half of them looked at closer
    assert list(exported["outputs"])[-1] == "ran"
    text = export.describe(exported)
    assert re.search(r"early exit: \d+ of 24 validation images stop after scale 1", text)
    told = export.check(run, Path(exported["path"]), data.parent)
    assert told["agreement"] == [60, 60]
    meta = onnxruntime.InferenceSession(exported["path"]).get_modelmeta().custom_metadata_map
    assert float(meta["threshold"]) == pytest.approx(exported["early_exit"]["threshold"])
    assert json.loads(meta["classes"]) == sorted(CLASSES)


def test_predictions_tell_of_the_scales_that_ran(exported: dict, data: Path) -> None:
    found = load(Path(exported["path"])).predict(sorted(data.parent.glob("val-*.png")))
    assert {(len(one.scales), len(one.boxes)) for one in found} == {(1, 0), (3, 2)}


def test_openvino_reads_it_too(exported: dict, data: Path) -> None:
    openvino = pytest.importorskip("openvino")
    files = sorted(data.parent.glob("val-*.png"))
    squares = np.stack([load_source(file, "crop", SIDE)[0] for file in files])
    image = np.ascontiguousarray(squares.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    network = openvino.Core().compile_model(exported["path"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [one.get_any_name() for one in network.inputs] == ["image"]  # the threshold is a constant to it
    answers, session = network({"image": image}), onnxruntime.InferenceSession(exported["path"])
    names = ["probabilities", "scales", "boxes", "ran"]
    for name, value in zip(names, session.run(names, {"image": image}), strict=True):
        assert np.abs(answers[name] - value).max() < (0.05 if name == "boxes" else 1e-3), name


def test_raw_images_that_are_not_square(run: Run) -> None:
    made = export.export_onnx(
        run, run.folder / "raw.onnx", form=Form(raw=True), opset=18, exits=True, max_drop=100
    )
    session = onnxruntime.InferenceSession(made["path"])
    image = np.random.default_rng(0).integers(0, 256, (3, 50, 90, 3), dtype=np.uint8)
    never = np.array(early_exit.NEVER, np.float32)
    boxes, ran = session.run(["boxes", "ran"], {"image": image, "threshold": never})
    assert ran.tolist() == [3, 3, 3]
    assert (boxes[..., 0] >= 20 - 1e-3).all()  # the centre crop begins there
    assert (boxes[..., 2] <= 70 + 1e-3).all()


def test_what_cannot_be_combined(run: Run, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RacnnError, match="--early-exit writes float32, not int8"):
        export.export_onnx(run, tmp_path / "a.onnx", exits=True, precision="int8")
    single = make_run(tmp_path / "single", data, scales=1)
    with pytest.raises(RacnnError, match="has one scale: there is none to leave out"):
        export.export_onnx(single, tmp_path / "b.onnx", exits=True)
    assert not [*tmp_path.glob("*.onnx*")]


def test_where_the_threshold_lies() -> None:
    sure = np.array([0.9, 0.8, 0.7, 0.6])
    yes, no = np.ones(4, bool), np.zeros(4, bool)
    assert early_exit.choose(sure, yes, yes, 0) == pytest.approx(0.3)  # all may stop
    assert early_exit.choose(sure, np.array([1, 1, 0, 1], bool), yes, 0) == pytest.approx(0.75)
    assert early_exit.choose(sure, np.array([1, 1, 0, 1], bool), yes, 25) == pytest.approx(0.3)
    with pytest.raises(RacnnError, match="scale 1 is wrong where it is surest"):
        early_exit.choose(sure, no, yes, 24)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.5, 10.0, 50.0]),
)
def test_no_threshold_costs_more_than_it_may(images: list[tuple[int, bool, bool]], allowed: float) -> None:
    sure, coarse, fine = (np.array(values) for values in zip(*images, strict=True))
    try:
        threshold = early_exit.choose(sure / 20, coarse, fine, allowed)
    except RacnnError:
        return
    right = np.where(sure / 20 >= threshold, coarse, fine)
    assert (sure / 20 >= threshold).any()
    assert 100 * (fine.mean() - right.mean()) <= allowed + 1e-6
