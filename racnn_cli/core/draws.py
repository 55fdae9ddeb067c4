"""Random numbers per image.

The numbers depend on the image's key and on how many were drawn for it before, not on the rest of the batch or on
the process. Training on several processes, or with other batch sizes, therefore draws the same numbers.

The generator is counter-based: number n is a hash of key + n (SplitMix64; Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the odd integer nearest to 2^64 / golden ratio, as a signed integer


class Draws:
    """One stream of random numbers for each of B images.

    Args:
        keys: (B,) int64; equal keys give equal numbers.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.drawn = keys, 0

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Draws:
        """Start the streams of a batch from its `key` (B,), or without one from torch's global generator."""
        labels = batch["label"]
        return cls(batch["key"] if "key" in batch else torch.randint(2**62, labels.shape, device=labels.device))

    def uniform(self, count: int) -> Tensor:
        """Draw (B, count) float32 numbers from U(0, 1), both ends excluded."""
        counter = torch.arange(self.drawn + 1, self.drawn + 1 + count, device=self.keys.device)
        self.drawn += count
        bits = _mix(self.keys[:, None] + counter * _GOLDEN)
        return (_shift_right(bits, 41).float() + 0.5) * 2.0**-23

    def normal(self, count: int) -> Tensor:
        """Draw (B, count) float32 numbers from the standard normal distribution (Box and Muller 1958)."""
        radius, angle = self.uniform(2 * count).chunk(2, dim=1)
        return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def keys(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Return one key (B,) int64 per image and epoch.

    Args:
        seed, epoch: non-negative.
        index: (B,) int64 positions in the data set.
    """
    start = torch.tensor([seed], dtype=torch.int64, device=index.device)
    return _mix(_mix(_mix(start + _GOLDEN) + epoch) + index)


def _mix(value: Tensor) -> Tensor:
    """Apply SplitMix64's output function to int64 values."""
    value = (value ^ _shift_right(value, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ _shift_right(value, 27)) * (0x94D049BB133111EB - 2**64)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift int64 values as if they were unsigned."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
