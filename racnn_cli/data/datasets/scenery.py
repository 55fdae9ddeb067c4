"""What surrounds the drawn birds: blurred backgrounds, twigs, and clutter that resembles a bird's parts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from racnn_cli.data.datasets.brush import Canvas, Color, Shape, mix, pick_color, tint
from racnn_cli.data.datasets.outlines import curve, lerp, line, oval, ribbon, rotation

BACKGROUND_SIDE = 160  # side in pixels at which the background is painted, for every output size


class Scene(NamedTuple):
    """The colors of a background and of its leaves, and what fills it."""

    top: Color
    bottom: Color
    spots: tuple[Color, ...]
    leaves: tuple[Color, ...]
    filling: str  # bokeh, clouds, reeds, trunks or wash


GREENS: tuple[Color, ...] = ((94, 134, 62), (122, 150, 74), (72, 112, 66), (140, 160, 92))
AUTUMN: tuple[Color, ...] = ((190, 122, 52), (168, 84, 48), (204, 158, 70), (138, 124, 66))
SCENES = tuple(Scene._make(row) for row in (
    ((150, 190, 222), (232, 232, 214), ((255, 252, 244), (240, 240, 238)), GREENS, "clouds"),
    ((242, 196, 158), (196, 176, 190), ((255, 222, 178), (226, 160, 150)), AUTUMN, "clouds"),
    ((150, 178, 110), (84, 116, 72), ((196, 212, 130), (110, 150, 84), (228, 226, 170)), GREENS, "bokeh"),
    ((206, 160, 96), (128, 92, 66), ((236, 196, 116), (176, 110, 62), (242, 222, 170)), AUTUMN, "bokeh"),
    ((176, 196, 206), (122, 146, 150), ((226, 236, 240), (150, 174, 184)), GREENS, "bokeh"),
    ((222, 220, 186), (156, 158, 104), ((178, 170, 96), (128, 140, 82), (212, 200, 136)), GREENS, "reeds"),
    ((176, 206, 214), (196, 190, 140), ((188, 168, 100), (148, 146, 88)), AUTUMN, "reeds"),
    ((188, 196, 160), (92, 98, 70), ((90, 78, 62), (116, 102, 80), (70, 72, 56)), GREENS, "trunks"),
    ((246, 240, 222), (236, 226, 202), ((214, 222, 196), (222, 210, 188), (206, 218, 222)), GREENS, "wash"),
    ((238, 238, 232), (220, 226, 226), ((196, 212, 220), (222, 206, 190)), AUTUMN, "wash"),
))  # fmt: skip
BARK: tuple[Color, ...] = ((112, 88, 66), (128, 108, 86), (92, 78, 68), (140, 112, 78))
BERRIES: tuple[Color, ...] = ((196, 58, 44), (176, 44, 62), (214, 110, 48), (58, 56, 88), (236, 228, 206))


def background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Paint the background, out of focus: RGB, BACKGROUND_SIDE pixels per side."""
    down = np.linspace(0, 1, BACKGROUND_SIDE)[:, None, None] ** rng.uniform(0.7, 1.4)
    gradient = np.asarray(scene.top) * (1 - down) + np.asarray(scene.bottom) * down  # (side, 1, 3)
    canvas = Canvas(Image.fromarray(np.repeat(gradient, BACKGROUND_SIDE, axis=1).astype(np.uint8)))
    if scene.filling == "bokeh":
        for _ in range(26):
            radius = rng.uniform(0.03, 0.13)
            spot = oval(rng.uniform(0, 1, 2), radius)
            canvas.fill(spot, pick_color(rng, scene.spots), int(rng.uniform(40, 130)))
        blur = rng.uniform(2.0, 4.5)
    elif scene.filling in ("clouds", "wash"):
        for _ in range(9):
            cloud = rng.uniform(0, 1, 2)
            for _ in range(3):
                center = cloud + rng.normal(0, (0.08, 0.03))
                puff = oval(center, rng.uniform(0.07, 0.2), rng.uniform(0.03, 0.09))
                canvas.fill(puff, pick_color(rng, scene.spots), 90)
        blur = 7.0 if scene.filling == "clouds" else 5.0
    else:
        reeds = scene.filling == "reeds"
        for _ in range(34 if reeds else 7):
            x, lean = rng.uniform(-0.1, 1.1), rng.normal(0, 0.12)
            width = rng.uniform(0.008, 0.03) if reeds else rng.uniform(0.05, 0.16)
            top = rng.uniform(-0.1, 0.6) if reeds else -0.1
            stem = curve([(x, 1.1), (x + lean * 0.3, 0.6), (x + lean, top)])
            widths = (width, width, width * 0.2) if reeds else (width * 1.2, width)
            canvas.fill(ribbon(stem, *widths), pick_color(rng, scene.spots), 170)
        blur = rng.uniform(1.2, 2.5) if reeds else 4.0
    for _ in range(rng.integers(2, 7)):  # leaves between the background and the bird, half in focus
        shapes = random_leaf(rng, (0.1, 0.22), scene, 6.3)
        canvas.draw((polygon, color, 150) for polygon, color, _ in shapes[:2])
    blurred = np.asarray(canvas.image.filter(ImageFilter.GaussianBlur(blur)))
    across = np.linspace(-1, 1, BACKGROUND_SIDE) ** 2
    vignette = 1.03 - 0.13 * (across[:, None] + across[None, :]) ** 1.5 / 2
    return Image.fromarray(np.clip(blurred * vignette[..., None], 0, 255).astype(np.uint8))


def random_leaf(
    rng: np.random.Generator, lengths: tuple[float, float], scene: Scene, turn: float = 2 * np.pi
) -> list[Shape]:
    """Draw a leaf anywhere, its angle below `turn`."""
    base, angle, length = rng.uniform(0, 1, 2), rng.uniform(0, turn), rng.uniform(*lengths)
    return leaf(rng, base, angle=angle, length=length, color=pick_color(rng, scene.leaves))


def leaf(rng: np.random.Generator, base: np.ndarray, *, angle: float, length: float, color: Color) -> list[Shape]:
    """Draw a leaf from its base (2,): blade, darker half, veins, and perhaps a rimmed spot or a bar."""
    width, bow = rng.uniform(0.3, 0.5), rng.uniform(-0.12, 0.12)
    turn = rotation(angle) * length
    blade = np.array([(0, 0), (0.25, 0.8), (0.55, 0.9), (0.82, 0.42), (1, 0)]) * (1, width / 2)
    bend = np.array([(0, 0), (0, bow * 0.7), (0, bow), (0, bow * 0.6), (0, 0)])
    left, right, rib = (curve((blade * (1, side) + bend) @ turn + base, steps=5) for side in (1, -1, 0))
    shapes: list[Shape] = [
        (np.concatenate([left, right[::-1]]), color, 255),
        (np.concatenate([left, rib[::-1]]), tint(color, 0.84), 255),
        (ribbon(rib, length * 0.035, length * 0.008), mix(color, (236, 230, 190), 0.4), 220),
    ]
    for at in (5, 9, 13):
        for edge in (left, right):
            vein = line(rib[at], lerp(rib[at + 4], edge[at + 4], 0.8), length * 0.012)
            shapes.append((vein, tint(color, 0.7), 120))
    mark, center = rng.uniform(), rib[int(rng.integers(7, 14))]
    if mark < 0.2:  # a spot with a pale rim, similar to an eye and its ring
        shapes.append((oval(center, length * 0.11), mix(color, (244, 234, 206), 0.75), 255))
        shapes.append((oval(center, length * 0.06), (46, 36, 30), 255))
    elif mark < 0.4:  # a pale or a dark bar across the blade
        across = np.array([0.03, 0.11]) @ turn
        bar = line(center - across, center + across, length * 0.1)
        shapes.append((bar, (236, 226, 196) if mark < 0.3 else (60, 48, 40), 225))
    return shapes


def perch(rng: np.random.Generator, foot: np.ndarray, *, slope: float, radius: float, color: Color) -> list[Shape]:
    """Draw a twig across the whole image whose upper edge passes under `foot` (2,) with the given slope."""
    x = np.linspace(-0.06, 1.06, 15)
    away = x - foot[0]
    sag = rng.uniform(-0.12, 0.22)
    wobble = rng.normal(0, 0.006, 15) * np.clip(np.abs(away) * 6 - 1, 0, 1)
    y = foot[1] + radius + slope * away + sag * away**2 + wobble
    path = curve(np.stack([x, y], axis=1), steps=4)
    ends = (2.5, 1.5) if rng.uniform() < 0.5 else (1.5, 2.5)
    taper = np.linspace(*ends, 5) * radius
    # At the bird's feet the twig is two radii thick, wherever the bird sits.
    taper = taper * (2 * radius / np.interp(foot[0], np.linspace(-0.06, 1.06, 5), taper))
    highlight = mix(color, (240, 228, 206), 0.35)
    shapes: list[Shape] = [
        (ribbon(path, *taper), tint(color, 0.72), 255),
        (ribbon(path - (0, radius * 0.22), *(taper * 0.74)), color, 255),
        (ribbon(path - (0, radius * 0.5), *(taper * 0.26)), highlight, 200),
    ]
    for _ in range(16):
        at = int(rng.integers(2, len(path) - 4))
        groove = path[at : at + 3] + np.array([0, rng.uniform(-0.6, 0.7) * radius])
        shapes.append((ribbon(groove, radius * 0.14), tint(color, 0.55), 150))
    return shapes


def shoot(rng: np.random.Generator, base: np.ndarray, *, angle: float, length: float, scene: Scene) -> list[Shape]:
    """Draw a shoot from its base (2,): leaves, perhaps berries, beak-like thorns, a red or a banded stalk."""
    turn = rotation(angle) * length
    stem = curve(np.array([(0, 0), (0.4, rng.normal(0, 0.07)), (1, rng.normal(0, 0.16))]) @ turn + base)
    kind = rng.uniform()
    color = (172, 72, 54) if kind < 0.25 else pick_color(rng, BARK)
    shapes: list[Shape] = [(ribbon(stem, length * 0.05, length * 0.02), color, 255)]
    if 0.25 <= kind < 0.45:
        for at in range(1, len(stem) - 2, 3):
            shapes.append((line(stem[at], stem[at + 1], length * 0.045), (226, 214, 190), 255))
    if kind > 0.75:
        thorn = np.array([(-0.04, 0), (0.05, 0), (0.07, 0.08), (0.03, 0.11), (0.02, 0.05)]) @ turn
        shapes += [(stem[at] + thorn, tint(color, 0.7), 255) for at in (4, 8, 12)]
    tone = pick_color(rng, scene.leaves)
    for at, side in ((5, -1), (9, 1), (13, -1), (16, 0)):
        leaf_angle = angle + (rng.uniform(0.4, 1.1) * side if side else rng.normal(0, 0.2))
        size = length * rng.uniform(0.3, 0.5)
        if rng.uniform() < 0.85:
            leaf_color = mix(tone, pick_color(rng, scene.leaves), 0.4)
            shapes += leaf(rng, stem[at], angle=leaf_angle, length=size, color=leaf_color)
    if rng.uniform() < 0.4:
        berry, radius = pick_color(rng, BERRIES), length * rng.uniform(0.045, 0.07)
        for _ in range(rng.integers(2, 6)):
            start = stem[int(rng.integers(3, 16))]
            end = start + np.array([rng.normal(0, 0.08), rng.uniform(0.06, 0.2)]) * length
            shapes += [
                (line(start, end, length * 0.012), tint(color, 0.8), 255),
                (oval(end, radius), tint(berry, 0.8), 255),
                (oval(end - radius * 0.14, radius * 0.78), berry, 255),
                (oval(end - radius * 0.35, radius * 0.24), (255, 246, 236), 190),
            ]
    return shapes
