"""Predictions for images in any form, by any network: a run in PyTorch or an exported ONNX file.

This module must not import torch: ONNX files are used where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from PIL import Image

from racnn_cli.data.color import FLAT_NOTE, is_flat
from racnn_cli.data.decode import decode
from racnn_cli.data.geometry import Geometry
from racnn_cli.data.square import Fit, to_square
from racnn_cli.errors import DataError, RunError

TOP = 5


@dataclass(frozen=True)
class Frame:
    """An image in memory with a name, such as a video frame; `pixels` is (H, W, 3) uint8 RGB."""

    name: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Unreadable:
    """Stands for an input that could not be read, such as a damaged video."""

    name: str
    error: str


ImageInput = str | Path | Image.Image | np.ndarray | Frame | Unreadable


@dataclass(frozen=True)
class Prediction:
    """What the network predicts for one image.

    Attributes:
        path: the file as given, or a frame's name; None for other images in memory.
        label: the predicted class; empty if the image could not be read.
        probability: of `label`.
        top: up to five (label, probability), best first.
        boxes: of scales 2, 3, …: (x0, y0, x1, y1) in pixels of the file as stored; empty after an early exit.
        scales: (label, probability) predicted by each scale that ran.
        error: why the image could not be read; empty if it could.
        notes: what was ignored in the image, such as the further frames of an animation.
    """

    path: str | None
    label: str = ""
    probability: float = 0.0
    top: list[tuple[str, float]] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    scales: list[tuple[str, float]] = field(default_factory=list)
    error: str = ""
    notes: list[str] = field(default_factory=list)


class NetworkOutput(NamedTuple):
    """Outputs for B square images, N classes and S scales."""

    probabilities: np.ndarray  # (B, N)
    scales: np.ndarray  # (B, S, N): the probabilities of each scale alone
    boxes: np.ndarray  # (B, S - 1, 4): x0, y0, x1, y1 as fractions of the square's side
    ran: np.ndarray  # (B,): number of scales that ran, 1 to S; the rows of the others are undefined


class Network(Protocol):
    """A trained network, whatever computes it.

    It may have `value_range`, the values of images with more than 8 bits that become 0 and 255.

    Attributes:
        classes: names in index order.
        fit: how an image becomes square.
        source: side in pixels of the squares that it was trained on.
        scales: number of scales S.
    """

    classes: list[str]
    fit: Fit
    source: int
    scales: int

    def predict(self, squares: np.ndarray) -> NetworkOutput:
        """Run square images (B, H, H, 3) uint8 through the network."""


class Model:
    """A trained network that predicts the classes of images in any form.

    Args:
        network: computes the outputs.
        source: side in pixels of the square that an image becomes, and that all boxes are cut from; None: as in
            training. A larger one shows the finer scales more detail of large photographs.

    Attributes:
        classes: names in index order.
        scales: number of scales.
        value_range: the values of images with more than 8 bits that become 0 and 255; None: decided by each image.
    """

    def __init__(self, network: Network, source: int | None = None) -> None:
        self.network, self.source = network, source or network.source
        self.value_range = getattr(network, "value_range", None)  # networks without deep images need not say it
        self.classes, self.scales = network.classes, network.scales

    def predict(self, images: ImageInput | Iterable[ImageInput], *, batch: int = 16) -> list[Prediction]:
        """Predict the classes of images.

        Args:
            images: one or many paths, PIL images or arrays: (H, W, 3) uint8, or any other that
                `racnn_cli.data.decode.decode` takes.
            batch: images to process at a time.

        Returns:
            one prediction per image; for a file that cannot be read, one with `error`.

        Raises:
            DataError: an input of another type, an array of another shape or type, or an image without pixels.
            RunError: the outputs are not finite.
        """
        return list(self.stream(images, batch=batch))

    def stream(self, images: ImageInput | Iterable[ImageInput], *, batch: int = 16) -> Iterator[Prediction]:
        """Yield what `predict` returns, batch by batch, for any number of images."""
        is_array = isinstance(images, np.ndarray) and images.ndim == 3
        if is_array or isinstance(images, str) or not isinstance(images, Iterable):
            images = [cast(ImageInput, images)]
        queue = iter(images)
        while chunk := list(islice(queue, batch)):
            notes: list[list[str]] = [[] for _ in chunk]
            sources = [self._read(image, entries) for image, entries in zip(chunk, notes, strict=True)]
            results = self._predict([source for source in sources if not isinstance(source, str)])
            for image, source, entries in zip(chunk, sources, notes, strict=True):
                path = image.name if isinstance(image, Frame | Unreadable) else None
                path = str(image) if isinstance(image, str | Path) else path
                fields = {"error": source} if isinstance(source, str) else next(results)
                yield Prediction(path, **fields, notes=entries)

    def _read(self, image: ImageInput, notes: list[str] | None = None) -> tuple[np.ndarray, Geometry] | str:
        """The square source (H, H, 3) uint8 and its place in the file, or why the file cannot be read.

        Adds what was ignored in the image to `notes`.
        """
        if isinstance(image, Unreadable):
            return image.error
        if isinstance(image, Frame):
            image = image.pixels
        if not isinstance(image, str | Path | np.ndarray | Image.Image):
            raise DataError(
                f"{type(image).__name__} is not an image", "give paths, PIL images or (H, W, 3) arrays of type uint8"
            )
        try:
            stored = decode(image, min_side=2 * self.source, value_range=self.value_range)
        except DataError as error:
            if isinstance(image, str | Path):
                return error.message
            raise
        if notes is not None:
            notes += [*stored.notes, *([FLAT_NOTE] if is_flat(stored.image) else [])]
        return to_square(stored, self.network.fit, self.source)

    def _predict(self, sources: list[tuple[np.ndarray, Geometry]]) -> Iterator[dict[str, Any]]:
        """Yield the fields of `Prediction`."""
        if not sources:
            return
        output = self.network.predict(np.stack([square for square, _ in sources]))
        if not (np.isfinite(output.probabilities).all() and np.isfinite(output.scales).all()):
            raise RunError("the network's outputs are not finite", "its weights are damaged: train again", failure=True)
        for number, (_, geometry) in enumerate(sources):
            top, ran = self._best(output.probabilities[number], TOP), int(output.ran[number])
            yield {
                "label": top[0][0],
                "probability": top[0][1],
                "top": top,
                "boxes": [geometry.to_file(tuple(box)) for box in output.boxes[number, : ran - 1].tolist()],
                "scales": [self._best(scale, 1)[0] for scale in output.scales[number, :ran]],
            }

    def _best(self, probabilities: np.ndarray, count: int) -> list[tuple[str, float]]:
        order = np.argsort(-probabilities, kind="stable")[:count]
        return [(self.classes[index], float(probabilities[index])) for index in order]
