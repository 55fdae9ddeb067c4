"""From images to class, probability and boxes, whatever computes them: a run in PyTorch or an exported file.

Nothing here imports torch, so that an ONNX file answers without it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from racnn_cli.data.geometry import Geometry
from racnn_cli.data.square import Fit, load_source
from racnn_cli.errors import RacnnError
from racnn_cli.run import Run

TOP = 5


@dataclass(frozen=True)
class Frame:
    """An image in memory that has a name, such as one of a video; `pixels` (H, W, 3) uint8 RGB."""

    name: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Unread:
    """The name of something that is no image, such as a broken video, and why."""

    name: str
    why: str


ImageInput = str | Path | Image.Image | np.ndarray | Frame | Unread
_SAVED = {"HSV": "RGB", "RGBa": "RGBA", "La": "LA", "RGBX": "RGB"}  # modes that TIFF has no word for


@dataclass(frozen=True)
class Prediction:
    """What the network says about one image.

    Attributes:
        path: the file as it was given, or a frame's name; None for another image in memory.
        label, probability: the answer; an empty label where the image could not be read.
        top: up to five (label, probability), best first.
        boxes: of scales 2, 3, …: (x0, y0, x1, y1) in pixels of the file as stored; none where a file with early exit
            was sure after scale 1.
        scales: (label, probability) that each scale that ran answers on its own.
        error: why there is no answer; empty where there is one.
    """

    path: str | None
    label: str = ""
    probability: float = 0.0
    top: list[tuple[str, float]] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    scales: list[tuple[str, float]] = field(default_factory=list)
    error: str = ""


class Answers(NamedTuple):
    """What a network gives for B square images, N classes, S scales."""

    probabilities: np.ndarray  # (B, N)
    scales: np.ndarray  # (B, S, N): the probabilities of each scale alone
    boxes: np.ndarray  # (B, S - 1, 4): x0, y0, x1, y1 as shares of the square's side
    ran: np.ndarray  # (B,): how many scales looked, 1 to S; the others' rows mean nothing


class Network(Protocol):
    """Whatever answers.

    Attributes:
        classes: names in index order.
        fit: how an image becomes square.
        source: side in pixels of the squares that it was trained on.
        scales: their number S.
    """

    classes: list[str]
    fit: Fit
    source: int
    scales: int

    def answer(self, squares: np.ndarray) -> Answers:
        """Square images (B, H, H, 3) uint8 to answers."""


class Model:
    """A trained network, ready to answer.

    Args:
        network: what computes.
        source: side in pixels of the square that an image becomes, and that all boxes are cut from; None: as
            it was trained. A larger one shows the finer scales more of a large photograph.
    """

    def __init__(self, network: Network, source: int | None = None) -> None:
        self.network, self.source = network, source or network.source

    @property
    def classes(self) -> list[str]:
        """Names in index order."""
        return self.network.classes

    @property
    def scales(self) -> int:
        """Number of scales."""
        return self.network.scales

    def predict(self, images: ImageInput | Iterable[ImageInput], *, batch: int = 16) -> list[Prediction]:
        """Answer for images: paths, PIL images, (H, W, 3) uint8 arrays, or one of them.

        A file that cannot be read becomes a `Prediction` with `error`.

        Raises:
            RacnnError: something else, an array of another shape or type, an image without pixels, or outputs that
                are not finite.
        """
        return list(self.stream(images, batch=batch))

    def stream(self, images: ImageInput | Iterable[ImageInput], *, batch: int = 16) -> Iterator[Prediction]:
        """As `predict`, one answer after the other, for any number of images."""
        single = isinstance(images, str | Path | Image.Image | Frame) or (
            isinstance(images, np.ndarray) and images.ndim == 3
        )
        if not single and not isinstance(images, Iterable):
            raise _no_image(images)
        many: Any = [images] if single else images
        queue: Iterator[ImageInput] = iter(many)
        while some := list(islice(queue, batch)):
            read = [self._read(image) for image in some]
            answers = self._answer([entry for entry in read if not isinstance(entry, str)])
            for image, entry in zip(some, read, strict=True):
                path = image.name if isinstance(image, Frame | Unread) else None
                path = str(image) if isinstance(image, str | Path) else path
                if isinstance(entry, str):
                    yield Prediction(path, error=entry)
                else:
                    yield Prediction(path, **next(answers))

    def _read(self, image: ImageInput) -> tuple[np.ndarray, Geometry] | str:
        """The square source (S, S, 3) uint8 and where it lies in the file, or what is wrong with the file."""
        fit, side = self.network.fit, self.source
        if isinstance(image, str | Path):
            try:
                return load_source(image, fit, side)
            except RacnnError as error:
                return error.message
        if isinstance(image, Unread):
            return image.why
        if isinstance(image, Frame):
            image = image.pixels
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise RacnnError(
                    f"an array of shape {image.shape} and type {image.dtype} is not an image",
                    "give (H, W, 3) arrays of type uint8, RGB",
                )
            image = Image.fromarray(image) if image.size else Image.new("RGB", image.shape[1::-1])
        if not isinstance(image, Image.Image):
            raise _no_image(image)
        if 0 in image.size:
            raise RacnnError(
                f"an image of {image.width}×{image.height} pixels shows nothing", "leave it away"
            )
        if image.mode in _SAVED:
            image = image.convert(_SAVED[image.mode])
        # Through a lossless file, so that there is one way from an image to the square, whatever its mode.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image.tif"
            image.save(file, exif=image.getexif())
            return load_source(file, fit, side)

    def _answer(self, sources: list[tuple[np.ndarray, Geometry]]) -> Iterator[dict[str, Any]]:
        if not sources:
            return
        found = self.network.answer(np.stack([square for square, _ in sources]))
        if not (np.isfinite(found.probabilities).all() and np.isfinite(found.scales).all()):
            raise RacnnError(
                "the network's outputs are not finite", "its weights are damaged: train again", failure=True
            )
        for number, (_, geometry) in enumerate(sources):
            top, ran = self._best(found.probabilities[number], TOP), int(found.ran[number])
            yield {
                "label": top[0][0],
                "probability": top[0][1],
                "top": top,
                "boxes": [geometry.to_file(tuple(box)) for box in found.boxes[number, : ran - 1].tolist()],
                "scales": [self._best(alone, 1)[0] for alone in found.scales[number, :ran]],
            }

    def _best(self, probabilities: np.ndarray, count: int) -> list[tuple[str, float]]:
        order = np.argsort(-probabilities, kind="stable")[:count]
        return [(self.classes[index], float(probabilities[index])) for index in order]


def _no_image(given: object) -> RacnnError:
    return RacnnError(
        f"{type(given).__name__} is not an image", "give paths, PIL images or (H, W, 3) arrays of type uint8"
    )


def load(trained: Run | Path | str, device: str = "auto", *, source: int | None = None) -> Model:
    """A trained network: of a run, of a folder that `racnn export --safetensors` wrote, or an ONNX file.

    Args:
        trained: a folder, or a file that `racnn export --onnx` wrote, which needs no torch.
        device: where a folder's network computes; an ONNX file computes on the CPU.
        source: as in `Model`.

    Raises:
        RacnnError: it is nothing of that kind, a file in it is missing or damaged, no such device.
    """
    path = trained.folder if isinstance(trained, Run) else Path(trained)
    if path.suffix == ".onnx" or path.is_file():
        from racnn_cli.export.onnx_network import OnnxNetwork

        return Model(OnnxNetwork(path), source)
    from racnn_cli.export.torch_network import TorchNetwork

    return Model(TorchNetwork(path, device), source)
