"""A run's network, in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from racnn_cli.core import metrics, store
from racnn_cli.core.device import select_device
from racnn_cli.export.prediction import Answers


class TorchNetwork:
    """See `prediction.Network`.

    Args:
        folder: of a run, or one that `racnn export --safetensors` wrote.
        device: where to compute.

    Raises:
        RacnnError: it is no such folder, a file in it is missing or damaged, no such device.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self.device = select_device(device)
        model, run = store.load(folder)
        self.model = model.to(self.device)
        self.classes, self.fit = run.classes(), run.recipe().data.fit
        self.source, self.scales = model.source, len(model.sizes)

    @torch.inference_mode()
    def answer(self, squares: np.ndarray) -> Answers:
        """See `prediction.Network`."""
        output = self.model(torch.from_numpy(squares).permute(0, 3, 1, 2).to(self.device))
        scales = torch.stack([logits.float().softmax(dim=1) for logits in output.logits], dim=1)
        boxes = torch.zeros(len(squares), 0, 4)
        if output.boxes:
            boxes = torch.stack([metrics.corners(box.float()) for box in output.boxes], dim=1)
        ran = torch.full((len(squares),), scales.shape[1])
        return Answers(*(value.cpu().numpy() for value in (output.probabilities.float(), scales, boxes, ran)))
