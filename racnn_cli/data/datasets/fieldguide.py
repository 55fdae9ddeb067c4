"""`fieldguide`: drawn birds whose classes differ in one small part only, with the box around that part.

Everything else (pose, plumage, background, clutter) is drawn from random numbers that do not depend on the
class. Two classes with one seed and index give two images that differ in the boxes of their parts and
nowhere else.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from racnn_cli import recipe
from racnn_cli.data.datasets import files
from racnn_cli.data.datasets.birds import PARTS, Bird
from racnn_cli.data.datasets.brush import Canvas, Shape, pick_color
from racnn_cli.data.datasets.outlines import Box, bounds
from racnn_cli.data.datasets.scenery import BARK, SCENES, background, perch, random_leaf, shoot

CLASSES: tuple[str, ...] = PARTS
SHARES = {"val": 0.15, "test": 0.25}  # the rest is for training


def locate(sample: recipe.Sample, seed: int) -> Path:
    """Return the CSV file of the data set that `sample` and `seed` describe, drawn on first use."""
    # The name includes the drawing code, so that images drawn by older code are not used.
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    name = f"fieldguide-{sample.images}-{sample.size}-{seed}-{zlib.crc32(code):08x}"
    return files.cached(name, lambda f: write(f, images=sample.images, size=sample.size, seed=seed)) / "labels.csv"


def draw(label: int, *, size: int, seed: int, index: int) -> tuple[np.ndarray, Box]:
    """Draw one image.

    Args:
        label: the class, a position in CLASSES.
        size: side of the image in pixels; the content is the same at any size.
        seed: the set's seed.
        index: the image's number in the set.

    Returns:
        The image (size, size, 3) uint8 RGB, and the box x, y, width, height in pixels around the part that
        tells its class.
    """
    rng = np.random.default_rng((seed, index))
    scene = SCENES[rng.integers(len(SCENES))]
    # Drawn larger, then reduced, for smooth edges; large images need less of it.
    oversampling = 4 if size <= 160 else 3 if size <= 512 else 2
    side = size * oversampling
    canvas = Canvas(background(scene, rng).resize((side, side), Image.Resampling.BICUBIC))
    bird = Bird(rng)
    bark = pick_color(rng, BARK)

    for _ in range(rng.integers(2, 6)):
        base, angle, length = rng.uniform(0, 1, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0.16, 0.36)
        canvas.draw(shoot(rng, base, angle=angle, length=length, scene=scene))
    radius = rng.uniform(0.022, 0.034) * bird.scale
    twig = perch(rng, bird.foot, slope=bird.slope, radius=radius, color=bark)
    canvas.draw(twig)
    for _ in range(rng.integers(2, 5)):  # shoots of the twig itself
        base = twig[1][0][int(rng.integers(3, 54))]
        angle = rng.choice([-1, 1]) * rng.uniform(0.5, 1.3) + rng.choice([0, np.pi])
        canvas.draw(shoot(rng, base, angle=angle, length=rng.uniform(0.12, 0.24), scene=scene))
    bird.paint(canvas, CLASSES[label])
    for _ in range(6):  # leaves in front of the bird, never over a part
        shapes = random_leaf(rng, (0.09, 0.17), scene)
        if not any(_overlap(shapes, box) for box in bird.boxes.values()):
            canvas.draw(shapes)

    x0, y0, x1, y1 = (value * size for value in bird.boxes[CLASSES[label]])
    return np.asarray(canvas.image.reduce(oversampling)), (x0, y0, x1 - x0, y1 - y0)


def _overlap(shapes: list[Shape], box: Box, margin: float = 0.02) -> bool:
    x0, y0, x1, y1 = bounds(polygon for polygon, _, _ in shapes)
    return x0 < box[2] + margin and box[0] - margin < x1 and y0 < box[3] + margin and box[1] - margin < y1


def write(folder: Path, *, images: int, size: int, seed: int) -> Path:
    """Draw a data set: `folder`/SPLIT/CLASS/bird-NUMBER.png and `folder`/labels.csv.

    The classes are balanced, and so is each split: 60 % train, 15 % val, 25 % test.

    Args:
        folder: where to write; created if it does not exist.
        images: number of images, at least three per class.
        size: side of an image in pixels.
        seed: the same seed gives the same files.

    Returns:
        The path of labels.csv, see `files.save`.
    """

    def records() -> Iterator[files.Record]:
        # Numbers are assigned at random, so that a file's name does not reveal its class.
        numbers = np.random.default_rng(seed).permutation(images)
        for label, name in enumerate(CLASSES):
            own = numbers[label :: len(CLASSES)].tolist()
            val, test = (max(1, round(len(own) * SHARES[split])) for split in ("val", "test"))
            splits = ["val"] * val + ["test"] * test + ["train"] * (len(own) - val - test)
            for number, split in zip(own, splits, strict=True):
                pixels, box = draw(label, size=size, seed=seed, index=number)
                yield split, name, f"bird-{number:05d}.png", pixels, box

    return files.save(folder, records())
