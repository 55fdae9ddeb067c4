"""Find identical images: in two splits, in two classes, or listed twice."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from racnn_cli.data.decode import show
from racnn_cli.data.listing import Row
from racnn_cli.errors import DataError

MAX_LEAK = 0.01
"""Share of the test images that may be in train, too."""


def find_duplicates(splits: Mapping[str, Sequence[tuple[Row, bytes]]], *, allow: bool) -> list[str]:
    """Compare the contents of images.

    Args:
        splits: the rows of each split that were read, and the hash of each file's contents.
        allow: go on although many test images are in train.

    Returns:
        Notes with the number of images in two splits, in two classes, and listed twice.

    Raises:
        DataError: more than 1 % of the test images are in train, and not `allow`.
    """
    groups: dict[bytes, list[tuple[str, Row]]] = defaultdict(list)
    for split, rows in splits.items():
        for row, digest in rows:
            groups[digest].append((split, row))
    copies = [group for group in groups.values() if len(group) > 1]
    notes = []
    for first, second in itertools.combinations(splits, 2):
        pairs = [
            (row, twin)
            for group in copies
            for split, row in group
            if split == second and (twin := next((row for split, row in group if split == first), None))
        ]
        if not pairs:
            continue
        share = len(pairs) / len(splits[second])
        text = (
            f"{len(pairs)} of the {len(splits[second])} {second} images are also in {first}, such as "
            f"{show(pairs[0][0].name)} and {show(pairs[0][1].name)}"
        )
        if (first, second) == ("train", "test") and share > MAX_LEAK and not allow:
            raise DataError(
                f"{text}: the network would be tested on images that it was trained on",
                "remove the copies, or continue with them: --set data.allow_duplicates=true",
            )
        notes.append(text)
    mixed = [group for group in copies if len({row.label for _, row in group}) > 1]
    if mixed:
        (_, row), *others = mixed[0]
        twin = next(other for _, other in others if other.label != row.label)
        count = sum(map(len, mixed))
        notes.append(f"{count} identical images are in two classes, such as {show(row.name)} and {show(twin.name)}")
    if repeated := sum(len(group) - 1 for group in copies):
        (_, row), (_, twin), *_ = copies[0]
        notes.append(f"{repeated} image(s) are copies of another one, such as {show(row.name)} and {show(twin.name)}")
    return notes


def overlap_notes(rows: Sequence[tuple[Row, bytes]], contents: Mapping[str, bytes]) -> list[str]:
    """Notes on the images that a run was trained or chosen on.

    Args:
        rows: of the images to measure on, and the hash of each file's contents.
        contents: split of the run to the hashes of its images, as in `Index.contents`.
    """
    notes = []
    for split, joined in contents.items():
        known = {joined[start : start + 16] for start in range(0, len(joined), 16)}
        if seen := [row for row, digest in rows if digest in known]:
            notes.append(
                f"{len(seen)} of the {len(rows)} images are in the run's {split} split, such as {show(seen[0].name)}: "
                "the figures are better than on new images"
            )
    return notes
