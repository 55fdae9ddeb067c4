"""The exported graph: images of any size in; probabilities, labels and boxes out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor, nn

import racnn_cli
from racnn_cli.core import metrics, store
from racnn_cli.core.model import RACNN, Output
from racnn_cli.data.geometry import GREY
from racnn_cli.run import Run

Point = tuple[int | SymInt, int | SymInt]


@dataclass(frozen=True)
class ExportOptions:
    """Inputs and outputs of an exported graph.

    Attributes:
        raw: take images as (B, H, W, 3) uint8, as decoded; otherwise as (B, 3, H, W) float32 in [0, 1].
        top: number of labels to return.
        crops: also return the views of the finer scales.
    """

    raw: bool = False
    top: int = 5
    crops: bool = False


class ExportedGraph(nn.Module):
    """RACNN with its preprocessing and postprocessing: the PyTorch reference of an exported file.

    Args:
        model: the network.
        fit: how an image becomes square: `crop`, `pad` or `squash`.
        options: inputs and outputs.
    """

    extra_outputs: tuple[str, ...] = ()

    def __init__(self, model: RACNN, fit: str, options: ExportOptions) -> None:
        super().__init__()
        self.model, self.fit, self.options = model, fit, options

    @classmethod
    def from_run(cls, run: Run, options: ExportOptions | None = None) -> Self:
        """Load the network of a run."""
        model, _ = store.load(run.folder)
        return cls(model, run.recipe().data.fit, options or ExportOptions()).eval()

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in the order of `forward`."""
        finer = range(2, len(self.model.sizes) + 1)
        names = ["probabilities", "labels", "scales", *(["boxes"] if finer else [])]
        crops = [f"crop_{number}" for number in finer if self.options.crops]
        return [*names, *crops, *self.extra_outputs]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Classify images of any height H and width W.

        Args:
            image: (B, H, W, 3) uint8 if `options.raw`, else (B, 3, H, W) float32 in [0, 1].

        Returns:
            probabilities (B, N); labels (B, top) int64, best first; scales (B, S, N), the probabilities of each
            scale alone. With more than one scale, boxes (B, S - 1, 4): x0, y0, x1, y1 in pixels of `image`,
            clipped to it. With `options.crops`, the view of each finer scale, (B, 3, s, s) in [0, 1].
        """
        image, square, offset = self._prepare(image)
        return self._outputs(self.model(square), image, square, offset=offset)

    def example_inputs(self) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
        """Inputs to trace the graph with, and their dynamic dimensions."""
        # Dimensions that are equal, 1, or a size of the network would be specialized by the exporter.
        side = self.model.source
        example = torch.zeros(2, 3, side + 10, side + 22)
        batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
        if self.options.raw:
            example = example.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
            return {"image": example}, {"image": {0: batch, 1: height, 2: width}}
        return {"image": example}, {"image": {0: batch, 2: height, 3: width}}

    def extra_inputs(self, image: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield the sets of additional inputs to check the graph with on these images."""
        yield {}

    def metadata(self, run: Run) -> dict[str, str]:
        """The metadata of a file that is exported from a run."""
        model = self.model
        return {
            "classes": json.dumps(run.classes(), ensure_ascii=False),
            "source": str(model.source),
            "sizes": json.dumps(model.sizes),
            "fit": self.fit,
            "range": json.dumps(run.recipe().data.range),
            "mean": json.dumps(model.mean.flatten().tolist()),
            "std": json.dumps(model.std.flatten().tolist()),
            "layout": "NHWC" if self.options.raw else "NCHW",
            "top": str(self.options.top),
            "racnn": racnn_cli.__version__,
            "recipe": run.recipe_file.read_text(encoding="utf-8"),
            "recipe_sha256": recipe_hash(run),
        }

    def _outputs(self, output: Output, image: Tensor, square: Tensor, *, offset: Point) -> tuple[Tensor, ...]:
        """What `forward` returns; `square` lies at `offset` in `image`."""
        scales = self.model.scale_probabilities(output.logits)
        outputs = [output.probabilities, self._top_labels(output.probabilities), scales]
        if output.boxes:
            boxes = torch.stack([metrics.corners(box) for box in output.boxes], dim=1)  # (B, S - 1, 4)
            pixels = boxes * _xyxy(_size(square), boxes) + _xyxy(offset, boxes)
            outputs.append(torch.minimum(pixels.clamp_min(0.0), _xyxy(_size(image), boxes)))
        if self.options.crops:
            model = self.model
            outputs += [(view * model.std + model.mean).clamp(0.0, 1.0) for view in output.views[1:]]
        return tuple(outputs)

    def _top_labels(self, probabilities: Tensor) -> Tensor:
        """(B, N) to (B, top)."""
        return probabilities.topk(min(self.options.top, self.model.classes), dim=1).indices

    def _prepare(self, image: Tensor) -> tuple[Tensor, Tensor, Point]:
        """The images as (B, 3, H, W) in [0, 1], the source, and its top left corner in pixels of the images.

        `squash` leaves the image as it is: boxes are fractions of both sides, so the crop itself stretches it.
        """
        if self.options.raw:
            image = image.permute(0, 3, 1, 2).float() / 255
        width, height = _size(image)
        if self.fit == "squash":
            return image, image, (0, 0)
        if self.fit == "crop":
            side = torch.sym_min(height, width)
            left, top = (width - side) // 2, (height - side) // 2
            # Indexed, not sliced: torch.export would add a guard on whether a slice is the whole image.
            rows, columns = (torch.arange(side, device=image.device) + start for start in (top, left))
            return image, image.index_select(2, rows).index_select(3, columns), (left, top)
        side = torch.sym_max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        borders = (left, side - width - left, top, side - height - top)
        return image, F.pad(image, borders, value=GREY[0] / 255), (-left, -top)  # type: ignore[arg-type]


def recipe_hash(run: Run) -> str:
    """SHA-256 of the run's recipe file."""
    return hashlib.sha256(run.recipe_file.read_bytes()).hexdigest()


def _size(image: Tensor) -> Point:
    """Width and height."""
    return image.shape[3], image.shape[2]


def _xyxy(point: Point, like: Tensor) -> Tensor:
    """The tensor (x, y, x, y), with the type and device of another one."""
    pair = [torch.scalar_tensor(value, dtype=like.dtype, device=like.device) for value in point]
    return torch.stack(pair * 2)
