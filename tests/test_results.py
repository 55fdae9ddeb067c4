"""From a run folder to figures, an ONNX file, predictions, drawings and the page. No network is trained."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from rich.console import Console
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from torchvision.ops import box_iou

import racnn_cli
from racnn_cli import recipe as recipes
from racnn_cli.core import model as models
from racnn_cli.core import store
from racnn_cli.data.images import Pictures, load_source, read_image
from racnn_cli.data.index import build_index
from racnn_cli.errors import RacnnError
from racnn_cli.results import draw, evaluate, export, predict, report
from racnn_cli.run import Run, write_json

CLASSES = ["<b>red</b> & 'co'", "green", "blau"]
SIDE = 48


def write_data(folder: Path, count: int = 8) -> Path:
    """80 × 60 pixels of noise with a coloured square whose place is in the CSV; so many a class and split."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for label, name in enumerate(CLASSES):
        for split in ("train", "val", "test"):
            for number in range(count):
                pixels = generator.integers(0, 120, (60, 80, 3), dtype=np.uint8)
                x, y = int(generator.integers(10, 50)), int(generator.integers(0, 40))
                pixels[y : y + 20, x : x + 20, label] = 255
                file = folder / f"{split}-{label}-{number}.png"
                Image.fromarray(pixels).save(file)
                rows.append([file.name, name, split, x, y, 20, 20])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "x", "y", "w", "h"], *rows])
    return folder / "labels.csv"


def make_run(folder: Path, data: Path, *, scales: int) -> Run:
    torch.manual_seed(0)
    tree = {
        "name": "try",
        "about": "<script>alert(1)</script>",
        "data": {"path": str(data), "source": SIDE},
        "model": {
            "backbone": "test_resnet",
            "weights": "none",
            "scales": scales,
            "sizes": [64] * scales,
            "apn_hidden": 16,
        },
        "train": {"batch": 5, "device": "cpu"},
    }
    recipe = recipes.Recipe.model_validate(tree)
    classes = build_index(recipe.data, seed=0).classes
    run = Run.create(recipe, classes, folder)
    network = models.build(recipe.model, len(classes), source=SIDE)
    with torch.no_grad():  # loud weights, so that answers and boxes differ from picture to picture
        for name, tensor in network.named_parameters():
            if "classifier.weight" in name or "fusion.weight" in name:
                tensor.normal_(std=3.0)
            if "apn.hidden.weight" in name:
                tensor.mul_(30)
            if "apn.box.weight" in name:
                tensor.normal_(std=0.7)
    store.save_weights(run.weights, network)
    return run


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
    return evaluate.evaluate(run)


@pytest.fixture(scope="module")
def outputs(run: Run):
    """All test pictures in one forward pass: the independent way to the figures."""
    network, _ = store.load(run.folder)
    recipe = run.recipe()
    items = build_index(recipe.data, seed=0, classes=run.classes()).splits["test"]
    pictures = Pictures(items, recipe.data, SIDE, seed=0, augment=False)
    samples = [pictures[(0, number)] for number in range(len(items))]
    with torch.inference_mode():
        output = network(torch.stack([sample["image"] for sample in samples]))
    labels = torch.stack([sample["label"] for sample in samples])
    return output, labels, torch.stack([sample["box"] for sample in samples]), items


def test_eval_json_has_the_promised_keys(run: Run, result: dict) -> None:
    assert json.loads(run.eval.read_text()) == result
    assert set(result) == {
        *("split", "images", "classes", "scales", "average", "fused", "per_class", "boxes", "baseline"),
        *("seconds", "images_per_second", "confusion", "interval", "data"),
    }
    assert (result["split"], result["images"], result["classes"], result["baseline"]) == ("test", 24, 3, None)
    assert [set(entry) for entry in (*result["scales"], result["average"], result["fused"])] == [
        {"top1", "top5", "nll", "ece"}
    ] * 5
    assert list(result["per_class"]) == run.classes()
    assert result["fused"]["top5"] == 1.0  # of three classes


def test_figures_agree_with_torchmetrics_on_all_pictures_at_once(run: Run, result: dict, outputs) -> None:
    output, labels, _, _ = outputs
    shares = [logits.softmax(1) for logits in output.logits]
    expected = [*shares, torch.stack(shares).mean(0), output.probabilities]
    found = [*result["scales"], result["average"], result["fused"]]
    assert len({figures["nll"] for figures in found}) == 5
    for figures, probabilities in zip(found, expected, strict=True):
        top1 = multiclass_accuracy(probabilities, labels, 3, average="micro").item()
        ece = multiclass_calibration_error(probabilities, labels, 3, n_bins=15).item()
        nll = -probabilities.gather(1, labels[:, None]).log().mean().item()
        assert figures["top1"] == pytest.approx(top1, abs=1e-6)
        assert figures["ece"] == pytest.approx(ece, abs=1e-4)
        assert figures["nll"] == pytest.approx(nll, rel=1e-4)
    answers = output.probabilities.argmax(1)
    for number, (name, entry) in enumerate(result["per_class"].items()):
        assert entry == {"top1": (answers[labels == number] == number).float().mean().item(), "n": 8}
        assert (
            result["confusion"][number] == torch.bincount(answers[labels == number], minlength=3).tolist()
        ), name
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
        found = torch.cat([box[:, :2] - box[:, 2:], box[:, :2] + box[:, 2:]], 1)
        assert figures["iou_mean"] == pytest.approx(box_iou(found, truth).diagonal().mean().item(), abs=1e-5)
        x, y = ((truth[:, :2] + truth[:, 2:]) / 2).T
        inside = (found[:, 0] <= x) & (x <= found[:, 2]) & (found[:, 1] <= y) & (y <= found[:, 3])
        assert figures["hit_rate"] == pytest.approx(inside.float().mean().item())
        assert 0 < figures["coverage_mean"] < 1


def test_bounds_are_counted() -> None:
    sides = evaluate.Sides(0.4, 0.8)
    halves = torch.tensor([0.2, 0.203, 0.3, 0.395])
    boxes = torch.stack([torch.full((4,), 0.5), torch.full((4,), 0.5), halves], 1)
    sides.add(boxes, boxes, torch.full((4, 4), float("nan")))
    assert sides.figures() == pytest.approx(
        {"side_mean": 0.549, "side_min": 0.4, "side_max": 0.79, "at_floor": 0.5, "at_ceiling": 0.25}
    )


def test_split_data_and_baseline(place: Path, data: Path) -> None:
    run = make_run(place / "one", data, scales=1)
    plain = make_run(run.folder / "baseline", data, scales=1)
    write_json(plain.eval, {"split": "val", "fused": {"top1": 0.5, "top5": 1.0, "nll": 1.0, "ece": 0.1}})
    other = write_data(place / "other", count=3)
    result = evaluate.evaluate(run, data=str(other))
    assert (result["split"], result["images"], result["boxes"]) == ("all", 27, [])
    assert result["baseline"] is None  # its figures are of other pictures
    result = evaluate.evaluate(run, split="val")
    assert result["baseline"] == {"top1": 0.5, "top5": 1.0, "nll": 1.0, "ece": 0.1, "size": 64}
    assert [name for name, _ in evaluate.rows(result)] == ["baseline", "scale 1", "average", "fused"]
    with pytest.raises(RacnnError, match="no split 'dev'") as fault:
        evaluate.evaluate(run, split="dev")
    assert fault.value.hint == "--split train or val or test"


def test_tables_show_the_figures(result: dict) -> None:
    console = Console(file=io.StringIO(), width=120)
    for table in evaluate.tables(result):
        console.print(table)
    text = console.file.getvalue()
    for name, figures in evaluate.rows(result):
        assert any(name in line and f"{figures['nll']:.3f}" in line for line in text.splitlines()), name
    low, high = result["interval"]
    assert "24 test images of 3 classes" in text
    assert f"{low:.3f} to {high:.3f}" in text
    assert f"{result['boxes'][1]['coverage_mean']:.3f}" in text


def test_outputs_that_are_not_finite_are_a_failure(place: Path, data: Path) -> None:
    run = make_run(place / "broken", data, scales=1)
    network, _ = store.load(run.folder)
    network.scale(0).classifier.bias.data[0] = float("nan")
    store.save_weights(run.weights, network)
    with pytest.raises(RacnnError, match="not finite") as fault:
        evaluate.evaluate(run)
    assert fault.value.exit_code == 1
    assert not run.eval.exists()
    with pytest.raises(RacnnError, match="not finite"):
        predict.load(run).predict(np.zeros((9, 9, 3), np.uint8))


@pytest.fixture(scope="module")
def exported(run: Run) -> dict:
    return export.export_onnx(run)


def test_onnx_file_answers_as_the_network_does(run: Run, exported: dict, outputs, capfd) -> None:
    output, _, _, items = outputs
    assert exported["checked_on"] == "validation pictures"
    assert exported["inputs"] == {"image": ["batch", 3, SIDE, SIDE]}
    assert exported["outputs"]["boxes"] == ["batch", 2, 3]
    assert max(exported["max_difference"].values()) < 1e-3
    assert str(run.onnx) in export.describe(exported)
    pixels = np.stack([load_source(item.path, run.recipe().data, SIDE)[0] for item in items[:3]])
    session = onnxruntime.InferenceSession(str(run.onnx))
    names = [value.name for value in session.get_outputs()]
    assert names == ["probabilities", "logits_1", "logits_2", "logits_3", "boxes"]
    image = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 255
    found = dict(zip(names, session.run(names, {"image": image}), strict=True))
    assert np.abs(found["probabilities"] - output.probabilities[:3].numpy()).max() < 1e-3
    assert np.abs(found["logits_3"] - output.logits[2][:3].numpy()).max() < 1e-2
    assert np.abs(found["boxes"] - torch.stack(output.boxes, 1)[:3].numpy()).max() < 1e-3
    meta = {entry.key: entry.value for entry in onnx.load(run.onnx).metadata_props}
    assert json.loads(meta["classes"]) == run.classes()
    assert (meta["source"], meta["sizes"], meta["fit"]) == (str(SIDE), "[64, 64, 64]", "crop")
    assert meta["racnn"] == racnn_cli.__version__
    assert len(meta["recipe_sha256"]) == 64


def test_a_file_that_disagrees_is_not_left_behind(run: Run, exported: dict, place: Path, monkeypatch) -> None:
    network, _ = store.load(run.folder)
    images = torch.rand(6, 3, SIDE, SIDE)
    export.compare(network, run.onnx, images, "noise")
    assert network.fusion is not None
    network.fusion.bias.data[0] += 0.5
    with pytest.raises(RacnnError, match=r"differ by .* in probabilities on noise") as fault:
        export.compare(network, run.onnx, images, "noise")
    assert fault.value.exit_code == 1
    monkeypatch.setattr(export, "_to_onnx", lambda *_: onnx.load(run.onnx))
    store.save_weights(run.weights.with_name("other.safetensors"), network)
    monkeypatch.setattr(store, "load", lambda _: (network.eval(), run))
    folder = place / "elsewhere"
    with pytest.raises(RacnnError, match="no file was written"):
        export.export_onnx(run, folder / "net.onnx")
    assert list(folder.iterdir()) == []


def test_a_single_scale_exports_without_boxes_and_without_data(place: Path, data: Path, capfd) -> None:
    run = make_run(place / "single", data, scales=1)
    text = run.recipe_file.read_text().replace(str(data), str(place / "gone.csv"))
    run.recipe_file.write_text(text)
    made = export.export_onnx(run, place / "single.onnx")
    assert made["checked_on"] == "noise"
    assert list(made["outputs"]) == ["probabilities", "logits_1"]
    assert capfd.readouterr() == ("", "")


def test_safetensors_folder_loads_and_answers_the_same(run: Run, place: Path, data: Path) -> None:
    folder = export.export_safetensors(run, place / "shared")
    assert {file.name for file in folder.iterdir()} == {"recipe.toml", "classes.json", "weights.safetensors"}
    picture = data.parent / "test-0-0.png"
    assert racnn_cli.load(folder).predict(picture) == racnn_cli.load(run.folder).predict(picture)
    with pytest.raises(RacnnError, match="not empty"):
        export.export_safetensors(run, folder)


def test_predictions_and_their_boxes_in_pixels(run: Run, outputs) -> None:
    output, _, _, items = outputs
    found = predict.load(run, "cpu").predict([item.path for item in items], batch=7)
    assert len(found) == 24
    for number, (item, answer) in enumerate(zip(items, found, strict=True)):
        assert answer.path == str(item.path)
        best = output.probabilities[number].argmax().item()
        assert answer.label == run.classes()[best]
        assert answer.probability == pytest.approx(output.probabilities[number].max().item(), abs=1e-5)
        assert [label for label, _ in answer.top] == [
            run.classes()[i] for i in output.probabilities[number].argsort(descending=True)
        ]
        assert [share for _, share in answer.scales] == pytest.approx(
            [logits[number].softmax(0).max().item() for logits in output.logits], abs=1e-5
        )
        for box, source in zip(answer.boxes, output.boxes, strict=True):
            x, y, half = source[number].tolist()
            # 80 × 60 pixels: the source is the middle 60 × 60.
            expected = (10 + 60 * (x - half), 60 * (y - half), 10 + 60 * (x + half), 60 * (y + half))
            assert box == pytest.approx(expected, abs=0.01)


def test_a_turned_file_gets_its_boxes_in_its_own_pixels(run: Run, place: Path, data: Path) -> None:
    upright = Image.open(data.parent / "test-1-1.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for viewing
    upright.transpose(Image.Transpose.ROTATE_90).save(place / "turned.png", exif=exif)
    model = predict.load(run)
    straight, turned, in_memory = model.predict(
        [data.parent / "test-1-1.png", place / "turned.png", Image.open(place / "turned.png")]
    )
    assert in_memory.boxes[1] == pytest.approx(turned.boxes[1], abs=1e-3)
    assert turned.probability == pytest.approx(straight.probability, abs=1e-3)
    for (x0, y0, x1, y1), box in zip(straight.boxes, turned.boxes, strict=True):
        assert box == pytest.approx((y0, 80 - x1, y1, 80 - x0), abs=0.05)
    assert draw.upright_boxes(read_image(place / "turned.png"), turned.boxes)[0] == pytest.approx(
        straight.boxes[0], abs=0.05
    )


def test_pictures_in_memory_and_bad_files(run: Run, place: Path, data: Path) -> None:
    file = data.parent / "test-2-0.png"
    (place / "bad.jpg").write_bytes(b"no picture")
    model = predict.load(run)
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
    with pytest.raises(RacnnError, match=r"shape \(5, 5\) and type float64"):
        model.predict([np.zeros((5, 5))])


def test_gather(place: Path) -> None:
    folder = place / "gather"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in ("b/2.JPG", "b/c/1.png", "a.webp", "b/notes.txt", "b/.hidden.png"):
        (folder / name).touch()
    assert predict.gather([folder, folder / "b/notes.txt"]) == [
        folder / name for name in ("a.webp", "b/2.JPG", "b/c/1.png", "b/notes.txt")
    ]
    with pytest.raises(RacnnError) as fault:
        predict.gather([folder / "no", folder / "empty"])
    assert "no does not exist" in fault.value.message
    assert "empty holds no pictures" in fault.value.message


def test_predict_command(run: Run, place: Path, data: Path, capsys) -> None:
    twice = place / "again"
    twice.mkdir()
    file = data.parent / "test-0-1.png"
    (twice / file.name).write_bytes(file.read_bytes())
    assert predict.predict_command(run.folder, [file, twice], as_json=True, save=place / "drawn") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(first) == {"path", "label", "probability", "top", "boxes", "scales", "error"}
    assert first["boxes"] == second["boxes"]
    assert {path.name for path in (place / "drawn").iterdir()} == {"test-0-1.jpg", "test-0-1-2.jpg"}
    (place / "bad.png").write_bytes(b"")
    assert predict.predict_command(run.folder, [place / "bad.png", file], as_json=False, save=None) == 1
    text = capsys.readouterr().out
    assert f"{first['probability']:.3f}" in text
    assert "bad.png is empty" in text.replace("\n", " ")
    assert "1 of 2 pictures could not be read" in text


def test_drawing_shows_the_box_and_what_is_in_it() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[20:40, 120:140] = (255, 0, 0)
    panel = draw.panel(
        pixels, [(110.0, 10.0, 150.0, 50.0), (120.0, 20.0, 140.0, 40.0)], height=400, width=800
    )
    # Four times as large; the frame lies outside of its box.
    colour = tuple(int(draw.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5))
    assert panel.getpixel((520, 38)) == colour
    assert panel.getpixel((438, 120)) == colour
    assert panel.getpixel((520, 120)) == (255, 0, 0)
    assert panel.getpixel((300, 120)) == (0, 0, 0)
    first, second = (800 + 12 + 97, 97), (800 + 12 + 97, 400 - 97)
    assert panel.getpixel(first) == (255, 0, 0)  # the middle of scale 2's view
    assert panel.getpixel((first[0] + 70, first[1])) == (0, 0, 0)
    assert panel.getpixel((second[0] + 70, second[1])) == (255, 0, 0)  # scale 3 sees nothing but red
    paper = draw.sheet(pixels, [], ("a label that is far too long " * 9, 0.5), [("a", 0.5)], "name.jpg")
    assert paper.width == 864


class Page(HTMLParser):
    """Counts tags, keeps the text, and checks that what is opened is closed."""

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


def epoch(stage: str, phase: str, number: int, scales: int, losses: dict) -> dict:
    val: dict = {"scales": [{"top1": 0.4, "nll": 1.0 / number}] * scales}
    if scales > 1:
        both = {"top1": 0.5, "nll": 0.9}
        box = {"side_mean": 0.5, "side_std": 0.1, "at_floor": 0.0, "at_ceiling": 0.0}
        val |= {"average": both, "fused": both, "rank": 0.1, "boxes": [box] * (scales - 1)}
    event = {"event": "epoch", "stage": stage, "phase": phase, "round": 1, "epoch": number, "epochs": 2}
    return event | {"train_loss": losses, "val": val, "seconds": 40.0, "images_per_second": 9.0}


def test_report_is_one_page_that_needs_nothing_else(run: Run, result: dict) -> None:
    run.log.unlink(missing_ok=True)
    for number in (1, 2):
        run.append_log(epoch("pretrain-cnn", "", number, 1, {"classification 1": 1.0}))
    for number in (1, 2):
        run.append_log(epoch("alternate", "APN phase", number, 3, {"rank 1-2": 0.1, "rank 2-3": 0.2}))
    run.append_log({"event": "round", "stage": "alternate", "round": 1})
    write_json(run.eval, result | {"baseline": result["fused"] | {"top1": 0.123, "size": 32}})
    text = report.write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert "<b>red</b>" not in text  # a class name is text, not markup
    assert CLASSES[0] in page.text
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for tag, attrs in page.tags if tag == "img")
    assert page.count("img") == report.SHOWN
    # Curves: top-1 has 3 scales, average and fused; NLL 3; losses 1 + 2; sides 2.
    assert page.count("polyline") == 5 + 3 + 3 + 2
    assert sum(tag == "rect" and attrs["class"] in ("right", "wrong") for tag, attrs in page.tags) == sum(
        value > 0 for row in result["confusion"] for value in row
    )
    for figure in ("0.123", f"{result['fused']['nll']:.3f}", f"{result['boxes'][0]['iou_mean']:.3f}"):
        assert figure in page.text
    assert "4 epochs, 3 min of training." in page.text


def test_report_without_data_or_eval(place: Path, data: Path) -> None:
    run = make_run(place / "lonely", data, scales=1)
    with pytest.raises(RacnnError, match=r"eval\.json does not exist") as fault:
        report.write_report(run)
    assert "racnn eval" in fault.value.hint
    evaluate.evaluate(run)
    run.recipe_file.write_text(run.recipe_file.read_text().replace(str(data), str(place / "gone.csv")))
    page = Page(report.write_report(run).read_text(encoding="utf-8"))
    assert any(text.startswith("No pictures: ") for text in page.text)
    assert "log.jsonl holds no epochs." in page.text
    assert page.count("img") == 0


def test_data_that_changed_since_the_start_are_not_evaluated_in_silence(here) -> None:
    """A new file moves the split: what is a test picture now may have been trained on."""
    from racnn_cli import api, recipe
    from racnn_cli.data.samples import write

    write("fieldguide", here / "drawn", recipe.Sample(images=48, size=64), seed=0)
    for picture in sorted((here / "drawn").glob("*/*/*.png")):
        target = here / "birds" / picture.parent.name / f"{picture.parent.parent.name}-{picture.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.rename(target)
    small = {"quick": True, "model.scales": 1, "model.sizes": [32], "data.source": 32, "data.path": "birds"}
    run, _ = api.train("tiny", out="run", changes=small, quiet=True)
    first = next(iter((here / "birds").iterdir()))
    (first / "another.png").write_bytes(next(first.glob("*.png")).read_bytes())
    with pytest.raises(RacnnError, match="have changed since it was started"):
        evaluate.evaluate(run)
    with pytest.raises(RacnnError, match="have changed since it was started"):
        api.resume(run, quiet=True)
    assert evaluate.evaluate(run, data="birds")["split"] == "all"
    assert evaluate.evaluate(run, data="birds")["images"] == 49
