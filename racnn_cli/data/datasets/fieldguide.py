"""`fieldguide`: drawn birds whose classes differ in one small part only, with the box around that part.

Everything else (pose, plumage, background, clutter) is drawn from random numbers that do not depend on the
class: two classes with one seed and index give two images that differ in the boxes of their parts and
nowhere else.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from racnn_cli.data.datasets.birds import PARTS, Bird
from racnn_cli.data.datasets.brush import Canvas, Shape, bounds
from racnn_cli.data.datasets.scenery import BARK, PLACES, backdrop, leaf, perch, pick, spray

CLASSES: tuple[str, ...] = PARTS
SHARES = {"val": 0.15, "test": 0.25}  # the rest is for training

Box = tuple[float, float, float, float]


def draw(label: int, *, size: int, seed: int, index: int) -> tuple[np.ndarray, Box]:
    """One image and the box around the part that tells its class.

    Args:
        label: the class, a position in CLASSES.
        size: side of the image in pixels; the content is the same at any size.
        seed: the set's seed.
        index: the image's number in the set.

    Returns:
        The image (size, size, 3) uint8 RGB, and the part's box x, y, width, height in pixels.
    """
    rng = np.random.default_rng((seed, index))
    place = PLACES[rng.integers(len(PLACES))]
    # drawn larger and reduced: smooth edges; big images need less of it
    finer = 4 if size <= 160 else 3 if size <= 512 else 2
    canvas = Canvas(backdrop(place, rng).resize((size * finer, size * finer), Image.Resampling.BICUBIC))
    bird = Bird(rng)
    bark = pick(rng, BARK)
    keep_clear = [bird.box(part) for part in PARTS]

    for _ in range(rng.integers(2, 6)):
        base, angle = rng.uniform(0, 1, 2), rng.uniform(0, 2 * np.pi)
        canvas.draw(spray(base, angle, rng.uniform(0.16, 0.36), place, rng))
    twig = perch(bird.foot, bird.slope, rng.uniform(0.022, 0.034) * bird.pose.scale, bark, rng)
    canvas.draw(twig)
    for _ in range(rng.integers(2, 5)):  # shoots of the perch itself
        base = twig[1][0][int(rng.integers(3, 54))]
        angle = rng.choice([-1, 1]) * rng.uniform(0.5, 1.3) + rng.choice([0, np.pi])
        shoot = spray(base, angle, rng.uniform(0.12, 0.24), place, rng)
        canvas.draw(shoot)
    bird.paint(canvas, CLASSES[label])
    for _ in range(6):  # leaves in front of the bird, never over a part
        shape = leaf(
            rng.uniform(0, 1, 2),
            rng.uniform(0, 2 * np.pi),
            rng.uniform(0.09, 0.17),
            pick(rng, place.leaves),
            rng,
        )
        if not any(_overlap(shape, part) for part in keep_clear):
            canvas.draw(shape)

    x0, y0, x1, y1 = (value * size for value in bird.box(CLASSES[label]))
    return np.asarray(canvas.image.reduce(finer)), (x0, y0, x1 - x0, y1 - y0)


def _overlap(shapes: list[Shape], box: Box, margin: float = 0.02) -> bool:
    x0, y0, x1, y1 = bounds(polygon for polygon, _, _ in shapes)
    return x0 < box[2] + margin and box[0] - margin < x1 and y0 < box[3] + margin and box[1] - margin < y1


def write(folder: Path, *, images: int, size: int, seed: int) -> Path:
    """Draw a whole set: `folder`/SPLIT/CLASS/bird-NUMBER.png and, last of all, `folder`/labels.csv.

    The classes are balanced, and so is each split; 60 % train, 15 % val, 25 % test.

    Args:
        folder: where to write; made if it does not exist.
        images: number of images, at least three a class.
        size: side of an image in pixels.
        seed: the same seed gives the same files.

    Returns:
        The path of labels.csv: path (relative to it), label, split, and the part's box x, y, w, h in pixels.
    """
    # numbers are dealt out at random, so that a file's name says nothing about its class
    numbers = np.random.default_rng(seed).permutation(images)
    rows = []
    for label, name in enumerate(CLASSES):
        mine = numbers[label :: len(CLASSES)].tolist()
        val, test = (max(1, round(len(mine) * SHARES[split])) for split in ("val", "test"))
        splits = ["val"] * val + ["test"] * test + ["train"] * (len(mine) - val - test)
        for number, split in zip(mine, splits, strict=True):
            pixels, box = draw(label, size=size, seed=seed, index=number)
            file = folder / split / name / f"bird-{number:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file, compress_level=3)
            rows.append([file.relative_to(folder).as_posix(), name, split, *(f"{v:.2f}" for v in box)])
    table = folder / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "split", "x", "y", "w", "h"])
        writer.writerows(sorted(rows))
    return table
