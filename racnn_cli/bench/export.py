"""`racnn bench export`: whether each exported file passes its check, how large it is, and how fast.

Each backbone is trained in every stage for one epoch on a few drawn birds: enough to change its weights, not for
accuracy. The ONNX file is compared with PyTorch as in every export, and again as in `racnn export --check`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from racnn_cli import api
from racnn_cli.bench import BenchResult, Options
from racnn_cli.bench.summary import Entry, add_models, measure_models, new_table
from racnn_cli.export import quantize
from racnn_cli.export.check import check
from racnn_cli.export.graph import ExportedGraph
from racnn_cli.export.images import CheckImages
from racnn_cli.export.onnx import export_onnx
from racnn_cli.export.onnx_network import as_input, open_session
from racnn_cli.run import Run

MODELS: dict[str, int] = {
    "vgg11": 224,
    "tf_efficientnet_lite0": 224,
    "resnet18": 224,
    "convnext_tiny": 224,
    "swin_tiny_patch4_window7_224": 224,
    "vit_small_patch16_224": 224,
}
"""Backbone to the side of each of three scales."""

SCALES = 3
IMAGES = 32
SHORT = {
    **{f"{stage}.epochs": 1 for stage in ("pretrain_cnn", "pretrain_apn", "fusion")},
    **{f"alternate.{key}": 1 for key in ("rounds", "cnn_epochs", "apn_epochs")},
}


def run(options: Options) -> BenchResult:
    """Measure every backbone of `MODELS`."""
    return measure(MODELS)


def measure(models: Mapping[str, int]) -> BenchResult:
    """Train briefly and export in float32 and int8, per backbone.

    Args:
        models: name to the side of every scale.

    Returns:
        per backbone `model`, `side`, `bytes`, `max_difference` and `agreement` (as in `export.onnx.compare`), relative
        speeds `over_torch` and `int8_over_float32`, `int8_bytes`, and `error`.
    """
    return summarize(measure_models(models, _measure_model))


def _measure_model(entry: Entry, side: int, folder: Path) -> None:
    entry["side"] = side
    changes = {
        "model.backbone": entry["model"],
        "model.sizes": [side] * SCALES,
        "data.source": side,
        "data.sample.size": side,
        "data.sample.images": IMAGES,
        "train.batch": 8,
        "train.device": "cpu",
        **SHORT,
    }
    trained, _ = api.train("tiny", out=folder / "run", changes=changes, quiet=True)
    report = export_onnx(trained)
    images = CheckImages(trained, side)
    (folder / "images").mkdir()
    for number, square in enumerate(images.squares(4, side)):
        Image.fromarray(square).save(folder / "images" / f"{number}.png")
    second = check(trained, None, folder / "images")
    entry |= {
        "bytes": report["bytes"],
        "max_difference": report["max_difference"],
        "agreement": [a + b for a, b in zip(report["agreement"], second["agreement"], strict=True)],
        "over_torch": _speed_over_torch(trained, images),
    }
    int8 = export_onnx(trained, folder / "int8.onnx", precision="int8", max_drop=100.0)
    entry |= {"int8_bytes": int8["bytes"], "int8_over_float32": int8["compressed"]["times_faster"]}


def _speed_over_torch(trained: Run, images: CheckImages) -> float:
    """Measure the speed of the exported file relative to PyTorch, one image at a time."""
    deployed = ExportedGraph.from_run(trained)
    session = open_session(trained.onnx)
    image = as_input(images.squares(1, deployed.model.source), raw=False)
    tensor = torch.from_numpy(image)

    def run_torch() -> object:
        with torch.inference_mode():
            return deployed(tensor)

    return quantize.speedup(run_torch, lambda: session.run(None, {"image": image}))


def summarize(entries: Sequence[Entry]) -> BenchResult:
    """Summarize the results of `measure`."""

    def cells(entry: Entry) -> list[str]:
        if entry["error"]:
            return [str(entry["side"]), *[""] * 7]
        difference = entry["max_difference"]
        return [
            str(entry["side"]),
            f"{entry['bytes'] / 2**20:.0f}",
            "{} of {}".format(*entry["agreement"]),
            f"{difference['probabilities']:.0e}",
            f"{difference['boxes']:.0e}",
            f"{entry['over_torch']:.2f}",
            f"{entry['int8_bytes'] / 2**20:.0f}",
            f"{entry['int8_over_float32']:.2f}",
        ]

    speeds = ["× PyTorch", "int8\nMiB", "int8\n× float32"]
    table = new_table(
        f"Exported files of {SCALES} scales",
        text=["backbone"],
        numbers=["side", "MiB", "same class", "probabilities\ndiffer by", "boxes by\n(of the side)", *speeds],
        notes=[
            f"every stage is trained on {IMAGES} drawn birds; ok: the file passed its check, and --check afterwards",
            "×: relative speed, one image at a time, median of 15 alternating turns, on the CPU",
        ],
    )
    add_models(table, entries, cells)
    return BenchResult([table], {"models": list(entries)})
