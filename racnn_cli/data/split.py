"""Split a list of images into train, val and test: stratified, a pure function of the seed and the names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def hold_out(
    labels: Mapping[str, Sequence[str]], shares: Mapping[str, float], *, seed: int
) -> tuple[list[str], dict[str, list[str]]]:
    """Hold out a share of each class for each split.

    Args:
        labels: class name to the names of its images.
        shares: split name to its share of all images (0 leaves it empty).
        seed: of the random choice.

    Returns:
        The names left for training, and the names of each split; all sorted.
    """
    rest: list[str] = []
    held: dict[str, list[str]] = {split: [] for split in shares}
    for label in sorted(labels):
        names = _shuffle(labels[label], label, seed)
        for split, count in zip(shares, _held_out_counts(len(names), list(shares.values())), strict=True):
            held[split] += names[:count]
            names = names[count:]
        rest += names
    return sorted(rest), {split: sorted(names) for split, names in held.items()}


def choose(names: Sequence[str], count: int, label: str, *, seed: int) -> list[str]:
    """Choose at most `count` names of one class at random; sorted."""
    return sorted(_shuffle(names, label, seed)[:count])


def _held_out_counts(total: int, shares: Sequence[float]) -> list[int]:
    """How many of a class's `total` images each held-out split gets.

    Each split gets its rounded share, but at least one image; at least one image stays for training. If there are
    too few, earlier splits come first: of two images, one goes to train and one to the first split.
    """
    counts: list[int] = []
    available = total - 1
    for position, share in enumerate(shares):
        later_splits = sum(later > 0 for later in shares[position + 1 :])
        count = max(1, int(total * share + 0.5)) if share > 0 else 0
        count = min(count, max(available - later_splits, min(available, 1)))
        counts.append(count)
        available -= count
    return counts


def _shuffle(names: Sequence[str], label: str, seed: int) -> list[str]:
    # Each class has its own random stream, so that adding a class does not move the images of the others.
    generator = np.random.default_rng((seed, *label.encode("utf-8", "surrogateescape")))
    ordered = sorted(names)
    return [ordered[position] for position in generator.permutation(len(ordered))]
