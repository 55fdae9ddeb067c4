"""A trained network in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from racnn_cli.core import metrics, store
from racnn_cli.core.device import select_device
from racnn_cli.data.color import as_range
from racnn_cli.export.prediction import NetworkOutput


class TorchNetwork:
    """A `Network` that runs in PyTorch.

    Args:
        folder: of a run, or one that `racnn export --format safetensors` wrote.
        device: where to compute.

    Raises:
        RunError: no such folder, or a file in it is missing or damaged.
        RacnnError: no such device.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self.device = select_device(device)
        model, run = store.load(folder)
        self.model = model.to(self.device)
        data = run.recipe().data
        self.classes, self.fit, self.value_range = run.classes(), data.fit, as_range(data.range)
        self.source, self.scales = model.source, len(model.sizes)

    @torch.inference_mode()
    def predict(self, squares: np.ndarray) -> NetworkOutput:
        """As `Network.predict`."""
        output = self.model(torch.from_numpy(squares).permute(0, 3, 1, 2).to(self.device))
        scales = self.model.scale_probabilities(output.logits)
        corners = [metrics.corners(box.float()) for box in output.boxes]
        boxes = torch.stack(corners, dim=1) if corners else torch.zeros(len(squares), 0, 4)
        return NetworkOutput(
            probabilities=output.probabilities.float().cpu().numpy(),
            scales=scales.cpu().numpy(),
            boxes=boxes.cpu().numpy(),
            ran=np.full(len(squares), self.scales),
        )
