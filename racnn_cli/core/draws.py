"""Random numbers that belong to an image.

What is drawn for an image depends on its key and on how many numbers were drawn for it before, and neither on the
other images of the batch nor on which process computes it: a training shared out over several processes, or cut
into other batches, draws what one process would have drawn.

The generator is counter-based: the n-th number is a mixture of key + n (SplitMix64; Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the odd number nearest to 2^64 over the golden ratio, as a signed one


class Draws:
    """A stream of numbers for each of B images.

    Args:
        keys: (B,) int64; the same key, the same numbers.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.drawn = keys, 0

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Draws:
        """The streams that start at a batch's `key` (B,), or, where it has none, at some from torch's generator."""
        labels = batch["label"]
        return cls(
            batch["key"] if "key" in batch else torch.randint(2**62, labels.shape, device=labels.device)
        )

    def uniform(self, count: int) -> Tensor:
        """The next numbers: (B, count) float32, evenly spread between 0 and 1, neither of which is reached."""
        number = torch.arange(self.drawn + 1, self.drawn + 1 + count, device=self.keys.device)
        self.drawn += count
        mixed = _mixed(self.keys[:, None] + number * _GOLDEN)
        return (_shifted(mixed, 41).float() + 0.5) * 2.0**-23

    def normal(self, count: int) -> Tensor:
        """The next numbers: (B, count) float32, of mean 0 and standard deviation 1 (Box and Muller 1958)."""
        length, turn = self.uniform(2 * count).chunk(2, dim=1)
        return (-2 * length.log()).sqrt() * (2 * math.pi * turn).cos()


def keys(seed: int, epoch: int, index: Tensor) -> Tensor:
    """(B,) int64: one key for each image of a data set and each time that it is seen.

    Args:
        seed, epoch: from 0.
        index: (B,) int64: which image.
    """
    start = torch.tensor([seed], dtype=torch.int64, device=index.device)
    return _mixed(_mixed(_mixed(start + _GOLDEN) + epoch) + index)


def _mixed(value: Tensor) -> Tensor:
    """SplitMix64's finish: every bit of the result depends on every bit of the (int64) value."""
    value = (value ^ _shifted(value, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ _shifted(value, 27)) * (0x94D049BB133111EB - 2**64)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """To the right with zeros from the left, as if int64 had no sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
