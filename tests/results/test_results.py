"""Evaluation, predictions, drawings and the report of untrained networks."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from torchvision.ops import box_iou
from untrained import CLASSES, SIDE, make_run, write_data

from racnn_cli import evaluation
from racnn_cli.core import store
from racnn_cli.core.metrics import BoxMetrics
from racnn_cli.data.decode import read_image
from racnn_cli.data.images import ImageDataset
from racnn_cli.data.index import build_index
from racnn_cli.data.types import Index
from racnn_cli.errors import RacnnError
from racnn_cli.events import EpochEvent, EvalResult, RoundEvent, describe_left_out
from racnn_cli.export import onnx as exporter
from racnn_cli.export.loading import load
from racnn_cli.export.prediction import Frame, Prediction
from racnn_cli.results import draw, predict, report, tables
from racnn_cli.run import Run, write_json


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def data(place: Path) -> Path:
    return write_data(place / "data")


@pytest.fixture(scope="module")
def run(place: Path, data: Path) -> Run:
    return make_run(place / "three", data, scales=3)


@pytest.fixture(scope="module")
def result(run: Run) -> dict:
    return evaluation.evaluate(run).to_json()


@pytest.fixture(scope="module")
def outputs(run: Run):
    """Outputs for all test images in one forward pass, as a reference for the figures of batches."""
    network, _ = store.load(run.folder)
    recipe = run.recipe()
    items = build_index(recipe.data, seed=0, classes=run.classes()).splits["test"]
    images = ImageDataset(items, recipe.data, SIDE, seed=0, augment=False)
    samples = [images[(0, number)] for number in range(len(items))]
    with torch.inference_mode():
        output = network(torch.stack([sample["image"] for sample in samples]))
    labels = torch.stack([sample["label"] for sample in samples])
    return output, labels, torch.stack([sample["box"] for sample in samples]), items


def test_eval_json_has_the_documented_keys(run: Run, result: dict) -> None:
    assert json.loads(run.eval.read_text()) == result
    assert set(result) == {
        *("split", "images", "classes", "scales", "average", "fused", "per_class", "boxes", "baseline"),
        *("seconds", "images_per_second", "confusion", "interval", "data", "version", "left_out", "notes", "warnings"),
        "choices",
    }
    assert (result["split"], result["images"], result["classes"], result["baseline"]) == ("test", 24, 3, None)
    assert [set(entry) for entry in (*result["scales"], result["average"], result["fused"])] == [
        {"top1", "mean_class", "top5", "nll", "ece", "temperature", "calibrated_nll", "calibrated_ece"}
    ] * 5
    assert list(result["per_class"]) == run.classes()
    assert result["fused"]["top5"] == 1.0  # there are three classes


def test_figures_agree_with_torchmetrics(run: Run, result: dict, outputs) -> None:
    output, labels, _, _ = outputs
    scales = [logits.softmax(1) for logits in output.logits]
    expected = [*scales, torch.stack(scales).mean(0), output.probabilities]
    answers = [*result["scales"], result["average"], result["fused"]]
    assert len({figures["nll"] for figures in answers}) == 5
    for figures, probabilities in zip(answers, expected, strict=True):
        top1 = multiclass_accuracy(probabilities, labels, 3, average="micro").item()
        ece = multiclass_calibration_error(probabilities, labels, 3, n_bins=15).item()
        nll = -probabilities.gather(1, labels[:, None]).log().mean().item()
        assert figures["top1"] == pytest.approx(top1, abs=1e-6)
        assert figures["ece"] == pytest.approx(ece, abs=1e-4)
        assert figures["nll"] == pytest.approx(nll, rel=1e-4)
    predicted = output.probabilities.argmax(1)
    for number, (name, entry) in enumerate(result["per_class"].items()):
        assert entry == {"top1": (predicted[labels == number] == number).float().mean().item(), "n": 8, "left_out": 0}
        counts = torch.bincount(predicted[labels == number], minlength=3).tolist()
        cells = [[number, answer, count] for answer, count in enumerate(counts) if count]
        assert [cell for cell in result["confusion"] if cell[0] == number] == cells, name
    assert result["fused"]["mean_class"] == pytest.approx(
        sum(entry["top1"] for entry in result["per_class"].values()) / 3
    )
    low, high = result["interval"]
    assert 0 <= low < result["fused"]["top1"] < high <= 1


def test_box_figures_against_ground_truth(result: dict, outputs) -> None:
    output, _, truth, _ = outputs
    assert len(result["boxes"]) == 2
    for figures, box, proposal in zip(result["boxes"], output.boxes, output.proposals, strict=True):
        side = 2 * proposal[:, 2]
        assert side.max() - side.min() > 0.01
        assert figures["side_mean"] == pytest.approx(side.mean().item(), abs=1e-5)
        assert figures["side_min"] == pytest.approx(side.min().item(), abs=1e-5)
        assert figures["side_max"] == pytest.approx(side.max().item(), abs=1e-5)
        assert figures["at_floor"] == pytest.approx((side < 1.02 / 3).float().mean().item())
        assert figures["at_ceiling"] == pytest.approx((side > 0.98 * 0.95).float().mean().item())
        corners = torch.cat([box[:, :2] - box[:, 2:], box[:, :2] + box[:, 2:]], 1)
        assert figures["iou_mean"] == pytest.approx(box_iou(corners, truth).diagonal().mean().item(), abs=1e-5)
        x, y = ((truth[:, :2] + truth[:, 2:]) / 2).T
        inside = (corners[:, 0] <= x) & (x <= corners[:, 2]) & (corners[:, 1] <= y) & (y <= corners[:, 3])
        assert figures["hit_rate"] == pytest.approx(inside.float().mean().item())
        assert 0 < figures["coverage_mean"] < 1


def test_boxes_at_the_floor_and_ceiling_are_counted() -> None:
    metrics = BoxMetrics(0.4, 0.8)
    halves = torch.tensor([0.2, 0.203, 0.3, 0.395])
    boxes = torch.stack([torch.full((4,), 0.5), torch.full((4,), 0.5), halves], 1)
    metrics.add(boxes, boxes, torch.full((4, 4), float("nan")))
    figures = metrics.compute()
    assert figures.pop("side_std") == pytest.approx((2 * halves).std(correction=0).item())
    assert figures.pop("centre_std") == 0.0
    assert figures == pytest.approx(
        {"side_mean": 0.549, "side_min": 0.4, "side_max": 0.79, "at_floor": 0.5, "at_ceiling": 0.25}
    )


def test_split_data_and_baseline(place: Path, data: Path) -> None:
    run = make_run(place / "one", data, scales=1)
    plain = make_run(run.folder / "baseline", data, scales=1)
    fused = evaluation.evaluate(plain, split="val").fused.to_json()
    other = write_data(place / "other", count=3)
    result = evaluation.evaluate(run, data=str(other)).to_json()
    assert (result["split"], result["images"], result["boxes"]) == ("all", 27, [])
    assert result["baseline"] is None  # its figures are of other images
    validation = evaluation.evaluate(run, split="val")
    assert validation.to_json()["baseline"] == {**fused, "size": 64, "budget": None, "choices": []}
    assert [name for name, _ in validation.answers()] == ["baseline", "scale 1", "average", "fused"]
    with pytest.raises(RacnnError, match="no split 'dev'") as error:
        evaluation.evaluate(run, split="dev")
    assert error.value.hint == "--split train or val or test"


def test_tables_show_the_figures(result: dict) -> None:
    console = Console(file=io.StringIO(), width=120)
    for table in tables.tables(EvalResult.model_validate(result)):
        console.print(table)
    text = console.file.getvalue()
    for name, figures in EvalResult.model_validate(result).answers():
        assert any(name in line and f"{figures.nll:.3f}" in line for line in text.splitlines()), name
        assert any(name in line and f"{figures.mean_class:.3f}" in line for line in text.splitlines()), name
    low, high = result["interval"]
    assert "24 test images of 3 classes" in text
    assert f"{low:.3f} to {high:.3f}" in text
    assert f"{result['boxes'][1]['coverage_mean']:.3f}" in text


def test_an_older_eval_json_without_mean_class_is_read(run: Run, result: dict) -> None:
    old = json.loads(json.dumps(result))
    for answer in (*old["scales"], old["average"], old["fused"]):
        del answer["mean_class"]
    read = EvalResult.model_validate(old)
    assert read.fused.mean_class is None
    assert read.to_json() == old
    assert [values[1] for _, values in tables.accuracy(read).rows] == [""] * 5


def test_what_could_not_be_read_is_counted_per_class(place: Path, data: Path, racnn) -> None:
    run = make_run(place / "counts", data, scales=1)
    folder = place / "unreadable"
    for name in ("green", "blau"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            shutil.copy(data.parent / f"test-0-{number}.png", folder / name)
    (folder / "readme.txt").touch()
    for file in ("green/test-0-0.png", "blau/test-0-0.png", "blau/test-0-1.png"):
        (folder / file).write_bytes(b"<html>")
    (folder / "blau" / "notes.txt").touch()
    code, out, _ = racnn("eval", "--run", run.folder, "--data", folder, "--skip-bad")
    assert code == 0
    line = "3 of 12 images could not be read and were left out: blau 2, green 1"
    assert line in out.splitlines()
    assert "9 images of 3 classes" in [text.strip() for text in out.splitlines()]
    result = run.read_eval()
    assert (result.images, result.left_out) == (9, 3)
    assert {name: (entry.n, entry.left_out) for name, entry in result.per_class.items()} == {
        CLASSES[0]: (0, 0),
        "blau": (4, 2),
        "green": (5, 1),
    }
    assert any("not images, such as" in note for note in result.notes)
    assert f"note: {result.notes[0]}" in out
    text = " ".join(Page(report.write_report(run).read_text(encoding="utf-8")).text)
    assert line in text
    assert "of 4, 2 left out" in text
    assert "No images: " not in text
    assert evaluation.evaluate(run).to_json()["left_out"] == 0
    assert "could not be read" not in racnn("eval", "--run", run.folder).out


def test_many_classes_that_were_left_out_are_counted_together() -> None:
    text = describe_left_out({f"c{number:02}": 1 + (number == 7) for number in range(25)} | {"whole": 0}, 74)
    assert text.startswith("26 of 100 images could not be read and were left out: c07 2, c00 1, ")
    assert text.endswith(", c19 1, 5 more classes 5")


def test_notes_concern_the_measured_split() -> None:
    notes = ["class 'a' has no val image and therefore no val metrics", "class 'b' has no test image and so on", "x"]
    index = Index(classes=[], splits={}, skipped=[], notes=notes, fingerprint="")
    assert evaluation._notes_about("test", index) == notes[1:]
    assert evaluation._notes_about("val", index) == [notes[0], "x"]


def test_non_finite_outputs_are_a_failure(place: Path, data: Path) -> None:
    run = make_run(place / "broken", data, scales=1)
    network, _ = store.load(run.folder)
    network.scale(0).classifier.bias.data[0] = float("nan")
    store.save_weights(run.weights, network)
    with pytest.raises(RacnnError, match="not finite") as error:
        evaluation.evaluate(run)
    assert error.value.exit_code == 1
    assert not run.eval.exists()
    with pytest.raises(RacnnError, match="not finite"):
        load(run).predict(np.zeros((9, 9, 3), np.uint8))


@pytest.fixture(scope="module")
def exported(place: Path, data: Path) -> Path:
    """An ONNX file of two scales."""
    run = make_run(place / "two", data, scales=2, backbone="small_cnn")
    exporter.export_onnx(run)
    return run.onnx


def test_predictions_and_their_boxes_in_file_pixels(run: Run, outputs) -> None:
    output, _, _, items = outputs
    answers = load(run, "cpu").predict([item.path for item in items], batch=7)
    assert len(answers) == 24
    for number, (item, answer) in enumerate(zip(items, answers, strict=True)):
        assert answer.path == str(item.path)
        best = output.probabilities[number].argmax().item()
        assert answer.label == run.classes()[best]
        assert answer.probability == pytest.approx(output.probabilities[number].max().item(), abs=1e-5)
        assert [label for label, _ in answer.top] == [
            run.classes()[i] for i in output.probabilities[number].argsort(descending=True)
        ]
        assert [probability for _, probability in answer.scales] == pytest.approx(
            [logits[number].softmax(0).max().item() for logits in output.logits], abs=1e-5
        )
        for box, source in zip(answer.boxes, output.boxes, strict=True):
            x, y, half = source[number].tolist()
            # 80 × 60 pixels: the source is the middle 60 × 60.
            expected = (10 + 60 * (x - half), 60 * (y - half), 10 + 60 * (x + half), 60 * (y + half))
            assert box == pytest.approx(expected, abs=0.01)


def test_boxes_of_a_rotated_file_are_in_its_stored_pixels(run: Run, place: Path, data: Path) -> None:
    upright = Image.open(data.parent / "test-1-1.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise for viewing
    upright.transpose(Image.Transpose.ROTATE_90).save(place / "rotated.png", exif=exif)
    model = load(run)
    straight, rotated, in_memory = model.predict(
        [data.parent / "test-1-1.png", place / "rotated.png", Image.open(place / "rotated.png")]
    )
    assert in_memory.boxes[1] == pytest.approx(rotated.boxes[1], abs=1e-3)
    assert rotated.probability == pytest.approx(straight.probability, abs=1e-3)
    for (x0, y0, x1, y1), box in zip(straight.boxes, rotated.boxes, strict=True):
        assert box == pytest.approx((y0, 80 - x1, y1, 80 - x0), abs=0.05)
    assert draw.upright_boxes(read_image(place / "rotated.png"), rotated.boxes)[0] == pytest.approx(
        straight.boxes[0], abs=0.05
    )


def test_images_in_memory_and_bad_files(run: Run, place: Path, data: Path) -> None:
    file = data.parent / "test-2-0.png"
    (place / "bad.jpg").write_bytes(b"no image")
    model = load(run)
    from_file, bad, from_image, from_array = model.predict(
        [file, place / "bad.jpg", Image.open(file), np.asarray(Image.open(file))]
    )
    assert (bad.label, bad.boxes) == ("", [])
    assert "bad.jpg is not a" in bad.error
    for answer in (from_image, from_array):
        assert answer.path is None
        assert answer.label == from_file.label
        assert answer.boxes[1] == pytest.approx(from_file.boxes[1], abs=1e-3)
    (alone,) = model.predict(str(file))
    assert (alone.path, alone.label) == (str(file), from_file.label)
    assert alone.boxes[1] == pytest.approx(from_file.boxes[1], abs=1e-3)
    with pytest.raises(RacnnError, match=r"shape \(5, 5, 7\) and type float64"):
        model.predict([np.zeros((5, 5, 7))])


def test_gather_expands_names(place: Path, monkeypatch) -> None:
    folder = place / "gather"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in ("b/2.JPG", "b/c/1.png", "a.webp", "b/notes.txt", "b/.hidden.png", "a[1].png"):
        (folder / name).touch()
    images = [folder / name for name in ("a.webp", "a[1].png", "b/2.JPG", "b/c/1.png")]
    assert predict.gather([folder, folder / "b/notes.txt"]) == [*images, folder / "b/notes.txt"]
    assert predict.gather([f"{folder}/**/*.png"]) == [folder / "a[1].png", folder / "b/c/1.png"]
    assert predict.gather([folder / "a[1].png", "camera:0"]) == [folder / "a[1].png", "camera:0"]
    stdin = io.StringIO(f"{folder}/a.webp\n\n{folder}/b/c\r\n")
    assert predict.gather(["-"], stdin) == [folder / "a.webp", folder / "b/c/1.png"]
    with pytest.raises(RacnnError) as error:
        predict.gather([folder / "no", folder / "empty", "https://x.org/a.jpg", f"{folder}/*.gif", "a\x1b[2J.png"])
    for part in ("no does not exist", "empty contains no images", "a.jpg is a URL", "*.gif matches nothing"):
        assert part in error.value.message
    assert "\x1b" not in error.value.message


@pytest.mark.parametrize("trained", ["run", "file"])
def test_predict_command(run: Run, exported: Path, place: Path, data: Path, trained: str) -> None:
    model, scales = (load(run.folder), 3) if trained == "run" else (load(exported), 2)
    copy, drawings = place / f"copy-{trained}", place / f"drawings-{trained}"
    copy.mkdir()
    file = data.parent / "test-0-1.png"
    (copy / file.name).write_bytes(file.read_bytes())
    out = io.StringIO()
    sources = predict.gather([file, copy])
    assert predict.predict_command(model, sources, rows="jsonl", save=drawings, batch=1, out=out) == 0
    first, second = map(json.loads, out.getvalue().splitlines())
    assert set(first) == {"path", "label", "probability", "top", "boxes", "scales", "error", "notes"}
    assert first["boxes"] == second["boxes"]
    assert {path.name for path in drawings.iterdir()} == {"test-0-1.jpg", "test-0-1-2.jpg"}
    (place / "bad.png").write_bytes(b"")
    sources = [place / "bad.png", file]
    table, lines = io.StringIO(), io.StringIO()
    assert predict.predict_command(model, sources, out=table) == 1
    _, bad, good = table.getvalue().splitlines()
    assert "bad.png is empty" in bad
    assert good.startswith(f"{first['probability']:.3f}  {first['label']}")
    assert predict.predict_command(model, sources, rows="csv", out=lines) == 1
    bad, good = csv.DictReader(io.StringIO(lines.getvalue()))
    assert (bad["label"], bad["probability"], bad["x0_2"]) == ("", "", "")
    assert "bad.png is empty" in bad["error"]
    assert (good["label"], good["error"]) == (first["label"], "")
    assert float(good["probability"]) == pytest.approx(first["probability"], abs=1e-5)
    edges = [float(good[f"{edge}_{scales}"]) for edge in ("x0", "y0", "x1", "y1")]
    assert edges == pytest.approx(first["boxes"][scales - 2], abs=0.06)


def test_rows_of_a_batch_are_written_before_the_next_one_is_read(run: Run, data: Path) -> None:
    out, written = io.StringIO(), []

    def sources():
        for number in range(4):
            written.append(len(out.getvalue().splitlines()))
            yield data.parent / f"test-0-{number}.png"

    assert predict.predict_command(load(run), sources(), rows="jsonl", batch=2, out=out) == 0
    assert written == [0, 0, 2, 2]


def test_frames_of_a_video(run: Run, place: Path, data: Path, capsys) -> None:
    import cv2

    video = cv2.VideoWriter(str(place / "video.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (80, 60))
    for number in range(6):
        video.write(np.full((60, 80, 3), (0, 0, 40 * number), np.uint8))  # blue, green, red
    video.release()
    frames = list(predict.iterate([place / "video.avi"], every=2))
    assert [Path(frame.name).name for frame in frames] == ["video.avi#0", "video.avi#2", "video.avi#4"]
    assert frames[2].pixels[30, 40].tolist() == pytest.approx([160, 0, 0], abs=6)  # red, green, blue
    assert "--every" not in capsys.readouterr().err
    predict.predict_command(load(run), [data.parent / "test-0-1.png"], rows="jsonl", every=3, out=io.StringIO())
    assert "note: --every has no effect: no image is a frame of a video" in capsys.readouterr().err
    out = io.StringIO()
    predict.predict_command(load(run), [place / "video.avi"], rows="jsonl", every=3, save=place / "drawings", out=out)
    assert [json.loads(line)["path"][-11:] for line in out.getvalue().splitlines()] == ["video.avi#0", "video.avi#3"]
    assert {path.name for path in (place / "drawings").iterdir()} == {"video.avi-0.jpg", "video.avi-3.jpg"}
    (place / "no.mp4").write_bytes(b"not a video")
    os.mkfifo(place / "pipe.mp4")
    answers = load(run).predict(predict.iterate([place / "no.mp4", place / "pipe.mp4"]))
    assert [answer.label for answer in answers] == ["", ""]
    assert "no.mp4 cannot be opened as a video" in answers[0].error
    assert "pipe.mp4 is not a regular file" in answers[1].error
    assert load(run).predict(Frame("x", frames[0].pixels))[0].path == "x"


def test_drawings_replace_no_file(run: Run, data: Path, place: Path) -> None:
    folder = place / "mixed"
    folder.mkdir()
    image = next(data.parent.rglob("*.*g"))
    shutil.copy(image, folder / "a.jpg")
    before = (folder / "a.jpg").read_bytes()
    for count in (2, 4):  # the second time, the drawings are among the images
        predict.predict_command(load(run), predict.gather([folder]), save=folder, out=io.StringIO())
        assert len(list(folder.iterdir())) == count
    assert (folder / "a.jpg").read_bytes() == before


def test_a_pattern_of_folders_expands_to_their_images(data: Path, place: Path) -> None:
    (place / "groups" / "empty").mkdir(parents=True)
    pattern = str(place / "groups" / "*")
    with pytest.raises(RacnnError, match="matches no images"):
        predict.gather([pattern])
    (place / "groups" / "full").mkdir()
    shutil.copy(next(data.parent.rglob("*.*g")), place / "groups" / "full")
    assert predict.gather([pattern]) == predict.gather([place / "groups" / "full"]) != []


def test_standard_input_must_be_a_list_of_names(place: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xd8\xff\xe0\0\x10JFIF\0\n"), "utf-8"))
    with pytest.raises(RacnnError, match=r"^standard input is not a list of file names"):
        predict.gather(["-"])
    (place / "odd").mkdir()
    name = os.fsdecode(b"\xe9.jpg")
    (place / "odd" / name).touch()
    names = io.BytesIO(os.fsencode(place / "odd" / name) + b"\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(names, "utf-8"))
    assert predict.gather(["-"]) == [place / "odd" / name]


def test_panel_shows_the_boxes_and_their_views() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[20:40, 120:140] = (255, 0, 0)
    panel = draw.panel(pixels, [(110.0, 10.0, 150.0, 50.0), (120.0, 20.0, 140.0, 40.0)], height=400, width=800)
    # Enlarged four times; the frame surrounds its box.
    color = tuple(int(draw.COLORS[1][i : i + 2], 16) for i in (1, 3, 5))
    assert panel.getpixel((520, 38)) == color
    assert panel.getpixel((438, 120)) == color
    assert panel.getpixel((520, 120)) == (255, 0, 0)
    assert panel.getpixel((300, 120)) == (0, 0, 0)
    first, second = (800 + 12 + 97, 97), (800 + 12 + 97, 400 - 97)
    assert panel.getpixel(first) == (255, 0, 0)  # the center of scale 2's view
    assert panel.getpixel((first[0] + 70, first[1])) == (0, 0, 0)
    assert panel.getpixel((second[0] + 70, second[1])) == (255, 0, 0)  # scale 3 sees only red
    prediction = Prediction("name.jpg", "a label that is much too long " * 9, 0.5, scales=[("a", 0.5)])
    sheet = draw.sheet(pixels, [], prediction)
    assert sheet.width == 864


class Page(HTMLParser):
    """A parsed page: its tags and its text; every tag must be closed."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


def epoch(stage: str, phase: str, number: int, *, scales: int, losses: dict[str, float]) -> EpochEvent:
    val: dict = {"scales": [{"top1": 0.4, "nll": 1.0 / number}] * scales}
    if scales > 1:
        answer = {"top1": 0.5, "nll": 0.9}
        box = {"side_mean": 0.5, "side_std": 0.1, "at_floor": 0.0, "at_ceiling": 0.0}
        val |= {"average": answer, "fused": answer, "rank": 0.1, "boxes": [box] * (scales - 1)}
    return EpochEvent.model_validate(
        {
            **{"stage": stage, "phase": phase, "round": 1, "epoch": number, "epochs": 2},
            **{"train_loss": losses, "val": val, "seconds": 40.0, "images_per_second": 9.0},
        }
    )


def test_the_report_is_one_self_contained_page(run: Run, result: dict) -> None:
    run.log.unlink(missing_ok=True)
    for number in (1, 2):
        run.append_log(epoch("pretrain-cnn", "", number, scales=1, losses={"classification 1": 1.0}))
    for number in (1, 2):
        losses = {"rank 1-2": 0.1, "rank 2-3": 0.2}
        run.append_log(epoch("alternate", "APN phase", number, scales=3, losses=losses))
    validation = epoch("alternate", "", 1, scales=3, losses={}).val
    run.append_log(RoundEvent(round=1, val=validation))
    write_json(run.eval, result | {"baseline": result["fused"] | {"top1": 0.123, "size": 32}})
    text = report.write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert "<b>red</b>" not in text  # a class name is text, not markup
    assert CLASSES[0] in page.text
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for tag, attrs in page.tags if tag == "img")
    assert page.count("img") == report.GALLERY_IMAGES
    # Curves: top-1 has 3 scales, average and fused; NLL 3; losses 1 + 2; sides 2.
    assert page.count("polyline") == 5 + 3 + 3 + 2
    assert sum(tag == "rect" and attrs["class"] in ("correct", "wrong") for tag, attrs in page.tags) == len(
        result["confusion"]
    )
    for figure in ("0.123", f"{result['fused']['nll']:.3f}", f"{result['boxes'][0]['iou_mean']:.3f}"):
        assert figure in page.text
    assert "4 epochs, 3 min of training." in page.text
    headings = [text for text in page.text if text in HEADINGS]
    assert headings == HEADINGS
    assert report.write_report(run).read_text(encoding="utf-8") == text


HEADINGS = ["Accuracy", "Boxes", "Images", "Training", "Accuracy per class", "Confusion matrix", "Recipe"]


@pytest.mark.parametrize("correct", [True, False])
def test_the_report_escapes_every_name(place: Path, data: Path, monkeypatch, correct: bool) -> None:
    """Names of classes, files, phases and losses and the recipe's description are text, whatever they contain."""
    markup = "<script>alert('&')</script>{{ 7 * 7 }}{% raw %}\""
    run = make_run(place / f"markup-{correct}", data, scales=2)
    result = evaluation.evaluate(run).to_json()
    names = [f"{markup}{number}" for number in range(3)]
    result["per_class"] = dict(zip(names, result["per_class"].values(), strict=True))
    write_json(run.eval, result)
    run.append_log(epoch("alternate", markup, 1, scales=2, losses={markup: 1.0}))

    class Network:
        def predict(self, paths: list[Path]) -> list[Prediction]:
            label = CLASSES[0] if correct else markup
            box = (1.0, 1.0, 9.0, 9.0)
            return [Prediction(str(path), label, 0.5, boxes=[box], scales=[(markup, 0.5)]) for path in paths]

    monkeypatch.setattr(report, "load", lambda _: Network())
    monkeypatch.setattr(report, "show", lambda name: f"{markup}{name}")
    html = report.write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert page.count("img") == report.GALLERY_IMAGES  # also if no answer is correct
    assert all(attrs["alt"].startswith(markup) for tag, attrs in page.tags if tag == "img")
    assert {*names, markup, run.recipe().about} <= {text.strip() for text in page.text}
    assert sum(markup in text for text in page.text) > report.GALLERY_IMAGES
    assert "<script>alert(1)</script>" in page.text


def test_a_report_of_many_classes_lists_the_most_confused_pairs(run: Run, result: dict) -> None:
    before = run.eval.read_text()
    names = [f"species {number}" for number in range(report.MATRIX_CLASSES + 1)]
    cells = [[number, number, 9] for number in range(len(names))] + [[3, 4, 2], [5, 6, 7]]
    many = {"classes": len(names), "images": sum(cell[2] for cell in cells)}
    many |= {"per_class": {name: {"top1": 0.9, "n": 10} for name in names}}
    write_json(run.eval, result | many | {"confusion": sorted(cells)})
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    run.eval.write_text(before)
    assert "species 5 species 6 7 species 3 species 4 2" in " ".join(" ".join(page.text).split())
    assert not any(attrs.get("class") == "matrix" for _, attrs in page.tags)


def test_report_without_data_or_eval(place: Path, data: Path) -> None:
    run = make_run(place / "lonely", data, scales=1)
    with pytest.raises(RacnnError, match=r"eval\.json does not exist") as error:
        report.write_report(run)
    assert "racnn eval" in error.value.hint
    evaluation.evaluate(run)
    run.recipe_file.write_text(run.recipe_file.read_text().replace(str(data), str(place / "gone.csv")))
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    assert any(text.startswith("No images: ") for text in page.text)
    assert "log.jsonl has no epochs." in page.text
    assert page.count("img") == 0


def test_data_that_changed_since_training_are_refused(here) -> None:
    """A new file changes the split: a test image may have been a training image."""
    from racnn_cli import api, recipe
    from racnn_cli.data.datasets import write

    write("fieldguide", here / "generated", recipe.Sample(images=48, size=64), seed=0)
    for image in sorted((here / "generated").glob("*/*/*.png")):
        target = here / "birds" / image.parent.name / f"{image.parent.parent.name}-{image.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.rename(target)
    small = {"quick": True, "model.scales": 1, "model.sizes": [32], "data.source": 32, "data.path": "birds"}
    run, _ = api.train("tiny", out="run", changes=small, quiet=True)
    first = next(iter((here / "birds").iterdir()))
    (first / "another.png").write_bytes(next(first.glob("*.png")).read_bytes())
    with pytest.raises(RacnnError, match="have changed since the run was started"):
        evaluation.evaluate(run)
    with pytest.raises(RacnnError, match="have changed since the run was started"):
        api.resume(run, quiet=True)
    assert evaluation.evaluate(run, data="birds").split == "all"
    assert evaluation.evaluate(run, data="birds").images == 49


@pytest.mark.parametrize("width", [40, 80, 100])
def test_figures_are_whole_on_a_terminal_of_any_width(run: Run, width: int) -> None:
    result = evaluation.evaluate(run)
    console = Console(file=io.StringIO(), width=width)
    for table in tables.tables(result, width):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for answer in (*result.scales, result.average, result.fused):
        assert answer.calibrated_nll is not None
        assert answer.calibrated_ece is not None
        for value in (answer.top1, answer.nll, answer.ece, answer.calibrated_nll, answer.calibrated_ece):
            assert f"{value:.3f}" in text
    for box in result.boxes:
        assert f"{box.side_mean:.3f}" in text
    assert ("━" in text) == (width > 40)
