"""The bird's plan: its outlines, its pose, and the colours that birds of every class share.

The bird is designed facing right, one unit long from tail to beak, y down, the body's centre at (0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from racnn_cli.data.datasets.brush import Colour, rotation

Points = np.ndarray | tuple[tuple[float, float], ...]

BODY = (
    (0.345, -0.232), (0.305, -0.305), (0.225, -0.335), (0.135, -0.305), (0.075, -0.225), (-0.03, -0.135),
    (-0.14, -0.04), (-0.25, 0.07), (-0.315, 0.15), (-0.25, 0.185), (-0.13, 0.2), (0.02, 0.195), (0.15, 0.145),
    (0.25, 0.045), (0.295, -0.06), (0.31, -0.13), (0.345, -0.185),
)  # fmt: skip
WING = (
    (0.175, -0.05), (0.11, -0.12), (-0.01, -0.11), (-0.16, -0.015), (-0.29, 0.09), (-0.41, 0.195),
    (-0.3, 0.165), (-0.17, 0.14), (-0.03, 0.115), (0.1, 0.085), (0.17, 0.025),
)  # fmt: skip
RUMP = (-0.22, 0.13)  # where the tail turns
TAIL = (
    (-0.2, 0.08), (-0.36, 0.165), (-0.53, 0.255), (-0.545, 0.29), (-0.5, 0.3), (-0.34, 0.23), (-0.2, 0.18),
)  # fmt: skip
CROWN = (
    (0.35, -0.24), (0.3, -0.32), (0.22, -0.35), (0.12, -0.32), (0.05, -0.22), (0.16, -0.265), (0.26, -0.275),
)  # fmt: skip
BREAST = ((0.33, -0.17), (0.36, 0.0), (0.2, 0.12), (0.1, 0.1), (0.17, -0.02), (0.19, -0.14))
BELLY = ((0.36, 0.06), (0.2, 0.26), (-0.2, 0.26), (-0.32, 0.17), (-0.16, 0.14), (0.08, 0.08), (0.2, 0.04))
EYE = (0.262, -0.238)

# back, head, breast, belly
PLUMAGES: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
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
HORN: tuple[Colour, ...] = ((70, 64, 60), (98, 86, 74), (136, 112, 74), (84, 88, 96))
SHANKS: tuple[Colour, ...] = ((92, 82, 76), (112, 94, 78), (74, 70, 72), (126, 106, 84))
PALE: tuple[Colour, ...] = ((246, 240, 226), (240, 230, 204), (248, 246, 242))


@dataclass(frozen=True)
class Pose:
    """Where the bird sits and how it holds itself; angles in radians, clockwise before mirroring."""

    scale: float  # length from tail to beak in units of the image's side
    mirrored: bool
    tilt: float
    nod: float  # of the head
    tail: float
    plump: float  # height of the body relative to the design
    centre: tuple[float, float] = (0.0, 0.0)

    def place(self, points: Points) -> np.ndarray:
        """Design points (n, 2) in the units of the image."""
        design = np.asarray(points, dtype=float)
        # how much a point belongs to the head: 0 at the shoulder, 1 at the eye
        head = np.clip((design @ (0.6, -0.8) - 0.08) / 0.18, 0, 1)[:, None]
        head = head * head * (3 - 2 * head)
        neck = np.array([0.12, -0.1])
        design = design + head * ((design - neck) @ rotation(self.nod) + neck - design)
        design = (design * (1, self.plump)) @ rotation(self.tilt)
        return design * (-1 if self.mirrored else 1, 1) * self.scale + np.asarray(self.centre)
