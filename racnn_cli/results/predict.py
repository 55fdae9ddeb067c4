"""`racnn predict`: predictions for files, folders, patterns, lists and videos, written as they are computed."""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
from rich.console import Console
from rich.markup import escape

from racnn_cli.data.checks import summarize
from racnn_cli.data.color import ValueRange
from racnn_cli.data.decode import SUFFIXES, read_image, show
from racnn_cli.data.listing import list_images
from racnn_cli.errors import DataError, describe_missing
from racnn_cli.export.prediction import Frame, Model, Prediction, Unreadable
from racnn_cli.results import draw
from racnn_cli.run import write_atomic

Format = Literal["table", "jsonl", "csv"]
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
CAMERA = re.compile(r"camera:(\d+)")
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
MAX_ERRORS = 20  # in one message
HINT = (
    f"give images ({', '.join(sorted(SUFFIXES))}), videos, folders, patterns, camera:0, or - for a list on "
    "standard input"
)


def gather(names: Iterable[str | Path], stdin: TextIO | None = None) -> list[str | Path]:
    """Expand folders, patterns and lists into image files, videos and cameras.

    Args:
        names: files, folders (searched recursively), patterns such as `*.jpg` or `**/*.png`, `camera:0`,
            and `-` for a list of such names, one per line.
        stdin: where the list is read from; None: standard input.

    Raises:
        DataError: a name that does not exist, matches no images or is a URL; one error names all of them.
    """
    inputs: list[str | Path] = []
    errors: list[str] = []
    for name in names:
        try:
            inputs += _expand(str(name), stdin)
        except DataError as error:
            errors.append(error.message)
    if errors:
        more = [f"and {len(errors) - MAX_ERRORS} more"] if len(errors) > MAX_ERRORS else []
        raise DataError("; ".join([*errors[:MAX_ERRORS], *more]), HINT)
    return inputs


def _expand(name: str, stdin: TextIO | None) -> Sequence[str | Path]:
    if name == "-":
        raw = getattr(sys.stdin, "buffer", None) if stdin is None else None
        lines = [os.fsdecode(line) for line in raw] if raw is not None else list(stdin or sys.stdin)
        if any("\0" in line for line in lines):
            raise DataError("standard input is not a list of file names")
        names = [line.rstrip("\r\n") for line in lines]
        return gather(name for name in names if name not in ("", "-"))
    if URL.match(name):
        raise DataError(f"{show(name)} is a URL; racnn downloads no images")
    if CAMERA.fullmatch(name):
        return [name]
    if os.path.isdir(name):
        return list_images(Path(name))
    if os.path.lexists(name):
        return [Path(name)]
    if not glob.has_magic(name):
        raise DataError(f"{show(name)} does not exist")
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise DataError(f"{show(name)} matches nothing")
    files = [Path(match) for match in matches if os.path.isfile(match)]
    if not files:  # a pattern such as `birds/*` may match folders only: use their images
        for match in matches:
            with contextlib.suppress(DataError):  # some of the folders may be empty
                files += list_images(Path(match))
    if not files:
        raise DataError(f"{show(name)} matches no images")
    return files


def iterate(sources: Iterable[str | Path], every: int = 1) -> Iterator[Path | Frame | Unreadable]:
    """Yield image files as paths, and videos and cameras frame by frame.

    Args:
        sources: as from `gather`.
        every: use every n-th frame of a video.

    Yields:
        A path, a frame, or the name of a video that cannot be read.
    """
    for source in sources:
        camera = CAMERA.fullmatch(str(source))
        if camera or Path(source).suffix.lower() in VIDEOS:
            yield from _frames(source, int(camera[1]) if camera else str(source), every)
        else:
            yield Path(source)


def _frames(source: str | Path, device: int | str, every: int) -> Iterator[Frame | Unreadable]:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the output names the error
    import cv2

    if isinstance(device, str) and not os.path.isfile(device):
        yield Unreadable(str(source), describe_missing(Path(source)))
        return
    video = cv2.VideoCapture(device)
    try:
        if not video.isOpened():
            yield Unreadable(str(source), f"{show(source)} cannot be opened as a video")
            return
        number = 0
        while video.grab():
            if number % every == 0:
                ok, frame = video.retrieve()
                if ok:
                    yield Frame(f"{source}#{number}", np.ascontiguousarray(frame[:, :, ::-1]))
            number += 1
        if number == 0:
            yield Unreadable(str(source), f"{show(source)} has no readable frame")
    finally:
        video.release()


def predict_command(
    model: Model,
    sources: Iterable[str | Path],
    *,
    rows: Format = "table",
    save: Path | None = None,
    batch: int = 16,
    every: int = 1,
    out: TextIO | None = None,
) -> int:
    """Write one row per image as soon as it is predicted.

    Args:
        model: the trained network.
        sources: as from `gather`.
        rows: format of the rows.
        save: folder for drawings of the images with their boxes.
        batch: images per forward pass.
        every: use every n-th frame of a video.
        out: where the rows go; None: standard output.

    Returns:
        The exit code: 1 if an image could not be read, else 0.

    Raises:
        RacnnError: as `Model.stream` and `Drawings`.
    """
    out = out or sys.stdout
    write = WRITERS[rows](model, out)
    drawings = Drawings(save, model.value_range) if save else None
    pending: deque[Path | Frame | Unreadable] = deque()  # images that `stream` has read and not yet predicted

    def images() -> Iterator[Path | Frame | Unreadable]:
        for image in iterate(sources, every):
            pending.append(image)
            yield image

    count = unread = frames = 0
    notes: list[tuple[str, str]] = []
    for prediction in model.stream(images(), batch=batch):
        image = pending.popleft()
        count += 1
        unread += bool(prediction.error)
        frames += isinstance(image, Frame)
        notes += [(prediction.path or "(in memory)", note) for note in prediction.notes]
        write(prediction)
        if drawings and not isinstance(image, Unreadable) and not prediction.error:
            drawings.add(prediction, image)
    console = Console(stderr=True, highlight=False, emoji=False)
    if every > 1 and not frames:
        console.print("note: --every has no effect: no image is a frame of a video", soft_wrap=True)
    if drawings:
        console.print(escape(f"{drawings.count} drawings in {save}"), soft_wrap=True)
    for note in summarize(notes):
        console.print(escape(f"note: {note}"), soft_wrap=True)
    if unread:
        console.print(f"{unread} of {count} images could not be read", soft_wrap=True)
    return 1 if unread else 0


Writer = Callable[[Prediction], None]


def jsonl_writer(model: Model, out: TextIO) -> Writer:
    """Write a JSON object per line, with the fields of `Prediction`."""

    def write(prediction: Prediction) -> None:
        line = json.dumps(asdict(prediction), ensure_ascii=False)
        print(line if _is_safe(line, out) else json.dumps(asdict(prediction)), file=out, flush=True)

    return write


def _is_safe(text: str, out: TextIO) -> bool:
    """Whether the text can be encoded, and has no control characters if `out` is a terminal."""
    try:
        text.encode(out.encoding or "utf-8", out.errors or "strict")
    except UnicodeEncodeError:
        return False
    return text.isprintable() or not out.isatty()


def csv_writer(model: Model, out: TextIO) -> Writer:
    """Write a header, then a line per image: the answer, the box of each finer scale, and the error."""
    table = csv.writer(out, lineterminator="\n")
    edges = [f"{edge}_{n}" for n in range(2, model.scales + 1) for edge in ("x0", "y0", "x1", "y1")]
    rows = [["path", "label", "probability", *edges, "error"]]  # written together with the first prediction

    def write(prediction: Prediction) -> None:
        values = [f"{value:.1f}" for box in prediction.boxes for value in box]
        values += [""] * (len(edges) - len(values))
        probability = "" if prediction.error else f"{prediction.probability:.6f}"
        name, error = (
            text if _is_safe(text, out) else show(text) for text in (prediction.path or "", prediction.error)
        )
        rows.append([name, prediction.label, probability, *values, error])
        table.writerows(rows)
        rows.clear()
        out.flush()

    return write


def table_writer(model: Model, out: TextIO) -> Writer:
    """Write aligned lines for a terminal: probability, class, file, and the finest box in pixels of the file."""
    width = max(map(len, model.classes))
    console = Console(file=out, highlight=False, emoji=False, width=None if out.isatty() else 200)
    console.print(f"[bold]{'':>5}  {'class':{width}}  image[/]", soft_wrap=True)

    def write(prediction: Prediction) -> None:
        name = escape(show(prediction.path or "(in memory)"))
        label = escape(f"{show(prediction.label):{width}}")
        probability = "" if prediction.error else f"{prediction.probability:.3f}"
        note = f"  [red]{escape(show(prediction.error))}[/]" if prediction.error else ""
        if prediction.boxes:
            note = f"  [dim]attended region {' '.join(f'{value:.0f}' for value in prediction.boxes[-1])}[/]"
        console.print(f"{probability:5}  {label}  {name}{note}", soft_wrap=True)

    return write


WRITERS: dict[Format, Callable[[Model, TextIO], Writer]] = {
    "table": table_writer,
    "jsonl": jsonl_writer,
    "csv": csv_writer,
}


class Drawings:
    """Drawings in a folder, as NAME.jpg; no existing file is replaced: a number is added to the name.

    Args:
        folder: where they go.
        value_range: as in `read_image`.
    """

    def __init__(self, folder: Path, value_range: ValueRange | None = None) -> None:
        self.folder, self.value_range, self.count = folder, value_range, 0
        # Lowercase, for file systems that ignore case. The folder may be that of the images themselves.
        self._names = {path.stem.lower() for path in folder.glob("*")}

    def add(self, prediction: Prediction, image: Path | Frame) -> Path:
        """Draw one image with its boxes, their views and a caption.

        Returns:
            The path of the drawing.

        Raises:
            DataError: the image cannot be read any more.
            RunError: the drawing cannot be written.
        """
        if isinstance(image, Frame):
            stem = Path(image.name).name.replace("#", "-").replace(":", "-")
            pixels, boxes = image.pixels, prediction.boxes
        else:
            stem, file = image.stem, read_image(image, value_range=self.value_range)
            pixels, boxes = file.pixels, draw.upright_boxes(file, prediction.boxes)
        sheet = draw.sheet(pixels, boxes, prediction)
        name, number = stem, 1
        while name.lower() in self._names:
            number += 1
            name = f"{stem}-{number}"
        self._names.add(name.lower())
        path = self.folder / f"{name}.jpg"
        write_atomic(path, partial(sheet.save, quality=92, subsampling=0))
        self.count += 1
        return path
