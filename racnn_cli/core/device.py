"""Choice of the device."""

from __future__ import annotations

import torch

from racnn_cli.errors import RecipeError


def available_devices() -> list[str]:
    """List the device types of this machine, fastest first."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_available in available.items() if is_available]


def select_device(name: str = "auto") -> torch.device:
    """Return the named device; `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        RecipeError: this machine has no such device.
    """
    devices = available_devices()
    if name == "auto":
        name = devices[0]
    if name not in devices:
        raise RecipeError(f"device {name!r} is not on this machine; it has {', '.join(devices)}", "train.device = auto")
    return torch.device(name)
