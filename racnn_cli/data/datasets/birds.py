"""One drawn bird: its outlines, its plumage, and the eight small parts, one of which tells its class.

The bird is designed facing right, one unit long from tail to beak, y down, the body's center at (0, 0).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from racnn_cli.data.datasets.brush import Canvas, Color, Shape, mix, pick_color, tint
from racnn_cli.data.datasets.outlines import Points, bounds, contains, curve, lerp, line, oval, ribbon, rotation

PARTS = ("hooked-beak", "straight-beak", "eye-ring", "eye-stripe", "wing-bar", "wing-patch", "red-legs", "banded-legs")


def _points(*thousandths: tuple[int, int]) -> np.ndarray:
    return np.array(thousandths) / 1000


BODY = _points(
    (345, -232), (305, -305), (225, -335), (135, -305), (75, -225), (-30, -135), (-140, -40), (-250, 70), (-315, 150),
    (-250, 185), (-130, 200), (20, 195), (150, 145), (250, 45), (295, -60), (310, -130), (345, -185),
)  # fmt: skip
WING = _points(
    (175, -50), (110, -120), (-10, -110), (-160, -15), (-290, 90), (-410, 195), (-300, 165), (-170, 140), (-30, 115),
    (100, 85), (170, 25),
)  # fmt: skip
RUMP = np.array([-0.22, 0.13])  # where the tail turns
TAIL = _points((-200, 80), (-360, 165), (-530, 255), (-545, 290), (-500, 300), (-340, 230), (-200, 180))
CROWN = _points((350, -240), (300, -320), (220, -350), (120, -320), (50, -220), (160, -265), (260, -275))
BREAST = _points((330, -170), (360, 0), (200, 120), (100, 100), (170, -20), (190, -140))
BELLY = _points((360, 60), (200, 260), (-200, 260), (-320, 170), (-160, 140), (80, 80), (200, 40))
EYE = _points((262, -238))
HOOK = _points((325, -250), (375, -252), (425, -228), (442, -182), (430, -145), (421, -172), (398, -190), (330, -200))
HOOK_BELOW = _points((330, -205), (395, -190), (402, -176), (375, -168), (330, -170))
EYE_STRIPE = _points((338, -222), (262, -238), (190, -230), (145, -210))
WING_BAR = _points((35, -98), (12, -30), (5, 35), (22, 93))
WING_PATCH = _points((-10, -30), (-55, -35), (-105, 0), (-120, 35), (-65, 38), (-15, 15))
PATCH_BARBS = _points((-20, -20), (-40, -5), (-60, 12), (-60, 25))

# back, head, breast, belly
PLUMAGES: tuple[tuple[Color, Color, Color, Color], ...] = (
    ((122, 104, 80), (134, 114, 88), (214, 124, 68), (228, 218, 198)),
    ((112, 134, 96), (98, 120, 142), (226, 200, 96), (236, 224, 156)),
    ((134, 96, 62), (146, 108, 74), (188, 152, 114), (208, 180, 146)),
    ((78, 112, 152), (84, 118, 160), (198, 146, 104), (232, 224, 210)),
    ((140, 112, 84), (126, 116, 106), (180, 168, 150), (218, 210, 196)),
    ((118, 130, 76), (126, 138, 82), (170, 174, 90), (208, 204, 136)),
    ((122, 128, 138), (116, 120, 130), (206, 136, 126), (230, 220, 212)),
    ((144, 98, 94), (160, 102, 96), (206, 136, 126), (230, 202, 190)),
    ((100, 114, 128), (108, 122, 136), (156, 164, 170), (212, 214, 212)),
    ((162, 126, 74), (154, 122, 78), (208, 174, 110), (232, 210, 164)),
)
BEAKS: tuple[Color, ...] = ((70, 64, 60), (98, 86, 74), (136, 112, 74), (84, 88, 96))
LEGS: tuple[Color, ...] = ((92, 82, 76), (112, 94, 78), (74, 70, 72), (126, 106, 84))
PALE: tuple[Color, ...] = ((246, 240, 226), (240, 230, 204), (248, 246, 242))


class Bird:
    """A bird of no class yet: every random choice is made here, so that none depends on the class.

    Args:
        rng: where the choices come from.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        back, head, breast, belly = PLUMAGES[rng.integers(len(PLUMAGES))]
        self.back, self.head = pick_color(rng, (back,)), pick_color(rng, (head,), 7)
        self.breast, self.belly = pick_color(rng, (breast,)), pick_color(rng, (belly,), 7)
        self.crown = tint(self.head, rng.uniform(0.72, 1.05))
        self.wing = tint(mix(self.back, (92, 82, 74), 0.3), rng.uniform(0.72, 0.88))
        self.beak, self.leg = pick_color(rng, BEAKS, 6), pick_color(rng, LEGS, 6)
        self.pale, self.red = pick_color(rng, PALE, 4), pick_color(rng, ((186, 72, 52),), 8)
        self.light = np.array([rng.uniform(-0.6, 0.6), -0.85])
        self.scale = rng.uniform(0.48, 0.66)  # length from tail to beak in units of the image's side
        self.facing = -1 if rng.uniform() < 0.5 else 1  # -1: left
        self.tilt = rng.uniform(-0.38, 0.22)  # angles in radians, clockwise before mirroring
        self.nod = rng.uniform(-0.2, 0.28)  # of the head
        self.tail_angle = rng.uniform(-0.3, 0.22)
        self.plumpness = rng.uniform(0.92, 1.1)  # height of the body relative to the design
        self.leg_length = rng.uniform(0.125, 0.16) * self.scale
        self.slope = rng.uniform(-0.22, 0.22)  # of the twig
        self.center = np.zeros(2)
        outlines = [self._outline(BODY), self._tail(), *(p for p, _, _ in self._beak("straight-beak"))]
        x0, y0, x1, y1 = bounds(outlines)
        y1 = max(y1, self._hips_and_feet()[1][:, 1].max() + 0.05 * self.scale)
        self.center = np.array([rng.uniform(0.05 - x0, 0.95 - x1), rng.uniform(0.06 - y0, 0.93 - y1)])

        self.eye = self._place(EYE)[0]
        self.foot = self._hips_and_feet()[1].mean(axis=0)  # between the feet, on the upper edge of the twig
        self.feathers = self._feathers(rng)
        self.parts = self._parts()
        self.boxes = {
            name: bounds(polygon for polygon, _, _ in shapes + self._beak("") * name.endswith("beak"))
            for name, shapes in self.parts.items()
        }

    def paint(self, canvas: Canvas, part: str) -> None:
        """Draw the bird with the one part that tells its class."""
        tail = self._tail()
        canvas.shade(tail, tint(self.wing, 0.92), light=self.light)
        root, width = self._place((RUMP,))[0], 0.009 * self.scale
        for end in tail[16:33:4]:
            canvas.fill(line(root, end, width / 3, width), tint(self.wing, 0.6), 130)
        canvas.draw(self._legs(self.leg))
        if part.endswith("legs"):
            canvas.draw(self.parts[part])
        patches: list[Shape] = [
            (self._outline(BELLY), self.belly, 255),
            (self._outline(BREAST), self.breast, 235),
            (self._oval(self.eye, 0.125), self.head, 255),
            (self._outline(CROWN), self.crown, 230),
        ]
        canvas.shade(self._outline(BODY), self.back, patches, light=self.light)
        canvas.draw(self.feathers)
        self._paint_wing(canvas)
        if part.startswith(("wing", "eye")):
            canvas.draw(self.parts[part])
        canvas.draw(self.parts[part] if part.endswith("beak") else self._beak(""))
        glint = self.eye + self.light * (0.009 * self.scale)
        canvas.fill(self._oval(self.eye, 0.029), (44, 32, 26))
        canvas.fill(self._oval(self.eye, 0.021), (18, 14, 14))
        canvas.fill(self._oval(glint, 0.0075), (255, 255, 255), 240)

    # ---- from the design's units to the image's

    def _place(self, points: Points) -> np.ndarray:
        """Convert design points (n, 2) to units of the image, in the bird's pose."""
        design = np.asarray(points, dtype=float)
        # how much a point belongs to the head: 0 at the shoulder, 1 at the eye
        head = np.clip((design @ (0.6, -0.8) - 0.08) / 0.18, 0, 1)[:, None]
        head = head * head * (3 - 2 * head)
        neck = np.array([0.12, -0.1])
        design = design + head * ((design - neck) @ rotation(self.nod) + neck - design)
        design = (design * (1, self.plumpness)) @ rotation(self.tilt)
        return design * (self.facing, 1) * self.scale + self.center

    def _outline(self, points: Points) -> np.ndarray:
        return curve(self._place(points), closed=True)

    def _ribbon(self, path: np.ndarray, *widths: float) -> np.ndarray:
        return ribbon(path, *(width * self.scale for width in widths))

    def _oval(self, center: np.ndarray, radius: float) -> np.ndarray:
        return oval(center, radius * self.scale)

    # ---- outlines and shapes

    def _tail(self) -> np.ndarray:
        return self._outline((TAIL - RUMP) @ rotation(self.tail_angle) + RUMP)

    def _hips_and_feet(self) -> tuple[np.ndarray, np.ndarray]:
        hips = self._place(((0.045, 0.185), (-0.045, 0.192)))
        # Both feet stand on the twig, whatever the tilt of the body.
        ground = hips[:, 1].max() + self.leg_length * 0.8
        x = hips[:, 0] + 0.03 * self.facing * self.scale
        return hips, np.stack([x, ground + self.slope * (x - x.mean())], axis=1)

    def _strokes(self, starts: np.ndarray, ends: np.ndarray, *widths: float) -> list[tuple[int, np.ndarray]]:
        """Number and outline of each stroke between design points (n, 2) that lies within the body."""
        body, starts, ends = self._outline(BODY), self._place(starts), self._place(ends)
        inside = np.flatnonzero(contains(body, starts) & contains(body, ends)).tolist()
        return [(i, line(starts[i], ends[i], *(width * self.scale for width in widths))) for i in inside]

    def _feathers(self, rng: np.random.Generator) -> list[Shape]:
        """Fine light and dark strokes, and on some birds, whatever their class, streaks on the breast."""
        flank = np.array([0.0, 0.03]) + rng.uniform(-1, 1, (150, 2)) @ np.array([(0.2, -0.06), (0.07, 0.13)])
        skull = np.array([0.22, -0.22]) + rng.uniform(-1, 1, (50, 2)) * (0.07, 0.07)
        starts = np.concatenate([flank, skull])
        offsets = np.array([-0.034, 0.016]) * rng.uniform(0.6, 1.3, (200, 1))
        strokes = self._strokes(starts, starts + offsets + rng.normal(0, 0.004, (200, 2)), 0.009, 0.002)
        light = rng.uniform(size=200) < 0.5
        shapes: list[Shape] = [(s, (255, 246, 226) if light[i] else (40, 30, 24), 38) for i, s in strokes]
        streaked, across = rng.uniform() < 0.35, np.array([(0.03, -0.085), (0.075, 0.03)])
        starts = np.array([0.17, 0.05]) + rng.uniform(-1, 1, (26, 2)) @ across
        streaks = self._strokes(starts, starts + np.array([-0.008, 0.026]), 0.005, 0.012)
        return shapes + [(s, tint(self.breast, 0.5), 130) for _, s in streaks if streaked]

    def _paint_wing(self, canvas: Canvas) -> None:
        dark, light = tint(self.wing, 0.62), mix(self.wing, (236, 222, 196), 0.32)
        tip = (self._oval(self._place(((-0.43, 0.21),))[0], 0.2), tint(self.wing, 0.74), 255)
        canvas.shade(self._outline(WING), self.wing, [tip], light=self.light)
        for share in np.linspace(0.08, 0.92, 8):  # long feathers, from the coverts to the tip
            start = (-0.03 + 0.03 * share, -0.085 + 0.19 * share)
            middle = (-0.17 + 0.02 * share, 0.015 + 0.105 * share)
            end = (-0.3 - 0.09 * (1 - abs(2 * share - 1.0)), 0.105 + 0.055 * share + 0.02)
            quill = curve(self._place((start, middle, end)))
            canvas.fill(self._ribbon(quill, 0.012, 0.004), dark, 150)
            canvas.fill(self._ribbon(quill + np.array([0, 0.009 * self.scale]), 0.006, 0.002), light, 110)
        for row, (x, count) in enumerate(((0.125, 5), (0.08, 6), (0.035, 7))):  # small rounded feathers
            for share in np.linspace(0.04, 0.9, count):
                y = -0.095 + 0.175 * share + 0.008 * row
                root, end = self._place(((x - 0.018 - 0.02 * share, y), (x, y)))
                turn = float(np.arctan2(*(end - root)[::-1]))
                rim = oval(root, 0.027 * self.scale, 0.017 * self.scale, turn)
                canvas.fill(rim, dark, 120)
                canvas.fill(lerp(rim, end, 0.2), mix(self.wing, light, 0.35), 150)

    def _beak(self, kind: str) -> list[Shape]:
        """The short plain beak of every bird (`kind` is empty), or one of the two that tell a class."""
        upper: Points = HOOK
        lower: Points = HOOK_BELOW
        if kind != "hooked-beak":
            tip = 0.475 if kind else 0.405
            middle = 0.325 + (tip - 0.325) * 0.45
            upper = ((0.325, -0.247), (middle, -0.232), (tip, -0.199), (0.33, -0.2))
            lower = ((0.33, -0.206), (tip - 0.012, -0.199), (middle, -0.182), (0.33, -0.17))
        steps = 5 if kind == "hooked-beak" else 1
        top, bottom = (curve(self._place(edge), closed=True, steps=steps) for edge in (upper, lower))
        shine = lerp(top, top.mean(axis=0), 0.45) + self.light * (0.006 * self.scale)
        return [
            (bottom, tint(self.beak, 0.78), 255),
            (top, self.beak, 255),
            (shine, mix(self.beak, (255, 244, 220), 0.35), 170),
        ]

    def _legs(self, color: Color) -> list[Shape]:
        shapes: list[Shape] = []
        for path, tone in zip(self._leg_paths(), (tint(color, 0.8), color), strict=True):
            foot = path[-1]
            shapes.append((self._ribbon(path, 0.03, 0.02), tone, 255))
            for reach, drop in ((0.058, 0.01), (0.045, 0.026), (-0.036, 0.018)):
                reach *= self.facing
                end = foot + np.array([reach, drop + reach * self.slope]) * self.scale
                toe = curve(np.stack([foot, lerp(foot, end, 0.6) - (0, 0.008 * self.scale), end]), steps=4)
                shapes.append((self._ribbon(toe, 0.018, 0.015, 0.005), tone, 255))
        return shapes

    def _leg_paths(self) -> Iterator[np.ndarray]:
        """The far leg's path and the near one's, from hip to foot."""
        for hip, foot in zip(*(points[::-1] for points in self._hips_and_feet()), strict=True):
            heel = lerp(hip, foot, 0.4) - (0.018 * self.facing * self.scale, 0)
            yield curve(np.stack([hip, heel, foot]), steps=6)

    def _pale_mark(self, outline: np.ndarray, barbs: np.ndarray, length: float) -> list[Shape]:
        """A pale mark on the wing, with fine dark lines along the feathers across it."""
        along = (np.array([-0.85, 0.5]) @ rotation(self.tilt)) * (self.facing, 1) * (length * self.scale) / 2
        strokes = (line(at - along, at + along, 0.005 * self.scale) for at in barbs)
        return [(outline, self.pale, 225), *((s, tint(self.wing, 0.8), 170) for s in strokes)]

    def _parts(self) -> dict[str, list[Shape]]:
        """The shapes of each of PARTS."""
        outer, inner = self._oval(self.eye, 0.057), self._oval(self.eye, 0.041)
        ring = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])
        stripe = self._ribbon(curve(self._place(EYE_STRIPE)), 0.022, 0.036, 0.044, 0.04, 0.008)
        bar = curve(self._place(WING_BAR))
        yellowish = mix(self.pale, (226, 184, 84), 0.55)
        bands = [self._ribbon(leg[at : at + 3], 0.034) for leg in self._leg_paths() for at in (2, 6, 10)]
        return {
            "hooked-beak": self._beak("hooked-beak"),
            "straight-beak": self._beak("straight-beak"),
            "eye-ring": [(ring, self.pale, 235)],
            "eye-stripe": [(stripe, self.pale if sum(self.head) < 270 else (40, 32, 30), 255)],
            "wing-bar": self._pale_mark(self._ribbon(bar, 0.02, 0.03, 0.02), bar[3:-2:4], 0.022),
            "wing-patch": self._pale_mark(self._outline(WING_PATCH), self._place(PATCH_BARBS), 0.06),
            "red-legs": self._legs(self.red),
            "banded-legs": [(band, yellowish, 255) for band in bands],
        }
