"""Where the arithmetic happens."""

from __future__ import annotations

import torch

from racnn_cli.errors import RacnnError


def present() -> list[str]:
    """The devices of this machine, fastest first."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in found.items() if there]


def select_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU; any other name is taken at its word.

    Raises:
        RacnnError: this machine has no such device.
    """
    here = present()
    if name == "auto":
        name = here[0]
    if name not in here:
        raise RacnnError(
            f"device {name!r} is not on this machine; it has {', '.join(here)}", "train.device = auto"
        )
    return torch.device(name)
