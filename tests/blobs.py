"""A tiny, easy data set and a recipe that trains on it in seconds, shared by several test files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from racnn_cli import recipe as recipes
from racnn_cli.recipe import Recipe

COLORS = {"blue": (40, 60, 230), "green": (40, 220, 60), "red": (230, 50, 40)}
COUNTS = {"train": 8, "val": 4, "test": 4}

TINY: dict[str, Any] = {
    "seed": 3,
    "data.source": 64,
    "data.val": 0.2,
    "model.backbone": "small_cnn",
    "model.weights": "none",
    "model.scales": 2,
    "model.sizes": [64, 64],
    "model.apn_hidden": 16,
    "train.batch": 6,
    "train.device": "cpu",
    "pretrain_cnn.epochs": 2,
    "pretrain_apn.epochs": 2,
    "alternate.rounds": 2,
    "alternate.cnn_epochs": 1,
    "alternate.apn_epochs": 1,
    "fusion.epochs": 2,
}


def blob(
    color: tuple[int, int, int], centre: tuple[float, float], *, side: int, radius: float, noise: int, seed: int
) -> Image.Image:
    """A soft colored disc at `centre` (x, y as shares of the side) on gray noise."""
    generator = np.random.default_rng(seed)
    pixels = 110 + generator.integers(-noise, noise + 1, (side, side, 3)).astype(np.float64)
    row, column = np.mgrid[:side, :side] + 0.5
    distance = np.hypot(column - centre[0] * side, row - centre[1] * side)
    share = np.clip((radius - distance) / 2 + 0.5, 0, 1)[:, :, None]
    pixels = pixels * (1 - share) + np.array(color) * share
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_blobs(
    folder: Path,
    counts: Mapping[str, int] = COUNTS,
    *,
    side: int = 64,
    radius: float = 13,
    centre: tuple[float, float] | None = None,
    noise: int = 20,
) -> Path:
    """Write `folder/SPLIT/CLASS/*.png`: per split, `counts` images per class of discs that differ in color only."""
    generator = np.random.default_rng(7)
    for split, count in counts.items():
        for number, (name, color) in enumerate(COLORS.items()):
            class_folder = folder / split / name
            class_folder.mkdir(parents=True)
            for index in range(count):
                x, y = generator.uniform(0.25, 0.75, 2) if centre is None else centre
                shift = generator.uniform(-0.03, 0.03, 2)
                seed = 10_000 * number + index + 1_000 * len(split)
                position = (x + shift[0], y + shift[1])
                image = blob(color, position, side=side, radius=radius, noise=noise, seed=seed)
                image.save(class_folder / f"{index:02d}.png")
    return folder


def tiny(data: Path, **changes: Any) -> Recipe:
    """The recipe TINY on `data`; `changes` are recipe keys with `__` instead of dots."""
    tree: dict[str, Any] = {"name": "blobs", "data": {"path": str(data)}, "model": {"weights": "none"}}
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return recipes.Recipe.model_validate(tree).override(TINY | overrides)


def write_recipe(file: Path, data: Path, **changes: Any) -> Path:
    """Write the recipe of `tiny` to a TOML file, for the command line."""
    file.write_text(recipes.dump(tiny(data, **changes)), encoding="utf-8")
    return file
