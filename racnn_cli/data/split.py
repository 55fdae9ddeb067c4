"""One set of images becomes train, val and test: stratified, a pure function of the seed and the names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def sizes(count: int, shares: Sequence[float]) -> list[int]:
    """How many of a class's `count` images each held-out split gets.

    Each gets its share, rounded, and at least one; at least one stays for training. Where there are too few
    for that, the first splits are served first: of two images, one is in train and one in the first split.
    """
    held: list[int] = []
    left = count - 1
    for place, share in enumerate(shares):
        later = sum(other > 0 for other in shares[place + 1 :])
        number = max(1, int(count * share + 0.5)) if share > 0 else 0
        number = min(number, max(left - later, min(left, 1)))
        held.append(number)
        left -= number
    return held


def hold_out(
    labels: Mapping[str, Sequence[str]], shares: Mapping[str, float], *, seed: int
) -> tuple[list[str], dict[str, list[str]]]:
    """Split each class by itself.

    Args:
        labels: class name to the names of its images.
        shares: split name to its share of all images (0 leaves it empty).
        seed: of the choice.

    Returns:
        What is left for training, and the images of each split; sorted.
    """
    rest: list[str] = []
    held: dict[str, list[str]] = {split: [] for split in shares}
    for label in sorted(labels):
        names = _shuffled(labels[label], label, seed)
        for split, number in zip(shares, sizes(len(names), list(shares.values())), strict=True):
            held[split] += names[:number]
            names = names[number:]
        rest += names
    return sorted(rest), {split: sorted(names) for split, names in held.items()}


def choose(names: Sequence[str], number: int, label: str, *, seed: int) -> list[str]:
    """At most `number` of the names of one class, sorted."""
    return sorted(_shuffled(names, label, seed)[:number])


def _shuffled(names: Sequence[str], label: str, seed: int) -> list[str]:
    # A class has a stream of its own: a class more or less does not move the images of the others.
    stream = np.random.default_rng((seed, *label.encode("utf-8", "surrogateescape")))
    ordered = sorted(names)
    return [ordered[place] for place in stream.permutation(len(ordered))]
