"""What a data set consists of: its images, classes and splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from racnn_cli.data.listing import Box

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        path: of the file.
        label: index of its class.
        box: ground-truth x, y, width, height in pixels of the stored file, if there is one.
    """

    path: Path
    label: int
    box: Box | None


@dataclass(frozen=True)
class Index:
    """All images of a data set.

    Attributes:
        classes: names in index order.
        splits: `train`, `val` and `test`; `test` is empty if nothing is held out for it.
        skipped: what `data.skip_bad` left out, one sentence each.
        notes: remarks that are not errors, one sentence each.
        fingerprint: hash of which file is in which split; if it changes, test images may have been trained on.
    """

    classes: list[str]
    splits: dict[str, list[Item]]
    skipped: list[str]
    notes: list[str]
    fingerprint: str
