"""What a data set consists of: its images, classes and splits."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        left_out: split to class name to the number of images that `data.skip_bad` left out. Files in formats that
            cannot be read are among them if the data name their split, else counted in a note.
        value_range: the values of images with more than 8 bits that become 0 and 255; None if there are no such images.
        contents: `train` and `val` to the 16-byte hashes of the contents of their images, sorted and joined; empty
            strings if the images were not verified.
        own_splits: the splits that the data name themselves, for which `data.val` and `data.test` are not used.
        side: of a square in pixels, such that its images are neither enlarged nor reduced in the median, as `data.fit`
            makes them square; 0 if the files were not verified or are drawn.
    """

    classes: list[str]
    splits: dict[str, list[Item]]
    skipped: list[str]
    notes: list[str]
    fingerprint: str
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    value_range: tuple[float, float] | None = None
    contents: dict[str, bytes] = field(default_factory=dict)
    own_splits: frozenset[str] = frozenset()
    side: int = 0


@dataclass(frozen=True)
class Labelled:
    """Labelled images that are not split, to measure a trained network on.

    Attributes:
        items: the images.
        left_out: class name to the number of images that `data.skip_bad` left out.
        notes: remarks that are not errors, one sentence each.
        value_range: as in `Index`.
    """

    items: list[Item]
    left_out: dict[str, int]
    notes: list[str]
    value_range: tuple[float, float] | None = None
