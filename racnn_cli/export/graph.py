"""The network as it leaves the house: from images of any size to answers, one graph, nothing left to do outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor, nn

from racnn_cli.core import metrics
from racnn_cli.core.model import RACNN, Output
from racnn_cli.data.geometry import GREY


@dataclass(frozen=True)
class Form:
    """What goes in and what comes out.

    Attributes:
        raw: images are (B, H, W, 3) uint8, as a decoder gives them; else (B, 3, H, W) float32 in [0, 1].
        top: how many labels are named.
        crops: give what the finer scales saw, too.
    """

    raw: bool = False
    top: int = 5
    crops: bool = False


Inputs = dict[str, tuple[Tensor, dict[int, Any]]]


class Deployed(nn.Module):
    """RACNN with all that stands before and after it.

    Args:
        model: the network.
        fit: `crop`, `pad` or `squash`: how an image that is not square becomes so.
        form: of input and outputs.
    """

    def __init__(self, model: RACNN, fit: str, form: Form) -> None:
        super().__init__()
        self.model, self.fit, self.form = model, fit, form

    @property
    def names(self) -> list[str]:
        """Of the outputs, in the order of `forward`."""
        finer = range(2, len(self.model.sizes) + 1)
        names = ["probabilities", "labels", "scales", *(["boxes"] if finer else [])]
        return names + [f"crop_{number}" for number in finer if self.form.crops]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images of any height H and width W to the answers.

        Args:
            image: (B, H, W, 3) uint8 or (B, 3, H, W) float32 in [0, 1], as `form` says.

        Returns:
            probabilities (B, N); labels (B, top) int64, best first; scales (B, S, N), the probabilities of each
            scale alone; with more than one scale boxes (B, S - 1, 4), x0, y0, x1, y1 in pixels of `image`, inside
            it; with `form.crops` what each finer scale saw, (B, 3, s, s) in [0, 1].
        """
        image = self._float(image)
        square, left, top = self._square(image)
        return self._answer(self.model(square), image, square, left, top)

    def inputs(self) -> Inputs:
        """Name to an example to trace the network with, and which of its dimensions may be any."""
        # No two dimensions alike, none the network's own or 1: the exporter would take them for one or for constants.
        side = self.model.source
        example = torch.zeros(2, 3, side + 10, side + 22)
        batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
        if self.form.raw:
            example = example.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
            return {"image": (example, {0: batch, 1: height, 2: width})}
        return {"image": (example, {0: batch, 2: height, 3: width})}

    def extra(self, image: Tensor) -> Iterator[dict[str, Tensor]]:
        """The sets of further inputs with which the graph is to be tried on these images."""
        yield {}

    def _float(self, image: Tensor) -> Tensor:
        """The images as (B, 3, H, W) in [0, 1]."""
        return image.permute(0, 3, 1, 2).float() / 255 if self.form.raw else image

    def _answer(
        self, output: Output, image: Tensor, square: Tensor, left: int | SymInt, top: int | SymInt
    ) -> tuple[Tensor, ...]:
        """What `forward` returns, from what the network gives for `square`, which lies at `left`, `top` in `image`."""
        height, width = image.shape[2], image.shape[3]
        scales = torch.stack([logits.softmax(dim=1) for logits in output.logits], dim=1)
        found = [output.probabilities, self._labels(output.probabilities), scales]
        if output.boxes:
            boxes = torch.stack([metrics.corners(box) for box in output.boxes], dim=1)  # (B, S - 1, 4)
            pixels = boxes * _twice(square.shape[3], square.shape[2], boxes) + _twice(left, top, boxes)
            found.append(torch.minimum(pixels.clamp_min(0.0), _twice(width, height, boxes)))
        if self.form.crops:
            model = self.model
            found += [(view * model.std + model.mean).clamp(0.0, 1.0) for view in output.views[1:]]
        return tuple(found)

    def _labels(self, probabilities: Tensor) -> Tensor:
        """The best classes (B, top) of (B, N)."""
        return probabilities.topk(min(self.form.top, self.model.classes), dim=1).indices

    def _square(self, image: Tensor) -> tuple[Tensor, int | SymInt, int | SymInt]:
        """The square image, and where its top left corner lies in `image`: x, y in pixels.

        A stretched image stays as it is: boxes are shares of the two sides, and so the crop stretches it.
        """
        height, width = image.shape[2], image.shape[3]
        if self.fit == "squash":
            return image, 0, 0
        if self.fit == "crop":
            side = torch.sym_min(height, width)
            left, top = (width - side) // 2, (height - side) // 2
            # By index: of a slice, torch.export would remember whether it was the whole image.
            rows, columns = (torch.arange(side, device=image.device) + start for start in (top, left))
            return image.index_select(2, rows).index_select(3, columns), left, top
        side = torch.sym_max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        borders = (left, side - width - left, top, side - height - top)
        return F.pad(image, borders, value=GREY[0] / 255), -left, -top  # type: ignore[arg-type]


def _twice(x: int | SymInt, y: int | SymInt, like: Tensor) -> Tensor:
    """(4,): x, y, x, y, for both corners of a box."""
    each = [torch.scalar_tensor(value, dtype=like.dtype, device=like.device) for value in (x, y)]
    return torch.stack(each * 2)
