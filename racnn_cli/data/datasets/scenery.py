"""Where the drawn birds sit: blurred backgrounds, perches, and clutter a little like a bird's parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from racnn_cli.data.datasets.brush import (
    Canvas,
    Colour,
    Shape,
    curve,
    line,
    mix,
    oval,
    ribbon,
    rotation,
    tint,
    toward,
)

BACKDROP = 160  # side in pixels in which the background is painted, out of focus, for every output size


@dataclass(frozen=True)
class Place:
    """A background: the colours of its gradient, of blurred spots and of leaves, and what fills it."""

    top: Colour
    bottom: Colour
    spots: tuple[Colour, ...]
    leaves: tuple[Colour, ...]
    filling: str  # bokeh, clouds, reeds, trunks or wash


GREENS: tuple[Colour, ...] = ((94, 134, 62), (122, 150, 74), (72, 112, 66), (140, 160, 92))
AUTUMN: tuple[Colour, ...] = ((190, 122, 52), (168, 84, 48), (204, 158, 70), (138, 124, 66))
PLACES = (
    Place((150, 190, 222), (232, 232, 214), ((255, 252, 244), (240, 240, 238)), GREENS, "clouds"),
    Place((242, 196, 158), (196, 176, 190), ((255, 222, 178), (226, 160, 150)), AUTUMN, "clouds"),
    Place(
        (150, 178, 110), (84, 116, 72), ((196, 212, 130), (110, 150, 84), (228, 226, 170)), GREENS, "bokeh"
    ),
    Place((206, 160, 96), (128, 92, 66), ((236, 196, 116), (176, 110, 62), (242, 222, 170)), AUTUMN, "bokeh"),
    Place((176, 196, 206), (122, 146, 150), ((226, 236, 240), (150, 174, 184)), GREENS, "bokeh"),
    Place(
        (222, 220, 186), (156, 158, 104), ((178, 170, 96), (128, 140, 82), (212, 200, 136)), GREENS, "reeds"
    ),
    Place((176, 206, 214), (196, 190, 140), ((188, 168, 100), (148, 146, 88)), AUTUMN, "reeds"),
    Place((188, 196, 160), (92, 98, 70), ((90, 78, 62), (116, 102, 80), (70, 72, 56)), GREENS, "trunks"),
    Place(
        (246, 240, 222), (236, 226, 202), ((214, 222, 196), (222, 210, 188), (206, 218, 222)), GREENS, "wash"
    ),
    Place((238, 238, 232), (220, 226, 226), ((196, 212, 220), (222, 206, 190)), AUTUMN, "wash"),
)
BARK: tuple[Colour, ...] = ((112, 88, 66), (128, 108, 86), (92, 78, 68), (140, 112, 78))
BERRIES: tuple[Colour, ...] = ((196, 58, 44), (176, 44, 62), (214, 110, 48), (58, 56, 88), (236, 228, 206))


def pick(rng: np.random.Generator, choices: tuple[Colour, ...], spread: float = 10.0) -> Colour:
    """One of the colours, a little changed."""
    base = np.asarray(choices[rng.integers(len(choices))], dtype=float)
    r, g, b = (
        np.clip(base + rng.normal(0, spread, 1) + rng.normal(0, spread / 2, 3), 0, 255).astype(int).tolist()
    )
    return r, g, b


def backdrop(place: Place, rng: np.random.Generator) -> Image.Image:
    """The background, out of focus: RGB, BACKDROP pixels a side."""
    down = np.linspace(0, 1, BACKDROP)[:, None, None] ** rng.uniform(0.7, 1.4)
    gradient = np.asarray(place.top) * (1 - down) + np.asarray(place.bottom) * down  # (side, 1, 3)
    image = Image.fromarray(np.repeat(gradient, BACKDROP, axis=1).astype(np.uint8))
    canvas = Canvas(image)
    blur = 5.0
    if place.filling == "bokeh":
        for _ in range(26):
            radius = rng.uniform(0.03, 0.13)
            canvas.fill(oval(rng.uniform(0, 1, 2), radius), pick(rng, place.spots), int(rng.uniform(40, 130)))
        blur = rng.uniform(2.0, 4.5)
    elif place.filling in ("clouds", "wash"):
        for _ in range(9):
            x, y = rng.uniform(0, 1, 2)
            for _ in range(3):
                puff = (x + rng.normal(0, 0.08), y + rng.normal(0, 0.03))
                canvas.fill(
                    oval(puff, rng.uniform(0.07, 0.2), rng.uniform(0.03, 0.09)), pick(rng, place.spots), 90
                )
        blur = 7.0 if place.filling == "clouds" else 5.0
    else:
        wide = (0.008, 0.03) if place.filling == "reeds" else (0.05, 0.16)
        for _ in range(34 if place.filling == "reeds" else 7):
            x, lean, width = rng.uniform(-0.1, 1.1), rng.normal(0, 0.12), rng.uniform(*wide)
            top = rng.uniform(-0.1, 0.6) if place.filling == "reeds" else -0.1
            stem = curve([(x, 1.1), (x + lean * 0.3, 0.6), (x + lean, top)], closed=False)
            ends = [width, width, width * 0.2] if place.filling == "reeds" else [width * 1.2, width]
            canvas.fill(ribbon(stem, ends), pick(rng, place.spots), 170)
        blur = rng.uniform(1.2, 2.5) if place.filling == "reeds" else 4.0
    for _ in range(rng.integers(2, 7)):  # leaves between the background and the bird, half in focus
        shape = leaf(
            rng.uniform(0, 1, 2), rng.uniform(0, 6.3), rng.uniform(0.1, 0.22), pick(rng, place.leaves), rng
        )
        canvas.draw((polygon, colour, 150) for polygon, colour, _ in shape[:2])
    image = image.filter(ImageFilter.GaussianBlur(blur))
    across = np.linspace(-1, 1, BACKDROP) ** 2
    vignette = 1.03 - 0.13 * (across[:, None] + across[None, :]) ** 1.5 / 2
    return Image.fromarray(np.clip(np.asarray(image) * vignette[..., None], 0, 255).astype(np.uint8))


def leaf(
    base: np.ndarray, angle: float, length: float, colour: Colour, rng: np.random.Generator
) -> list[Shape]:
    """A leaf from its base (2,): blade, darker half, veins, and perhaps a rimmed spot or a bar."""
    width, bow = rng.uniform(0.3, 0.5), rng.uniform(-0.12, 0.12)
    turn = rotation(angle) * length
    side = np.array([(0, 0), (0.25, 0.8), (0.55, 0.9), (0.82, 0.42), (1, 0)]) * (1, width / 2)
    bend = np.array([0, bow * 0.7, bow, bow * 0.6, 0])
    upper, lower = (
        side + np.stack([0 * bend, bend], axis=1),
        side * (1, -1) + np.stack([0 * bend, bend], axis=1),
    )
    rib = curve(np.stack([side[:, 0], bend], axis=1) @ turn + base, closed=False, steps=5)
    left, right = (curve(edge @ turn + base, closed=False, steps=5) for edge in (upper, lower))
    shapes: list[Shape] = [
        (np.concatenate([left, right[::-1]]), colour, 255),
        (np.concatenate([left, rib[::-1]]), tint(colour, 0.84), 255),
        (ribbon(rib, [length * 0.035, length * 0.008]), mix(colour, (236, 230, 190), 0.4), 220),
    ]
    for share in (5, 9, 13):
        for edge in (left, right):
            vein = line(rib[share], toward(rib[share + 4], edge[share + 4], 0.8), length * 0.012)
            shapes.append((vein, tint(colour, 0.7), 120))
    mark, where = rng.uniform(), rib[int(rng.integers(7, 14))]
    if mark < 0.2:  # a spot with a pale rim, not unlike an eye and its ring
        shapes += [(oval(where, length * 0.11), mix(colour, (244, 234, 206), 0.75), 255)]
        shapes += [(oval(where, length * 0.06), (46, 36, 30), 255)]
    elif mark < 0.4:  # a pale or a dark bar across the blade
        across = np.array([0.03, 0.11]) @ turn
        shapes.append(
            (
                line(where - across, where + across, length * 0.1),
                (236, 226, 196) if mark < 0.3 else (60, 48, 40),
                225,
            )
        )
    return shapes


def perch(
    foot: np.ndarray, slope: float, radius: float, colour: Colour, rng: np.random.Generator
) -> list[Shape]:
    """A twig across the whole image whose upper edge passes under `foot` (2,) with the given slope."""
    x = np.linspace(-0.06, 1.06, 15)
    away = x - foot[0]
    sag = rng.uniform(-0.12, 0.22)
    wobble = rng.normal(0, 0.006, 15) * np.clip(np.abs(away) * 6 - 1, 0, 1)
    course = curve(
        np.stack([x, foot[1] + radius + slope * away + sag * away**2 + wobble], axis=1), closed=False, steps=4
    )
    taper = np.linspace(2.5, 1.5, 5) * radius if rng.uniform() < 0.5 else np.linspace(1.5, 2.5, 5) * radius
    # at the bird's feet the twig is two radii thick, wherever the bird sits
    taper = taper * (2 * radius / np.interp(foot[0], np.linspace(-0.06, 1.06, 5), taper))
    shapes: list[Shape] = [
        (ribbon(course, taper), tint(colour, 0.72), 255),
        (ribbon(course - (0, radius * 0.22), taper * 0.74), colour, 255),
        (ribbon(course - (0, radius * 0.5), taper * 0.26), mix(colour, (240, 228, 206), 0.35), 200),
    ]
    for _ in range(16):
        at = int(rng.integers(2, len(course) - 4))
        lift = rng.uniform(-0.6, 0.7) * radius
        shapes.append(
            (ribbon(course[at : at + 3] + np.array([0, lift]), radius * 0.14), tint(colour, 0.55), 150)
        )
    return shapes


def spray(
    base: np.ndarray, angle: float, length: float, place: Place, rng: np.random.Generator
) -> list[Shape]:
    """A shoot from its base (2,) with leaves, perhaps berries, thorns like beaks, a red or a banded stalk."""
    turn = rotation(angle) * length
    stem = curve(
        np.array([(0, 0), (0.4, rng.normal(0, 0.07)), (1, rng.normal(0, 0.16))]) @ turn + base, closed=False
    )
    kind = rng.uniform()
    colour = (172, 72, 54) if kind < 0.25 else pick(rng, BARK)
    shapes: list[Shape] = [(ribbon(stem, [length * 0.05, length * 0.02]), colour, 255)]
    if 0.25 <= kind < 0.45:
        shapes += [
            (line(stem[at], stem[at + 1], length * 0.045), (226, 214, 190), 255)
            for at in range(1, len(stem) - 2, 3)
        ]
    if kind > 0.75:
        for at in (4, 8, 12):
            thorn = np.array([(-0.04, 0), (0.05, 0), (0.07, 0.08), (0.03, 0.11), (0.02, 0.05)]) @ turn
            shapes.append((stem[at] + thorn, tint(colour, 0.7), 255))
    tone = pick(rng, place.leaves)
    for number, at in enumerate((5, 9, 13, 16)):
        out = angle + (rng.uniform(0.4, 1.1) * (1 if number % 2 else -1) if at < 16 else rng.normal(0, 0.2))
        size = length * rng.uniform(0.3, 0.5)
        if rng.uniform() < 0.85:
            shapes += leaf(stem[at], out, size, mix(tone, pick(rng, place.leaves), 0.4), rng)
    if rng.uniform() < 0.4:
        berry, radius = pick(rng, BERRIES), length * rng.uniform(0.045, 0.07)
        for _ in range(rng.integers(2, 6)):
            start = stem[int(rng.integers(3, 16))]
            end = start + np.array([rng.normal(0, 0.08), rng.uniform(0.06, 0.2)]) * length
            shapes += [(line(start, end, length * 0.012), tint(colour, 0.8), 255)]
            shapes += [(oval(end, radius), tint(berry, 0.8), 255)]
            shapes += [(oval(end - radius * 0.14, radius * 0.78), berry, 255)]
            shapes += [(oval(end - radius * 0.35, radius * 0.24), (255, 246, 236), 190)]
    return shapes
