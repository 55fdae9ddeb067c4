"""An untrained run whose predictions and boxes differ clearly between images, and its data set."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from racnn_cli import recipe as recipes
from racnn_cli.core import model as models
from racnn_cli.core import store
from racnn_cli.data.index import build_index
from racnn_cli.run import Run

CLASSES = ["<b>red</b> & 'co'", "green", "blau"]
SIDE = 48


def write_data(folder: Path, count: int = 8) -> Path:
    """Write `count` images per class and split, and a CSV file with the box of the colored square in each.

    Images are 80 × 60 pixels of noise.

    Returns:
        the CSV file.
    """
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


def make_run(folder: Path, data: Path, *, scales: int, backbone: str = "test_resnet") -> Run:
    """Create a run with random weights on a CSV file of images."""
    torch.manual_seed(0)
    sections = {
        "name": "try",
        "about": "<script>alert(1)</script>",
        "data": {"path": str(data), "source": SIDE},
        "model": {"backbone": backbone, "weights": "none", "scales": scales, "sizes": [64] * scales, "apn_hidden": 16},
        "train": {"batch": 5, "device": "cpu"},
    }
    recipe = recipes.Recipe.model_validate(sections)
    classes = build_index(recipe.data, seed=0).classes
    run = Run.create(recipe, classes, folder)
    network = models.build(recipe.model, len(classes), source=SIDE)
    with torch.no_grad():  # large weights, so that predictions and boxes differ between images
        for name, tensor in network.named_parameters():
            if "classifier.weight" in name or "fusion.weight" in name:
                tensor.normal_(std=3.0)
            if "apn.hidden.weight" in name:
                tensor.mul_(30)
            if "apn.box.weight" in name:
                tensor.normal_(std=0.7)
    store.save_weights(run.weights, network)
    return run
