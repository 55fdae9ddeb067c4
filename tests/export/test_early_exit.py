"""Early exit: finer scales run only on the images that scale 1 is uncertain about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from untrained import CLASSES, SIDE, make_run

from racnn_cli.data.square import load_source
from racnn_cli.errors import ExportError
from racnn_cli.export import early_exit
from racnn_cli.export.check import check
from racnn_cli.export.graph import ExportedGraph, ExportOptions
from racnn_cli.export.loading import load
from racnn_cli.export.onnx import describe, export_onnx
from racnn_cli.run import Run


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory) -> Run:
    """Three scales of the smallest backbone, because each file needs two traces."""
    return make_run(tmp_path_factory.mktemp("early") / "three", data, scales=3, backbone="small_cnn")


@pytest.fixture(scope="module")
def report(run: Run) -> dict:
    """The report of a file with early exit and crops."""
    with pytest.MonkeyPatch.context() as patch:
        # Scale 1 of this run agrees with all scales, so all images might stop.
        patch.setattr(early_exit, "choose_threshold", lambda confidence, **_: float(np.median(confidence)))
        options = ExportOptions(crops=True)
        return export_onnx(run, run.folder / "early.onnx", options=options, early_exit=True)


def run_file(path: str | Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of an ONNX file by name."""
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_only_uncertain_images_go_through_the_finer_scales(
    run: Run, report: dict, data: Path, validation_image: np.ndarray
) -> None:
    image, figures = validation_image, report["early_exit"]
    graph = ExportedGraph.from_run(run, ExportOptions(crops=True))  # all scales, in PyTorch
    with torch.inference_mode():
        values = [value.numpy() for value in graph(torch.from_numpy(image))]
    full, outputs = dict(zip(graph.output_names, values, strict=True)), run_file(report["path"], image=image)
    stops = full["scales"][:, 0].max(axis=1) >= figures["threshold"]
    assert stops.sum() == len(image) / 2
    assert outputs["ran"].tolist() == np.where(stops, 1, 3).tolist()
    for name in full:
        tolerance = 1e-3 * (SIDE if name == "boxes" else 1)
        assert np.abs(outputs[name][~stops] - full[name][~stops]).max() < tolerance, name
    assert np.abs(outputs["probabilities"][stops] - full["scales"][stops, 0]).max() < 1e-4
    assert (outputs["labels"][stops, 0] == full["scales"][stops, 0].argmax(axis=1)).all()
    for name in ("boxes", "crop_2", "crop_3"):
        assert not outputs[name][stops].any(), name
    assert not outputs["scales"][stops, 1:].any()

    # The threshold was chosen on these images; the accuracy is reported on the test images.
    files = sorted(data.parent.glob("test-*.png"))
    labels = np.array([run.classes().index(CLASSES[int(file.name[5])]) for file in files])
    squares = np.stack([load_source(file, "crop", SIDE)[0] for file in files]).transpose(0, 3, 1, 2)
    test = np.ascontiguousarray(squares, np.float32) / np.float32(255)
    early, late = (
        run_file(report["path"], image=test, threshold=np.array(threshold, np.float32))
        for threshold in (figures["threshold"], early_exit.NO_EXIT)
    )
    accuracies = [float((values["labels"][:, 0] == labels).mean()) for values in (late, early)]
    assert accuracies == pytest.approx([figures["before"], figures["after"]])
    assert (figures["stopped"], figures["images"], figures["split"]) == ((early["ran"] == 1).sum(), len(files), "test")

    no_exit = run_file(report["path"], image=image, threshold=np.array(early_exit.NO_EXIT, np.float32))
    assert np.abs(no_exit["probabilities"] - full["probabilities"]).max() < 1e-3
    assert set(run_file(report["path"], image=image, threshold=np.array(0, np.float32))["ran"]) == {1}


def test_without_test_images_the_threshold_is_cross_fitted(monkeypatch) -> None:
    """Each half of the images is measured with the threshold of the other half."""
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    coarse = np.array([True, True, False, True, True, False])
    full = np.array([True, True, True, True, True, True])
    monkeypatch.setattr(early_exit, "_answers", lambda *_: (confidence, coarse, full))
    monkeypatch.setattr(early_exit, "ExportedGraph", lambda *_: torch.nn.Identity())
    graph = SimpleNamespace(model=None, fit="", options=None)
    # Even images allow the first to stop (threshold .8), odd ones the first two (.5): .6 and .5 in the other half.
    assert early_exit.cross_fitted_accuracy(graph, None, 0.0) == pytest.approx(5 / 6)  # type: ignore[arg-type]
    with_images = {"images": 6, "split": "val", "stopped": 3, "threshold": 0.5, "times_faster": 1.0}
    base = {"sides": [64], "agreement": [1, 1], "max_difference": {}, "checked_on": "", "batches": []}
    text = describe(base | {"early_exit": with_images | {"before": 1.0, "after": 5 / 6}})
    assert "3 of 6 val images (used for choosing) stop after scale 1" in text
    assert "threshold chosen on the other half" in text


def test_the_file_is_checked_and_described(run: Run, report: dict, data: Path) -> None:
    assert report["agreement"] == [60, 60]  # twenty images, of which none, all and half are refined
    assert list(report["outputs"])[-1] == "ran"
    assert re.search(r"early exit: \d+ of 24 test images stop after scale 1", describe(report))
    assert check(run, Path(report["path"]), data.parent)["agreement"] == [60, 60]
    metadata = onnxruntime.InferenceSession(report["path"]).get_modelmeta().custom_metadata_map
    assert float(metadata["threshold"]) == pytest.approx(report["early_exit"]["threshold"])
    assert json.loads(metadata["classes"]) == sorted(CLASSES)


def test_predictions_hold_the_scales_that_ran(report: dict, data: Path) -> None:
    predictions = load(Path(report["path"])).predict(sorted(data.parent.glob("val-*.png")))
    assert {(len(entry.scales), len(entry.boxes)) for entry in predictions} == {(1, 0), (3, 2)}


def test_openvino_agrees_with_onnx_runtime(report: dict, validation_image: np.ndarray) -> None:
    openvino = pytest.importorskip("openvino")
    network = openvino.Core().compile_model(report["path"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert [value.get_any_name() for value in network.inputs] == ["image"]  # the threshold became a constant
    outputs, expected = network({"image": validation_image}), run_file(report["path"], image=validation_image)
    for name in ("probabilities", "scales", "boxes", "ran"):
        assert np.abs(outputs[name] - expected[name]).max() < (0.05 if name == "boxes" else 1e-3), name


def test_raw_images_that_are_not_square(data: Path, tmp_path: Path) -> None:
    run, options = make_run(tmp_path / "two", data, scales=2, backbone="small_cnn"), ExportOptions(raw=True)
    report = export_onnx(run, tmp_path / "raw.onnx", options=options, opset=18, early_exit=True, max_drop=100)
    image = np.random.default_rng(0).integers(0, 256, (3, 50, 90, 3), dtype=np.uint8)
    outputs = run_file(report["path"], image=image, threshold=np.array(early_exit.NO_EXIT, np.float32))
    assert outputs["ran"].tolist() == [2, 2, 2]
    assert (outputs["boxes"][..., 0] >= 20 - 1e-3).all()  # the center crop begins here
    assert (outputs["boxes"][..., 2] <= 70 + 1e-3).all()


def test_options_that_cannot_be_combined(run: Run, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--early-exit writes float32, not int8"):
        export_onnx(run, tmp_path / "a.onnx", early_exit=True, precision="int8")
    single = make_run(tmp_path / "single", data, scales=1)
    with pytest.raises(ExportError, match="has a single scale, so there are no finer scales to skip"):
        export_onnx(single, tmp_path / "b.onnx", early_exit=True)
    assert not [*tmp_path.glob("*.onnx*")]


def choose(confidence: np.ndarray, coarse: np.ndarray, full: np.ndarray, max_drop: float) -> float:
    return early_exit.choose_threshold(confidence, coarse_correct=coarse, full_correct=full, max_drop=max_drop)


def test_choice_of_the_threshold() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    right, wrong, one_wrong = np.ones(4, bool), np.zeros(4, bool), np.array([1, 1, 0, 1], bool)
    assert choose(confidence, right, right, max_drop=0) == pytest.approx(0.3)  # all may stop
    assert choose(confidence, one_wrong, right, max_drop=0) == pytest.approx(0.75)
    assert choose(confidence, one_wrong, right, max_drop=25) == pytest.approx(0.3)
    with pytest.raises(ExportError, match="scale 1 is wrong even where it is most confident"):
        choose(confidence, wrong, right, max_drop=24)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.5, 10.0, 50.0]),
)
def test_no_threshold_costs_more_than_allowed(images: list[tuple[int, bool, bool]], max_drop: float) -> None:
    confidence, coarse, full = (np.array(values) for values in zip(*images, strict=True))
    try:
        threshold = choose(confidence / 20, coarse, full, max_drop=max_drop)
    except ExportError:
        return
    stops = confidence / 20 >= threshold
    assert stops.any()
    assert 100 * (full.mean() - np.where(stops, coarse, full).mean()) <= max_drop + 1e-6
