"""Exported files: they agree with PyTorch, are checked before they get their name, and load again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from PIL import Image
from untrained import CLASSES, SIDE, make_run

import racnn_cli
from racnn_cli.core import store
from racnn_cli.data.square import load_source
from racnn_cli.errors import DataError, ExportError
from racnn_cli.export import onnx as onnx_export
from racnn_cli.export import quantize
from racnn_cli.export.check import check, compare
from racnn_cli.export.graph import ExportedGraph, ExportOptions
from racnn_cli.export.images import CheckImages
from racnn_cli.export.loading import load
from racnn_cli.export.onnx import describe, export_onnx
from racnn_cli.export.torch_formats import export_program, export_safetensors
from racnn_cli.run import Run


@pytest.fixture
def reuse_graph(run: Run, exported: dict, monkeypatch) -> None:
    """Exports take the graph of model.onnx instead of tracing the network again."""
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *_: onnx_ir.load(run.onnx))


def run_without(modules: set[str], code: str, *words: str) -> str:
    """Run Python code in a process that cannot import some modules; its standard output."""
    block = f"""
import sys
class Blocker:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {modules}:
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Blocker())
"""
    command = [sys.executable, "-c", block + code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def edit_metadata(source: Path, target: Path, changes: dict[str, str | None]) -> Path:
    """Copy an ONNX file with other metadata; None removes an entry."""
    proto = onnx.load(source)
    entries = {entry.key: entry.value for entry in proto.metadata_props} | changes
    del proto.metadata_props[:]
    for key, value in entries.items():
        if value is not None:
            proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, target)
    return target


def test_onnx_file_agrees_with_the_network(run: Run, exported: dict, data: Path) -> None:
    assert exported["checked_on"] == "validation images"
    assert exported["inputs"] == {"image": ["batch", 3, "height", "width"]}
    assert exported["outputs"]["boxes"] == ["batch", 2, 4]
    assert exported["outputs"]["labels"] == ["batch", 3]
    assert max(exported["max_difference"].values()) < 1e-4
    assert (exported["batches"], exported["sides"], exported["agreement"]) == ([1, 2, 7], [48, 72], [20, 20])
    assert str(run.onnx) in describe(exported)
    assert "same class on 20 of 20" in describe(exported)
    files = sorted(data.parent.glob("test-*.png"))[:3]
    pixels = np.stack([load_source(file, "crop", SIDE)[0] for file in files])
    network, _ = store.load(run.folder)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    session = onnxruntime.InferenceSession(str(run.onnx))
    names = [value.name for value in session.get_outputs()]
    assert names == ["probabilities", "labels", "scales", "boxes"]
    image = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 255
    outputs = dict(zip(names, session.run(names, {"image": image}), strict=True))
    assert np.abs(outputs["probabilities"] - expected.probabilities.numpy()).max() < 1e-3
    assert (outputs["labels"] == expected.probabilities.argsort(descending=True).numpy()).all()
    assert np.abs(outputs["scales"][:, 2] - expected.logits[2].softmax(1).numpy()).max() < 1e-3
    boxes = torch.stack(expected.boxes, 1)
    corners = SIDE * torch.cat([boxes[..., :2] - boxes[..., 2:], boxes[..., :2] + boxes[..., 2:]], 2)
    assert np.abs(outputs["boxes"] - corners.numpy()).max() < 0.05


def test_onnx_metadata(run: Run, exported: dict) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(run.onnx).metadata_props}
    assert json.loads(metadata["classes"]) == run.classes()
    assert (metadata["source"], metadata["sizes"], metadata["fit"]) == (str(SIDE), "[64, 64, 64]", "crop")
    assert (metadata["layout"], metadata["top"], metadata["racnn"]) == ("NCHW", "5", racnn_cli.__version__)
    assert len(json.loads(metadata["mean"])) == len(json.loads(metadata["std"])) == 3
    assert metadata["recipe_sha256"] == hashlib.sha256(metadata["recipe"].encode()).hexdigest()


@pytest.mark.parametrize(("fit", "opset"), [("crop", 18), ("pad", 20), ("squash", 20)])
def test_the_graph_makes_raw_images_of_any_shape_square(data: Path, tmp_path: Path, fit: str, opset: int) -> None:
    """Its outputs for an image are those for its square, with boxes in pixels of the image."""
    # Three scales once: the boxes of all scales are moved together.
    scales = 3 if fit == "crop" else 2
    network, _ = store.load(make_run(tmp_path / fit, data, scales=scales, backbone="small_cnn").folder)
    graph = ExportedGraph(network, fit, ExportOptions(raw=True, top=2, crops=True)).eval()
    names = graph.output_names
    proto = onnx_ir.to_proto(onnx_export.to_onnx(graph, opset))
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [opset]
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    rng = np.random.default_rng(0)
    for count, height, width in ((1, 40, 90), (3, 77, 50), (2, SIDE, SIDE), (2, 65, 65)):
        image = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        outputs = dict(zip(names, session.run(names, {"image": image}), strict=True))
        with torch.inference_mode():
            expected = dict(zip(names, graph(torch.from_numpy(image)), strict=True))
        for name, value in expected.items():
            tolerance = 1e-3 if name in ("probabilities", "scales") else 1e-2
            assert np.abs(outputs[name] - value.numpy()).max() < tolerance, name
        assert outputs["labels"].shape == (count, 2)
        finest = outputs[f"crop_{scales}"]
        assert finest.shape == (count, 3, 64, 64)
        assert finest.min() >= 0
        assert finest.max() <= 1
        boxes = outputs["boxes"]
        assert (boxes >= 0).all()
        assert (boxes[..., [0, 2]] <= width).all()
        assert (boxes[..., [1, 3]] <= height).all()
        if fit == "squash":
            continue
        # The same square, made here, through the network itself.
        side = min(height, width) if fit == "crop" else max(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        square = np.full((count, side, side, 3), 128, np.uint8)
        if fit == "crop":
            square = image[:, top : top + side, left : left + side]
        else:
            left, top = -((side - width) // 2), -((side - height) // 2)
            square[:, -top : height - top, -left : width - left] = image
        with torch.inference_mode():
            plain = network(torch.from_numpy(square.copy()).permute(0, 3, 1, 2))
        assert np.abs(outputs["probabilities"] - plain.probabilities.numpy()).max() < 1e-3
        center = plain.boxes[0][:, :2].numpy() * side + (left, top)
        inside = (boxes[:, 0, :2] > 0).all(1) & (boxes[:, 0, 2:] < (width, height)).all(1)
        middle = (boxes[:, 0, :2] + boxes[:, 0, 2:]) / 2
        assert np.abs(middle - center)[inside].max(initial=0) < 0.05


def test_a_file_that_disagrees_is_deleted(
    run: Run, exported: dict, reuse_graph: None, tmp_path: Path, monkeypatch
) -> None:
    network, _ = store.load(run.folder)
    images = CheckImages(run, SIDE, files=[])
    graph = ExportedGraph(network, "crop", ExportOptions()).eval()
    compare(graph, run.onnx, images)
    assert network.fusion is not None
    network.fusion.bias.data[0] += 0.5
    with pytest.raises(
        ExportError, match=r"differ by .* in probabilities on noise of 48×48 px in a batch of 1"
    ) as error:
        compare(graph, run.onnx, images)
    assert error.value.exit_code == 1
    monkeypatch.setattr(store, "load", lambda _: (network.eval(), run))
    folder = tmp_path / "out"
    for limit in (onnx_export.PROTOBUF_LIMIT, 1000):  # weights inside the file, and in a second file
        monkeypatch.setattr(onnx_export, "PROTOBUF_LIMIT", limit)
        with pytest.raises(ExportError, match="differ by"):
            export_onnx(run, folder / "net.onnx")
        assert list(folder.iterdir()) == []


def test_weights_too_large_for_one_file_go_into_a_second_one(
    run: Run, reuse_graph: None, data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(onnx_export, "PROTOBUF_LIMIT", 1000)
    folder = tmp_path / "large"
    reports = [export_onnx(run, folder / "net.onnx") for _ in range(2)]
    # The second export has deleted the weights of the first one.
    graph, weights = sorted(folder.iterdir(), key=lambda file: file.stat().st_size)
    assert graph.name == "net.onnx"
    assert re.fullmatch(r"net\.onnx\.[0-9a-f]{8}\.data", weights.name)
    assert reports[1]["bytes"] == graph.stat().st_size + weights.stat().st_size
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    file = next(data.parent.glob("test-*.png"))
    assert load(moved / "net.onnx").predict(file)[0].label == load(run.onnx).predict(file)[0].label
    half = export_onnx(run, folder / "half.onnx", precision="half", max_drop=100)
    assert [file.name for file in folder.iterdir()] == ["half.onnx"]  # it holds its own weights
    assert half["bytes"] == (folder / "half.onnx").stat().st_size


def test_a_file_is_checked_again_later(run: Run, exported: dict, data: Path, tmp_path: Path) -> None:
    report = check(run, None, data.parent)
    assert (report["checked_on"], report["agreement"]) == ("images of the folder", [20, 20])
    assert "wrote" not in describe(report)
    network, _ = store.load(run.folder)
    before = run.weights.read_bytes()
    with torch.no_grad():
        network.scale(2).classifier.bias[0] += 1
    store.save_weights(run.weights, network)
    try:
        with pytest.raises(ExportError, match="differ by"):
            check(run, None, data.parent)
    finally:
        run.weights.write_bytes(before)
    assert run.onnx.is_file()
    with pytest.raises(ExportError, match="does not exist"):
        check(run, tmp_path / "none.onnx", data.parent)
    with pytest.raises(DataError, match=r"nowhere is (no|not a) folder"):
        check(run, None, tmp_path / "nowhere")
    older = edit_metadata(run.onnx, tmp_path / "older.onnx", {"layout": None})
    with pytest.raises(ExportError, match="another version of racnn"):
        check(run, older, data.parent)


@pytest.mark.parametrize("change", [{"top": "x"}, {"threshold": "high"}, {"source": "0"}, {"top": "1"}])
def test_check_refuses_false_metadata(
    run: Run, exported: dict, data: Path, tmp_path: Path, change: dict[str, str | None]
) -> None:
    file = edit_metadata(run.onnx, tmp_path / "false.onnx", change)
    with pytest.raises(ExportError):
        check(run, file, data.parent)


def test_check_limits_the_number_of_labels_to_the_classes(run: Run, exported: dict, data: Path, tmp_path: Path) -> None:
    file = edit_metadata(run.onnx, tmp_path / "many.onnx", {"top": "4000000"})
    assert check(run, file, data.parent)["agreement"] == [20, 20]


def test_check_refuses_a_file_without_labels(run: Run, exported: dict, data: Path, tmp_path: Path) -> None:
    proto = onnx.load(run.onnx)
    del proto.graph.output[[value.name for value in proto.graph.output].index("labels")]
    onnx.save(proto, tmp_path / "fewer.onnx")
    with pytest.raises(ExportError, match="it has no output labels"):
        check(run, tmp_path / "fewer.onnx", data.parent)


def weight_types(path: Path) -> tuple[set[int], set[int]]:
    """ONNX data types of the weights in the backbones, and of those in APNs and fusion, by their names in PyTorch."""
    weights = {entry.name: entry.data_type for entry in onnx.load(path).graph.initializer}
    backbones = {kind for name, kind in weights.items() if ".backbone." in name and "weight" in name}
    return backbones, {kind for name, kind in weights.items() if ".apn." in name or "fusion" in name}


@pytest.mark.parametrize(("precision", "kind", "share"), [("half", 10, 0.6), ("int8", 3, 0.4)])
def test_smaller_precisions_keep_the_boxes_in_float32(
    run: Run, reuse_graph: None, data: Path, tmp_path: Path, precision, kind, share
) -> None:
    report = export_onnx(run, tmp_path / f"{precision}.onnx", precision=precision, max_drop=100)
    figures = report["compressed"]
    assert report["bytes"] < share * figures["bytes_before"]
    assert figures["bytes_before"] == pytest.approx(run.onnx.stat().st_size, rel=0.01)
    assert (figures["precision"], figures["images"]) == (precision, 24)
    assert figures["times_faster"] > 0
    text = describe(report)
    assert f"{precision}: " in text
    assert f"accuracy {figures['before']:.3f} before and {figures['after']:.3f} after on 24 test images" in text
    backbones, others = weight_types(report["path"])
    assert kind in backbones
    assert others == {1}  # float32
    onnx.checker.check_model(report["path"], full_check=True)
    nodes = onnx.load(report["path"]).graph.node
    # The crops are cut from images that were not rounded.
    assert not [node for node in nodes if "image" in node.input and node.op_type == "Cast"]
    files = sorted(data.parent.glob("test-*.png"))  # the validation images decided
    before, after = (load(file).predict(files) for file in (run.onnx, report["path"]))
    accuracies = [
        np.mean([answer.label == CLASSES[int(Path(answer.path).name[5])] for answer in answers])
        for answers in (before, after)
    ]
    assert accuracies == pytest.approx([figures["before"], figures["after"]])
    differences = [abs(a.probability - b.probability) for a, b in zip(before, after, strict=True)]
    assert np.median(differences) < (0.01 if precision == "half" else 0.2)


def test_a_compressed_file_that_is_less_accurate_is_refused(
    run: Run, reuse_graph: None, tmp_path: Path, monkeypatch
) -> None:
    accuracies = iter([0.9, 0.85, 0.9, 0.85])  # on the validation and on the test images
    monkeypatch.setattr(quantize, "accuracy", lambda *_: next(accuracies))
    with pytest.raises(ExportError, match=r"half costs 5\.0 points .* \(0\.900 to 0\.850\)") as error:
        export_onnx(run, tmp_path / "worse" / "net.onnx", precision="half", max_drop=4.9)
    assert "--max-drop 5" in (error.value.hint or "")
    assert list((tmp_path / "worse").iterdir()) == []


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_an_export_does_not_overwrite_other_files(run: Run, write) -> None:
    before = run.weights.read_bytes()
    with pytest.raises(ExportError, match="nothing was written"):
        write(run, run.weights)
    assert run.weights.read_bytes() == before


def test_a_torch_program_runs_without_racnn(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "two", data, scales=2)
    report = export_program(run, tmp_path / "net.pt2", options=ExportOptions(raw=True))
    assert max(report["max_difference"].values()) < 1e-3
    code = """
import json, numpy, torch
from PIL import Image
files = {"metadata.json": ""}
network = torch.export.load(sys.argv[1], extra_files=files).module()
classes = json.loads(json.loads(files["metadata.json"])["classes"])
image = torch.from_numpy(numpy.array(Image.open(sys.argv[2])))[None]
outputs = dict(zip(["probabilities", "labels"], network(image)))
print(classes[outputs["labels"][0, 0]], float(outputs["probabilities"].max()))
"""
    file = data.parent / "test-0-0.png"
    out = run_without({"racnn_cli", "backbones", "timm"}, code, report["path"], str(file))
    network, _ = store.load(run.folder)
    with torch.inference_mode():
        graph = ExportedGraph(network, "crop", ExportOptions(raw=True))
        probabilities, labels, *_ = graph(torch.from_numpy(np.array(Image.open(file)))[None])
    label, probability = out.rsplit(maxsplit=1)
    assert label == run.classes()[int(labels[0, 0])]
    assert float(probability) == pytest.approx(float(probabilities.max()), abs=1e-4)


def test_a_single_scale_exports_without_boxes_and_without_data(
    run: Run, exported: dict, data: Path, tmp_path: Path, capfd
) -> None:
    single = make_run(tmp_path / "single", data, scales=1, backbone="small_cnn")
    text = single.recipe_file.read_text().replace(str(data), str(tmp_path / "gone.csv"))
    single.recipe_file.write_text(text)
    report = export_onnx(single, tmp_path / "single.onnx")
    assert report["checked_on"] == "noise"
    assert list(report["outputs"]) == ["probabilities", "labels", "scales"]
    assert load(tmp_path / "single.onnx").predict(data.parent / "test-0-0.png")[0].boxes == []
    with pytest.raises(ExportError, match=r"was not exported from .*: the recipes differ"):
        check(single, run.onnx, data.parent)
    assert capfd.readouterr() == ("", "")


def test_a_safetensors_folder_predicts_the_same(run: Run, data: Path, tmp_path: Path) -> None:
    folder = export_safetensors(run, tmp_path / "shared")
    assert {file.name for file in folder.iterdir()} == {"recipe.toml", "classes.json", "weights.safetensors"}
    image = data.parent / "test-0-0.png"
    assert racnn_cli.load(folder).predict(image) == racnn_cli.load(run.folder).predict(image)
    with pytest.raises(ExportError, match="not empty"):
        export_safetensors(run, folder)


def test_an_onnx_file_and_its_run_predict_the_same(run: Run, exported: dict, data: Path) -> None:
    files = sorted(data.parent.glob("test-*.png"))
    for by_run, by_file in zip(load(run).predict(files), load(run.onnx).predict(files), strict=True):
        assert by_run.label == by_file.label
        assert by_run.probability == pytest.approx(by_file.probability, abs=1e-4)
        assert np.allclose(by_run.boxes, by_file.boxes, atol=0.05)
        assert [label for label, _ in by_run.scales] == [label for label, _ in by_file.scales]
    larger = [load(trained, source=100).predict(files[0])[0] for trained in (run, run.onnx)]
    assert larger[0].boxes != load(run).predict(files[0])[0].boxes
    assert np.allclose(larger[0].boxes, larger[1].boxes, atol=0.05)


def test_an_onnx_file_predicts_without_torch(run: Run, exported: dict, data: Path) -> None:
    """Nor does it need anything else that is for training only."""
    training_only = {"torch", "torchvision", "timm", "albumentations", "cv2", "onnx", "scipy"}
    code = 'from racnn_cli.cli import app\napp(["predict", *sys.argv[1:]])'
    files = [str(data.parent / "test-0-0.png"), str(data.parent / "test-1-0.png")]
    out = run_without(training_only, code, str(run.onnx), *files, "--format", "jsonl")
    predictions = [json.loads(line) for line in out.splitlines()]
    assert [entry["label"] for entry in predictions] == [answer.label for answer in load(run).predict(files)]


def test_openvino_agrees_with_onnx_runtime(run: Run, exported: dict, validation_image: np.ndarray) -> None:
    openvino = pytest.importorskip("openvino")
    image = validation_image[:5]
    network = openvino.Core().compile_model(run.onnx, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs, session = network({"image": image}), onnxruntime.InferenceSession(run.onnx)
    names = ["probabilities", "labels", "scales", "boxes"]
    for name, value in zip(names, session.run(names, {"image": image}), strict=True):
        assert np.abs(outputs[name] - value).max() < (0.05 if name == "boxes" else 1e-3), name


def test_loading_refuses_foreign_files(run: Run, exported: dict, tmp_path: Path) -> None:
    proto = onnx.load(run.onnx)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(ExportError, match="missing or invalid metadata: classes, fit, layout, sizes, source"):
        load(tmp_path / "bare.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot load .*bad\.onnx"):
        load(tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match="does not exist"):
        load(tmp_path / "none.onnx")


def test_images_in_memory_of_every_mode(run: Run) -> None:
    model, pixels = load(run), Image.radial_gradient("L").resize((50, 40))
    plain = model.predict(pixels.convert("RGB"))[0]
    for mode in ("L", "RGBA", "RGBa", "HSV", "CMYK", "YCbCr", "I", "F", "P", "La"):
        image = pixels.convert({"RGBa": "RGBA", "La": "LA"}.get(mode, "L")).convert(mode)
        assert model.predict(image)[0].label, mode
    hsv = model.predict(pixels.convert("RGB").convert("HSV"))[0]
    assert hsv.probability == pytest.approx(plain.probability, abs=0.02)
    for value in (3, [3], Image.new("RGB", (0, 5)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(DataError, match=r"is not an image|is empty"):
            model.predict(value)
