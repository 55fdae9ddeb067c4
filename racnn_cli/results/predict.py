"""`racnn predict`: from pictures to class, probability and boxes; as values, table, JSON lines, drawings."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from racnn_cli.core import store
from racnn_cli.core.device import pick
from racnn_cli.core.model import RACNN
from racnn_cli.data.decode import SUFFIXES
from racnn_cli.data.images import Geometry, load_source, read_image
from racnn_cli.errors import RacnnError
from racnn_cli.recipe import Data
from racnn_cli.results import draw
from racnn_cli.run import Run, write_atomic

Picture = str | Path | Image.Image | np.ndarray
TOP = 5


@dataclass(frozen=True)
class Prediction:
    """What the network says about one picture.

    Attributes:
        path: the file as it was given; None for a picture in memory.
        label, probability: the answer; an empty label where the picture could not be read.
        top: up to five (label, probability), best first.
        boxes: of scales 2, 3, …: (x0, y0, x1, y1) in pixels of the file as stored.
        scales: (label, probability) that each scale answers on its own.
        error: why there is no answer; empty where there is one.
    """

    path: str | None
    label: str = ""
    probability: float = 0.0
    top: list[tuple[str, float]] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    scales: list[tuple[str, float]] = field(default_factory=list)
    error: str = ""


class Model:
    """A trained network, ready to answer.

    Args:
        network: in eval mode.
        classes: names in index order.
        data: the recipe's data section, for how a file becomes a square.
        device: where to compute.
    """

    def __init__(self, network: RACNN, classes: list[str], data: Data, device: torch.device) -> None:
        self.network, self.classes, self.data, self.device = network.to(device), classes, data, device

    def predict(self, images: Picture | Iterable[Picture], *, batch: int = 16) -> list[Prediction]:
        """Answer for pictures: paths, PIL images, (H, W, 3) uint8 arrays, or one of them.

        A file that cannot be read becomes a `Prediction` with `error`.

        Raises:
            RacnnError: an array of another shape or type, or outputs that are not finite.
        """
        return list(self.stream(images, batch=batch))

    def stream(self, images: Picture | Iterable[Picture], *, batch: int = 16) -> Iterator[Prediction]:
        """As `predict`, one answer after the other, for any number of pictures."""
        single = isinstance(images, str | Path | Image.Image) or (
            isinstance(images, np.ndarray) and images.ndim == 3
        )
        many: Any = [images] if single else images
        queue: Iterator[Picture] = iter(many)
        while some := list(islice(queue, batch)):
            read = [self._read(image) for image in some]
            good = [entry for entry in read if not isinstance(entry, str)]
            answers = self._answer(good)
            for image, entry in zip(some, read, strict=True):
                path = str(image) if isinstance(image, str | Path) else None
                yield (
                    Prediction(path, error=entry)
                    if isinstance(entry, str)
                    else Prediction(path, **next(answers))
                )

    def _read(self, image: Picture) -> tuple[np.ndarray, Geometry] | str:
        """The square source (S, S, 3) uint8 and where it lies in the file, or what is wrong with the file."""
        side = self.network.source
        if isinstance(image, str | Path):
            try:
                return load_source(image, self.data, side)
            except RacnnError as fault:
                return fault.message
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise RacnnError(
                    f"an array of shape {image.shape} and type {image.dtype} is not a picture",
                    "give (H, W, 3) arrays of type uint8, RGB",
                )
            image = Image.fromarray(image)
        # Through a lossless file, so that there is one way from a picture to the square, whatever its mode.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "picture.tif"
            image.save(file, exif=image.getexif())
            return load_source(file, self.data, side)

    def _answer(self, sources: list[tuple[np.ndarray, Geometry]]) -> Iterator[dict[str, Any]]:
        if not sources:
            return
        pixels = torch.from_numpy(np.stack([source for source, _ in sources]))  # (B, S, S, 3)
        with torch.inference_mode():
            output = self.network(pixels.permute(0, 3, 1, 2).to(self.device))
        answers = torch.stack(
            [output.probabilities.float(), *(o.float().softmax(dim=1) for o in output.logits)]
        )
        if not answers.isfinite().all():
            raise RacnnError(
                "the network's outputs are not finite", "its weights are damaged: train again", failure=True
            )
        best, index = (value.tolist() for value in answers.cpu().topk(min(TOP, len(self.classes)), dim=2))
        for number, (_, geometry) in enumerate(sources):
            named = [
                [(self.classes[i], p) for i, p in zip(index[row][number], best[row][number], strict=True)]
                for row in range(len(answers))
            ]
            yield {
                "label": named[0][0][0],
                "probability": named[0][0][1],
                "top": named[0],
                "boxes": [geometry.to_file(tuple(box[number].tolist())) for box in output.boxes],
                "scales": [answer[0] for answer in named[1:]],
            }


def load(run_or_folder: Run | Path | str, device: str = "auto") -> Model:
    """The trained network of a run, or of a folder that `racnn export --safetensors` wrote.

    Raises:
        RacnnError: it is no such folder, a file in it is missing or damaged, no such device.
    """
    folder = run_or_folder.folder if isinstance(run_or_folder, Run) else Path(run_or_folder)
    where = pick(device)
    network, run = store.load(folder)
    return Model(network, run.classes(), run.recipe().data, where)


def gather(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are, folders as all the pictures in them and below, in the order of their names.

    Raises:
        RacnnError: a path that does not exist or a folder without pictures; all of them at once.
    """
    found: list[Path] = []
    faults = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in SUFFIXES and p.is_file())
            faults += [] if inside else [f"{path} holds no pictures"]
            found += inside
        elif path.exists():
            found.append(path)
        else:
            faults.append(f"{path} does not exist")
    if faults:
        raise RacnnError(
            "; ".join(faults), f"name pictures ({', '.join(sorted(SUFFIXES))}) or folders of them"
        )
    return found


def predict_command(folder: Path, images: Iterable[str | Path], *, as_json: bool, save: Path | None) -> int:
    """What `racnn predict` does: answers as a table or as JSON lines on standard output, drawings in `save`.

    Returns:
        the exit code: 1 if a picture could not be read, else 0.

    Raises:
        RacnnError: as `load`, `gather` and `draw_all`.
    """
    files = gather(images)
    model = load(folder)
    answers = []
    for prediction in model.stream(files):
        answers.append(prediction)
        if as_json:
            write_line(prediction, sys.stdout)
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    if not as_json:
        console.print(table(answers))
    if save is not None:
        drawings = draw_all(answers, save)
        console.print(escape(f"{len(drawings)} drawings in {save}"), soft_wrap=True)
    unread = sum(1 for prediction in answers if prediction.error)
    if unread:
        console.print(f"{unread} of {len(answers)} pictures could not be read", soft_wrap=True)
    return 1 if unread else 0


def write_line(prediction: Prediction, file: TextIO) -> None:
    """One line with a JSON object that has the fields of `Prediction`."""
    file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
    file.flush()


def table(predictions: Iterable[Prediction]) -> Table:
    """The answers for a terminal; boxes in pixels of the file."""
    result = Table(caption="boxes in pixels of the file, from scale 2 on", caption_justify="left")
    result.add_column("picture", overflow="fold")
    result.add_column("class", overflow="fold")
    result.add_column("probability", justify="right")
    result.add_column("boxes: x0 y0 x1 y1", no_wrap=True)
    predictions = list(predictions)
    paths = [prediction.path for prediction in predictions if prediction.path]
    alike = len(paths) > 1 and len({os.path.isabs(path) for path in paths}) == 1
    shared = os.path.commonpath([os.path.dirname(path) for path in paths]) if alike else ""
    if shared:
        result.title, result.title_justify = f"in {escape(shared)}", "left"
    for prediction in predictions:
        path = os.path.relpath(prediction.path, shared) if shared and prediction.path else prediction.path
        name = escape(path or "(in memory)")
        if prediction.error:
            result.add_row(name, f"[red]{escape(prediction.error)}[/red]", "", "")
            continue
        boxes = "\n".join(" ".join(f"{value:.0f}" for value in box) for box in prediction.boxes)
        result.add_row(name, escape(prediction.label), f"{prediction.probability:.3f}", boxes)
    return result


def draw_all(predictions: Iterable[Prediction], folder: Path) -> list[Path]:
    """Draw each prediction that has a file and an answer: `folder`/NAME.jpg, numbered where names repeat.

    Raises:
        RacnnError: a picture has gone since, or the folder cannot be written.
    """
    written: list[Path] = []
    taken: set[str] = set()
    for prediction in predictions:
        if prediction.path is None or prediction.error:
            continue
        path = Path(prediction.path)
        name, number = path.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.lower())
        target = folder / f"{name}.jpg"
        write_atomic(target, partial(drawn(prediction).save, quality=92, subsampling=0))
        written.append(target)
    return written


def drawn(prediction: Prediction) -> Image.Image:
    """The upright picture with the boxes, what they show, and a caption."""
    assert prediction.path is not None
    picture = read_image(prediction.path)
    boxes = draw.upright_boxes(picture, prediction.boxes)
    answer = (prediction.label, prediction.probability)
    return draw.sheet(picture.pixels, boxes, answer, prediction.scales, Path(prediction.path).name)
