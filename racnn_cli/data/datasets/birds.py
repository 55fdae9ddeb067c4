"""One drawn bird: its plumage, and the eight small parts, one of which tells its class."""

from __future__ import annotations

import dataclasses

import numpy as np

from racnn_cli.data.datasets import pose as plan
from racnn_cli.data.datasets.brush import (
    Canvas,
    Colour,
    Shape,
    bounds,
    contains,
    curve,
    line,
    mix,
    oval,
    ribbon,
    rotation,
    tint,
    toward,
)
from racnn_cli.data.datasets.scenery import pick

PARTS = (
    "hooked-beak", "straight-beak", "eye-ring", "eye-stripe",
    "wing-bar", "wing-patch", "red-legs", "banded-legs",
)  # fmt: skip


class Bird:
    """A bird of no class yet: every random choice is made here, so that none depends on the class.

    Args:
        rng: where the choices come from.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        back, head, breast, belly = plan.PLUMAGES[rng.integers(len(plan.PLUMAGES))]
        self.back, self.head = pick(rng, (back,)), pick(rng, (head,), 7)
        self.breast, self.belly = pick(rng, (breast,)), pick(rng, (belly,), 7)
        self.crown = tint(self.head, rng.uniform(0.72, 1.05))
        self.wing = tint(mix(self.back, (92, 82, 74), 0.3), rng.uniform(0.72, 0.88))
        self.horn, self.shanks = pick(rng, plan.HORN, 6), pick(rng, plan.SHANKS, 6)
        self.pale, self.red = pick(rng, plan.PALE, 4), pick(rng, ((186, 72, 52),), 8)
        self.light = np.array([rng.uniform(-0.6, 0.6), -0.85])
        self.pose = plan.Pose(
            scale=rng.uniform(0.48, 0.66),
            mirrored=bool(rng.uniform() < 0.5),
            tilt=rng.uniform(-0.38, 0.22),
            nod=rng.uniform(-0.2, 0.28),
            tail=rng.uniform(-0.3, 0.22),
            plump=rng.uniform(0.92, 1.1),
        )
        self.shank = rng.uniform(0.125, 0.16) * self.pose.scale
        self.slope = rng.uniform(-0.22, 0.22)  # of the twig
        x0, y0, x1, y1 = bounds(
            [self._outline(plan.BODY), self._tail(), *(p for p, _, _ in self._beak("straight-beak"))]
        )
        y1 = max(y1, self._feet()[:, 1].max() + 0.05 * self.pose.scale)
        spot = (rng.uniform(0.05 - x0, 0.95 - x1), rng.uniform(0.06 - y0, 0.93 - y1))
        self.pose = dataclasses.replace(self.pose, centre=spot)

        self._down = self._feathers(rng)
        self._speckles = self._spots(rng)
        self.parts = {name: self._part(name) for name in PARTS}

    @property
    def foot(self) -> np.ndarray:
        """The point (2,) between the feet, on the upper edge of the twig."""
        return self._feet().mean(axis=0)

    def box(self, part: str) -> tuple[float, float, float, float]:
        """The box x0, y0, x1, y1 around what tells a class, in units of the image's side."""
        shapes = self.parts[part] + (self._beak("") if part.endswith("beak") else [])
        return bounds(polygon for polygon, _, _ in shapes)

    def paint(self, canvas: Canvas, part: str) -> None:
        """Draw the bird with the one part that tells its class."""
        tail = self._tail()
        canvas.shade(tail, tint(self.wing, 0.92), [], light=self.light)
        root, fine = self.pose.place((plan.RUMP,))[0], self._unit(0.009)
        canvas.draw((line(root, end, fine / 3, fine), tint(self.wing, 0.6), 130) for end in tail[16:33:4])
        canvas.draw(self._legs(self.shanks))
        if part.endswith("legs"):
            canvas.draw(self.parts[part])
        self._plumage(canvas)
        self._wing(canvas)
        if part.startswith(("wing", "eye")):
            canvas.draw(self.parts[part])
        canvas.draw(self.parts[part] if part.endswith("beak") else self._beak(""))
        canvas.draw(self._eye())

    # ---- outlines

    def _unit(self, length: float) -> float:
        return length * self.pose.scale

    def _outline(self, points: plan.Points) -> np.ndarray:
        return curve(self.pose.place(points), closed=True)

    def _tail(self) -> np.ndarray:
        rump = np.asarray(plan.RUMP)
        return self._outline((np.asarray(plan.TAIL) - rump) @ rotation(self.pose.tail) + rump)

    def _hips(self) -> np.ndarray:
        return self.pose.place(((0.045, 0.185), (-0.045, 0.192)))

    def _feet(self) -> np.ndarray:
        # both feet stand on the twig, whatever the tilt of the body
        hips = self._hips()
        ground = hips[:, 1].max() + self.shank * 0.8
        x = hips[:, 0] + (-0.03 if self.pose.mirrored else 0.03) * self.pose.scale
        return np.stack([x, ground + self.slope * (x - x.mean())], axis=1)

    # ---- shapes

    def _plumage(self, canvas: Canvas) -> None:
        patches: list[Shape] = [
            (self._outline(plan.BELLY), self.belly, 255),
            (self._outline(plan.BREAST), self.breast, 235),
            (oval(self.pose.place((plan.EYE,))[0], self._unit(0.125)), self.head, 255),
            (self._outline(plan.CROWN), self.crown, 230),
        ]
        canvas.shade(self._outline(plan.BODY), self.back, patches, light=self.light)
        canvas.draw(self._down)
        canvas.draw(self._speckles)

    def _feathers(self, rng: np.random.Generator) -> list[Shape]:
        """Short fine strokes along the body, light and dark."""
        flank = np.array([0.0, 0.03]) + rng.uniform(-1, 1, (150, 2)) @ np.array([(0.2, -0.06), (0.07, 0.13)])
        skull = np.array([0.22, -0.22]) + rng.uniform(-1, 1, (50, 2)) * (0.07, 0.07)
        starts = np.concatenate([flank, skull])
        tips = (
            starts
            + np.array([-0.034, 0.016]) * rng.uniform(0.6, 1.3, (200, 1))
            + rng.normal(0, 0.004, (200, 2))
        )
        starts, tips = self.pose.place(starts), self.pose.place(tips)
        body, wide, fine = self._outline(plan.BODY), self._unit(0.009), self._unit(0.002)
        light = (rng.uniform(size=200) < 0.5).tolist()
        inside = contains(body, starts) & contains(body, tips)
        return [
            (line(starts[i], tips[i], wide, fine), (255, 246, 226) if light[i] else (40, 30, 24), 38)
            for i in np.flatnonzero(inside).tolist()
        ]

    def _spots(self, rng: np.random.Generator) -> list[Shape]:
        """Some birds have a streaked breast, whatever their class."""
        dark, streaked = tint(self.breast, 0.5), rng.uniform() < 0.35
        at = np.array([0.17, 0.05]) + rng.uniform(-1, 1, (26, 2)) @ np.array([(0.03, -0.085), (0.075, 0.03)])
        starts, ends = self.pose.place(at), self.pose.place(at + np.array([-0.008, 0.026]))
        inside = (
            contains(self._outline(plan.BODY), starts) & contains(self._outline(plan.BODY), ends) & streaked
        )
        narrow, wide = self._unit(0.005), self._unit(0.012)
        return [(line(starts[i], ends[i], narrow, wide), dark, 130) for i in np.flatnonzero(inside)]

    def _wing(self, canvas: Canvas) -> None:
        dark, light = tint(self.wing, 0.62), mix(self.wing, (236, 222, 196), 0.32)
        tip = oval(self.pose.place(((-0.43, 0.21),))[0], self._unit(0.2))
        canvas.shade(
            self._outline(plan.WING), self.wing, [(tip, tint(self.wing, 0.74), 255)], light=self.light
        )
        for share in np.linspace(0.08, 0.92, 8):  # long feathers, from the coverts to the tip
            start = (-0.03 + 0.03 * share, -0.085 + 0.19 * share)
            middle = (-0.17 + 0.02 * share, 0.015 + 0.105 * share)
            end = (-0.3 - 0.09 * (1 - abs(2 * share - 1.0)), 0.105 + 0.055 * share + 0.02)
            quill = curve(self.pose.place((start, middle, end)), closed=False)
            canvas.fill(ribbon(quill, [self._unit(0.012), self._unit(0.004)]), dark, 150)
            canvas.fill(
                ribbon(quill + np.array([0, self._unit(0.009)]), [self._unit(0.006), self._unit(0.002)]),
                light,
                110,
            )
        for row, (x, count) in enumerate(((0.125, 5), (0.08, 6), (0.035, 7))):  # small rounded feathers
            for share in np.linspace(0.04, 0.9, count):
                y = -0.095 + 0.175 * share + 0.008 * row
                root, end = self.pose.place(((x - 0.018 - 0.02 * share, y), (x, y)))
                turn = float(np.arctan2(*(end - root)[::-1]))
                rim = oval(root, self._unit(0.027), self._unit(0.017), turn)
                canvas.fill(rim, dark, 120)
                canvas.fill(toward(rim, end, 0.2), mix(self.wing, light, 0.35), 150)

    def _eye(self) -> list[Shape]:
        centre = self.pose.place((plan.EYE,))[0]
        glint = centre + self.light * self._unit(0.009)
        return [
            (oval(centre, self._unit(0.029)), (44, 32, 26), 255),
            (oval(centre, self._unit(0.021)), (18, 14, 14), 255),
            (oval(glint, self._unit(0.0075)), (255, 255, 255), 240),
        ]

    def _beak(self, kind: str) -> list[Shape]:
        """The short plain beak of every bird, or one of the two that tell a class."""
        if kind == "hooked-beak":
            upper = [
                (0.325, -0.25), (0.375, -0.252), (0.425, -0.228), (0.442, -0.182),
                (0.43, -0.145), (0.421, -0.172), (0.398, -0.19), (0.33, -0.2),
            ]  # fmt: skip
            lower = [(0.33, -0.205), (0.395, -0.19), (0.402, -0.176), (0.375, -0.168), (0.33, -0.17)]
        else:
            tip = 0.475 if kind else 0.405
            upper = [(0.325, -0.247), (0.325 + (tip - 0.325) * 0.45, -0.232), (tip, -0.199), (0.33, -0.2)]
            lower = [
                (0.33, -0.206),
                (tip - 0.012, -0.199),
                (0.325 + (tip - 0.325) * 0.45, -0.182),
                (0.33, -0.17),
            ]
        steps = 5 if kind == "hooked-beak" else 1
        top, bottom = (
            curve(self.pose.place(tuple(edge)), closed=True, steps=steps) for edge in (upper, lower)
        )
        shine = toward(top, top.mean(axis=0), 0.45) + self.light * self._unit(0.006)
        return [
            (bottom, tint(self.horn, 0.78), 255),
            (top, self.horn, 255),
            (shine, mix(self.horn, (255, 244, 220), 0.35), 170),
        ]

    def _legs(self, colour: Colour) -> list[Shape]:
        shapes: list[Shape] = []
        forward = -1 if self.pose.mirrored else 1
        for number in (1, 0):  # the far leg first
            tone, path = tint(colour, 0.8 if number else 1.0), self._leg(number)
            foot = path[-1]
            shapes.append((ribbon(path, [self._unit(0.03), self._unit(0.02)]), tone, 255))
            for reach, drop in ((0.058, 0.01), (0.045, 0.026), (-0.036, 0.018)):
                end = (
                    foot + np.array([forward * reach, drop + forward * reach * self.slope]) * self.pose.scale
                )
                knuckle = toward(foot, end, 0.6) - (0, self._unit(0.008))
                toe = curve(np.stack([foot, knuckle, end]), closed=False, steps=4)
                shapes.append(
                    (ribbon(toe, [self._unit(0.018), self._unit(0.015), self._unit(0.005)]), tone, 255)
                )
        return shapes

    def _barbs(self, starts: np.ndarray, length: float) -> list[Shape]:
        """Fine dark lines along the feathers, across a pale mark."""
        back = (np.array([-0.85, 0.5]) @ rotation(self.pose.tilt)) * (-1 if self.pose.mirrored else 1, 1)
        reach = back * self._unit(length) / 2
        return [(line(at - reach, at + reach, self._unit(0.005)), tint(self.wing, 0.8), 170) for at in starts]

    def _leg(self, number: int) -> np.ndarray:
        hip, foot = self._hips()[number], self._feet()[number]
        heel = toward(hip, foot, 0.4) - ((-0.018 if self.pose.mirrored else 0.018) * self.pose.scale, 0)
        return curve(np.stack([hip, heel, foot]), closed=False, steps=6)

    def _part(self, name: str) -> list[Shape]:
        eye = self.pose.place((plan.EYE,))[0]
        ink = self.pale if sum(self.head) < 270 else (40, 32, 30)
        if name.endswith("beak"):
            return self._beak(name)
        if name == "eye-ring":
            outer, inner = oval(eye, self._unit(0.057)), oval(eye, self._unit(0.041))
            ring = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])
            return [(ring, self.pale, 235)]
        if name == "eye-stripe":
            band = curve(
                self.pose.place(((0.338, -0.222), (0.262, -0.238), (0.19, -0.23), (0.145, -0.21))),
                closed=False,
            )
            widths = np.array([0.022, 0.036, 0.044, 0.04, 0.008])
            return [(ribbon(band, (widths * self.pose.scale).tolist()), ink, 255)]
        if name == "wing-bar":
            band = curve(
                self.pose.place(((0.035, -0.098), (0.012, -0.03), (0.005, 0.035), (0.022, 0.093))),
                closed=False,
            )
            mark = ribbon(band, [self._unit(0.02), self._unit(0.03), self._unit(0.02)])
            return [(mark, self.pale, 225), *self._barbs(band[3:-2:4], 0.022)]
        if name == "wing-patch":
            edge = (
                (-0.01, -0.03),
                (-0.055, -0.035),
                (-0.105, 0.0),
                (-0.12, 0.035),
                (-0.065, 0.038),
                (-0.015, 0.015),
            )
            middle = self.pose.place(((-0.02, -0.02), (-0.04, -0.005), (-0.06, 0.012), (-0.06, 0.025)))
            return [(self._outline(edge), self.pale, 225), *self._barbs(middle, 0.06)]
        if name == "red-legs":
            return self._legs(self.red)
        yellowish = mix(self.pale, (226, 184, 84), 0.55)
        legs = (self._leg(1), self._leg(0))
        return [
            (ribbon(leg[at : at + 3], self._unit(0.034)), yellowish, 255) for leg in legs for at in (2, 6, 10)
        ]
