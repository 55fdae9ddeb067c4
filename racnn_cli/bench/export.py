"""`racnn bench export`: what leaves the house: does each file pass its check, how large is it, and how fast?

Each backbone gets a run of every stage on a few drawn birds, one epoch each: enough for weights that training has
touched, not for accuracy. Its ONNX file is then held against PyTorch, as every export is, and once more by
`racnn export --check`'s own way; speed is that of one image at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.markup import escape
from rich.table import Table

from racnn_cli import api
from racnn_cli.bench import Figures, Options
from racnn_cli.bench.backbones import told
from racnn_cli.core import store
from racnn_cli.errors import RacnnError
from racnn_cli.export import quantize
from racnn_cli.export.check import check
from racnn_cli.export.graph import ExportedGraph, ExportOptions
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
PICTURES = 32
SHORT = {
    **{f"{stage}.epochs": 1 for stage in ("pretrain_cnn", "pretrain_apn", "fusion")},
    **{f"alternate.{key}": 1 for key in ("rounds", "cnn_epochs", "apn_epochs")},
}


def run(options: Options) -> Figures:
    """One line a backbone of `MODELS`."""
    return measure(MODELS)


def measure(models: Mapping[str, int]) -> Figures:
    """One line a backbone; a error of one does not keep the others from being measured.

    Args:
        models: name to the side of every scale.
    """
    found = []
    for name, side in models.items():
        with tempfile.TemporaryDirectory() as folder:
            found.append(told(name, partial(one, name, side, Path(folder))))
    return summary(found)


def one(name: str, side: int, folder: Path) -> dict[str, Any]:
    """A short run of one backbone, exported in float32 and in int8.

    Returns:
        `model`, `side`, `bytes`, `max_difference` and `agreement` (as `export.compare` gives them), `over_torch` (times
        as fast as PyTorch), `int8_bytes`, `int8_over_float32`, and `error`: empty, or what went wrong.
    """
    entry: dict[str, Any] = {"model": name, "side": side, "error": ""}
    changes = {
        "model.backbone": name,
        "model.sizes": [side] * SCALES,
        "data.source": side,
        "data.sample.size": side,
        "data.sample.images": PICTURES,
        "train.batch": 8,
        "train.device": "cpu",
        **SHORT,
    }
    try:
        trained, _ = api.train("tiny", out=folder / "run", changes=changes, quiet=True)
        report = export_onnx(trained)
        again = check(trained, None, _birds(trained, folder / "birds", side))
        entry |= {
            "bytes": report["bytes"],
            "max_difference": report["max_difference"],
            "agreement": [a + b for a, b in zip(report["agreement"], again["agreement"], strict=True)],
            "over_torch": _over_torch(trained),
        }
        smaller = export_onnx(trained, folder / "int8.onnx", precision="int8", max_drop=100.0)
        entry |= {
            "int8_bytes": smaller["bytes"],
            "int8_over_float32": smaller["compressed"]["times_faster"],
        }
    except RacnnError as error:
        entry["error"] = error.message
    return entry


def _birds(trained: Run, folder: Path, side: int) -> Path:
    """Some of the run's images as a user would have them: files in a folder."""
    folder.mkdir()
    images = CheckImages(trained.recipe(), trained.classes(), side)
    for number, square in enumerate(images.squares(4, side)):
        Image.fromarray(square).save(folder / f"{number}.png")
    return folder


def _over_torch(trained: Run) -> float:
    """How many times as fast as PyTorch the file answers, one image at a time."""
    network, _ = store.load(trained.folder)
    deployed = ExportedGraph(network, trained.recipe().data.fit, ExportOptions()).eval()
    session = open_session(trained.onnx)
    squares = CheckImages(trained.recipe(), trained.classes(), network.source).squares(1, network.source)
    image = as_input(squares, raw=False)
    given = torch.from_numpy(image)

    def in_torch() -> object:
        with torch.inference_mode():
            return deployed(given)

    return quantize.speedup(in_torch, lambda: session.run(None, {"image": image}))


def summary(found: list[dict[str, Any]]) -> Figures:
    """What `one` found of each backbone, as a table."""
    table = Table(title=f"Exported files of {SCALES} scales", title_justify="left")
    table.add_column("backbone", no_wrap=True)
    for column in (
        "side",
        "MiB",
        "same class",
        "probabilities\ndiffer by",
        "boxes by\n(of the side)",
        "× PyTorch",
        "int8\nMiB",
        "int8\n× float32",
    ):
        table.add_column(column, justify="right")
    table.add_column("")
    for entry in found:
        cells = [""] * 7
        if not entry["error"]:
            gaps = entry["max_difference"]
            cells = [
                f"{entry['bytes'] / 2**20:.0f}",
                "{} of {}".format(*entry["agreement"]),
                f"{gaps['probabilities']:.0e}",
                f"{gaps['boxes']:.0e}",
                f"{entry['over_torch']:.2f}",
                f"{entry['int8_bytes'] / 2**20:.0f}",
                f"{entry['int8_over_float32']:.2f}",
            ]
        table.add_row(entry["model"], str(entry["side"]), *cells, "FAILED" if entry["error"] else "ok")
    notes = [
        f"a run of every stage on {PICTURES} drawn birds each; ok: the file passed its check, and --check after it",
        "× : times as fast, one image at a time, median of 15 alternating turns, on the CPU",
        *(escape(f"{entry['model']}: {entry['error']}") for entry in found if entry["error"]),
    ]
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return Figures([table], {"models": found})
