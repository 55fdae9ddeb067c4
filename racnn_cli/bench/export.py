"""`racnn bench export`: whether many backbones train, export and pass their checks, how large the files are, how fast.

Each backbone is trained in every stage for an epoch or two on a few drawn birds: enough to change its weights, not for
accuracy. The ONNX file is compared with PyTorch as in every export, and again as in `racnn export --check`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.markup import escape

from racnn_cli import api
from racnn_cli.bench import BenchResult, Options
from racnn_cli.bench.summary import new_table, report
from racnn_cli.errors import RacnnError
from racnn_cli.export import quantize
from racnn_cli.export.check import check
from racnn_cli.export.graph import ExportedGraph
from racnn_cli.export.images import CheckImages, labelled_images
from racnn_cli.export.onnx import export_onnx
from racnn_cli.export.onnx_network import as_input, open_session
from racnn_cli.run import Run

MODELS: dict[str, Sequence[int]] = {
    "vgg11": (224, 224, 224),
    "vgg19": (448, 224, 224),
    "resnet18": (224, 224, 224),
    "regnetx_002": (224, 224, 224),
    "densenet121": (224, 224, 224),
    "mobilenetv3_small_050": (224, 224, 224),
    "tf_efficientnet_lite0": (224, 224, 224),
    "ghostnet_100": (224, 224, 224),
    "convnext_tiny": (224, 224, 224),
    "mambaout_femto": (224, 224, 224),
    "swin_tiny_patch4_window7_224": (224, 224, 224),
    "vit_small_patch16_224": (224, 224, 224),
}
"""Backbone to the sizes of three scales: VGG, and ten families of timm."""

IMAGES = 32


def run(options: Options) -> BenchResult:
    """Measure every backbone of `MODELS`."""
    return measure(MODELS)


def measure(models: Mapping[str, Sequence[int]]) -> BenchResult:
    """Train briefly and export in float32 and int8, per backbone; an error does not stop the others.

    Args:
        models: name to the sizes of three scales.

    Returns:
        per backbone `model`, `error` (empty, or the message), `sizes`, `side` (of the source), `bytes`,
        `max_difference` and `agreement` (as in `export.check.compare`), relative speeds `over_torch` and
        `int8_over_float32`, and `int8_bytes`.
    """
    entries = []
    for name, sizes in models.items():
        start, entry = time.perf_counter(), {"model": name, "error": "", "side": max(sizes), "sizes": list(sizes)}
        with tempfile.TemporaryDirectory() as folder:
            try:
                entry |= _measure_model(name, sizes, Path(folder))
            except RacnnError as error:
                entry["error"] = error.message
        report(f"{name}: {entry['error'] or 'ok'}, {time.perf_counter() - start:.0f} s")
        entries.append(entry)
    return summarize(entries)


def _measure_model(name: str, sizes: Sequence[int], folder: Path) -> dict[str, Any]:
    changes = {
        "model.backbone": name,
        "model.sizes": list(sizes),
        "data.source": max(sizes),
        "data.sample.size": max(sizes),
        "data.sample.images": IMAGES,
        "train.batch": 8,
        "train.device": "cpu",
        "quick": True,
    }
    trained, _ = api.train("tiny", out=folder / "run", changes=changes, quiet=True)
    float32 = export_onnx(trained)
    images = CheckImages(trained, max(sizes))
    (folder / "images").mkdir()
    for number, square in enumerate(images.squares(4, max(sizes))):
        Image.fromarray(square).save(folder / "images" / f"{number}.png")
    second = check(trained, None, folder / "images")
    compressed = Path(shutil.copy(trained.onnx, trained.onnx.with_name("int8.onnx")))  # not traced again
    validation = labelled_images(trained, "val", max(sizes))
    graph = ExportedGraph.from_run(trained)
    int8 = quantize.compress(trained, graph, compressed, precision="int8", images=validation, max_drop=100.0)
    return {
        "bytes": float32["bytes"],
        "max_difference": float32["max_difference"],
        "agreement": [a + b for a, b in zip(float32["agreement"], second["agreement"], strict=True)],
        "over_torch": _speed_over_torch(trained, graph, images),
        "int8_bytes": compressed.stat().st_size,
        "int8_over_float32": int8["times_faster"],
    }


def _speed_over_torch(trained: Run, graph: ExportedGraph, images: CheckImages) -> float:
    """Measure the speed of the exported file relative to PyTorch, one image at a time."""
    session = open_session(trained.onnx)
    image = as_input(images.squares(1, graph.model.source), raw=False)

    def run_torch() -> object:
        with torch.inference_mode():
            return graph(torch.from_numpy(image))

    return quantize.speedup(run_torch, lambda: session.run(None, {"image": image}))


CELLS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "MiB": lambda entry: f"{entry['bytes'] / 2**20:.0f}",
    "same class": lambda entry: "{} of {}".format(*entry["agreement"]),
    "probabilities\ndiffer by": lambda entry: f"{entry['max_difference']['probabilities']:.0e}",
    "boxes by\n(of the side)": lambda entry: f"{entry['max_difference']['boxes']:.0e}",
    "× PyTorch": lambda entry: f"{entry['over_torch']:.2f}",
    "int8\nMiB": lambda entry: f"{entry['int8_bytes'] / 2**20:.0f}",
    "int8\n× float32": lambda entry: f"{entry['int8_over_float32']:.2f}",
}
"""Heading to the text of a cell."""


def summarize(entries: Sequence[Mapping[str, Any]]) -> BenchResult:
    """Summarize the results of `measure`."""
    notes = [
        f"every stage is trained on {IMAGES} drawn birds; ok: the file passed its check, and --check afterwards",
        "×: relative speed, one image at a time, median of 15 alternating turns, on the CPU",
        *(escape(f"{entry['model']}: {entry['error']}") for entry in entries if entry["error"]),
    ]
    table = new_table("Exported files", text=["backbone"], numbers=["sizes", *CELLS, ""], notes=notes)
    for entry in entries:
        cells = ["" if entry["error"] else format_cell(entry) for format_cell in CELLS.values()]
        sizes = "/".join(map(str, entry["sizes"]))
        table.add_row(entry["model"], sizes, *cells, "FAILED" if entry["error"] else "ok")
    return BenchResult([table], {"models": list(entries)})
