"""`racnn predict`: answers for files, folders, patterns, lists and videos, written as they come."""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape

from racnn_cli.data.decode import SUFFIXES, read_image, show
from racnn_cli.data.listing import list_images
from racnn_cli.errors import RacnnError, describe_missing
from racnn_cli.export.prediction import Frame, Model, Prediction, Unreadable
from racnn_cli.results import draw
from racnn_cli.run import write_atomic

Rows = Literal["table", "jsonl", "csv"]
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
CAMERA = re.compile(r"camera:(\d+)")
SHOWN = 20  # errors in one message
HINT = f"name images ({', '.join(sorted(SUFFIXES))}), videos, folders, patterns, camera:0, or - for a list on stdin"


def gather(names: Iterable[str | Path], listed: TextIO | None = None) -> list[str | Path]:
    """What is to be answered for: files, videos and cameras as they are, folders and patterns spelt out.

    Args:
        names: files, folders (all images in them and below), patterns such as `*.jpg` or `**/*.png`,
            `camera:0`, and `-` for a list of such names, one a line.
        listed: where that list is read from; None: standard input.

    Raises:
        RacnnError: a name that leads nowhere, an address; all of them at once.
    """
    found: list[str | Path] = []
    errors: list[str] = []
    for name in names:
        text = str(name)
        if text == "-":
            lines = _lines(listed)
            if any("\0" in line for line in lines):
                errors.append("standard input is no list of file names")
                continue
            try:
                found += gather([line for line in lines if line and line != "-"])
            except RacnnError as error:
                errors.append(error.message)
        elif re.match(r"[a-z][a-z0-9+.-]*://", text, re.I):
            errors.append(f"{show(text)} is an address; nothing is ever downloaded")
        elif CAMERA.fullmatch(text):
            found.append(text)
        elif os.path.isdir(text):
            try:
                found += list_images(Path(text))
            except RacnnError as error:
                errors.append(error.message)
        elif os.path.lexists(text):
            found.append(Path(text))
        elif matches := sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []:
            files = [Path(match) for match in matches if os.path.isfile(match)]
            if not files:  # folders alone, as `birds/*` gives: what is in them is meant
                for match in matches:
                    with contextlib.suppress(RacnnError):  # one of them may be empty
                        files += list_images(Path(match))
            if not files:
                errors.append(f"{show(text)} matches no image")
            found += files
        else:
            errors.append(
                f"{show(text)} " + ("matches nothing" if glob.has_magic(text) else "does not exist")
            )
    if errors:
        more = [f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
        raise RacnnError("; ".join([*errors[:SHOWN], *more]), HINT)
    return found


def _lines(listed: TextIO | None) -> list[str]:
    """The names of a list; on standard input they are bytes, as file names are."""
    if listed is None:
        raw = getattr(sys.stdin, "buffer", None)
        lines = [os.fsdecode(line) for line in raw] if raw is not None else list(sys.stdin)
    else:
        lines = list(listed)
    return [line.rstrip("\r\n") for line in lines]


def images(sources: Iterable[str | Path], every: int = 1) -> Iterator[Path | Frame | Unreadable]:
    """ImageInput files as they are, videos and cameras frame by frame; a video that cannot be read is said to be one.

    Args:
        sources: what `gather` gives.
        every: of a video, only every so many-th frame.
    """
    for source in sources:
        camera = CAMERA.fullmatch(str(source))
        if camera or Path(source).suffix.lower() in VIDEOS:
            yield from _frames(source, int(camera[1]) if camera else str(source), every)
        else:
            yield Path(source)


def _frames(source: str | Path, opened: int | str, every: int) -> Iterator[Frame | Unreadable]:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what matters is said in the row
    import cv2

    if isinstance(opened, str) and not os.path.isfile(opened):
        yield Unreadable(str(source), describe_missing(Path(source)))
        return
    video = cv2.VideoCapture(opened)
    try:
        if not video.isOpened():
            yield Unreadable(str(source), f"{show(source)} cannot be opened as a video")
            return
        number = 0
        while video.grab():
            if number % every == 0:
                read, frame = video.retrieve()
                if read:
                    yield Frame(f"{source}#{number}", np.ascontiguousarray(frame[:, :, ::-1]))
            number += 1
        if number == 0:
            yield Unreadable(str(source), f"{show(source)} has no frame that can be read")
    finally:
        video.release()


def predict_command(
    model: Model,
    sources: Iterable[str | Path],
    *,
    rows: Rows = "table",
    save: Path | None = None,
    batch: int = 16,
    every: int = 1,
    out: TextIO | None = None,
) -> int:
    """What `racnn predict` does: one row an image, as soon as it is there, and drawings in `save`.

    Returns:
        the exit code: 1 if an image could not be read, else 0.

    Raises:
        RacnnError: as `Model.stream` and `Drawings`.
    """
    out = out or sys.stdout
    write = WRITERS[rows](model, out)
    drawings = Drawings(save) if save else None
    waiting: deque[Path | Frame | Unreadable] = deque()  # what has been read, until its answer comes

    def remember() -> Iterator[Path | Frame | Unreadable]:
        for image in images(sources, every):
            waiting.append(image)
            yield image

    count = unread = 0
    for prediction in model.stream(remember(), batch=batch):
        image = waiting.popleft()
        count += 1
        unread += bool(prediction.error)
        write(prediction)
        if drawings and not isinstance(image, Unreadable) and not prediction.error:
            drawings.add(prediction, image)
    told = Console(stderr=True, highlight=False)
    if drawings:
        told.print(escape(f"{drawings.count} drawings in {save}"), soft_wrap=True)
    if unread:
        told.print(f"{unread} of {count} images could not be read", soft_wrap=True)
    return 1 if unread else 0


Writer = Callable[[Prediction], None]


def json_lines(model: Model, out: TextIO) -> Writer:
    """A JSON object a line, with the fields of `Prediction`; on a terminal, names do nothing to it."""

    def write(prediction: Prediction) -> None:
        line = json.dumps(asdict(prediction), ensure_ascii=False)
        out.write((line if _goes_out(line, out) else json.dumps(asdict(prediction))) + "\n")
        out.flush()

    return write


def _goes_out(text: str, out: TextIO) -> bool:
    """Whether a text can be written as it is: it is none (a file's name need not be), or would move a cursor."""
    try:
        text.encode(out.encoding or "utf-8", out.errors or "strict")
    except UnicodeEncodeError:
        return False
    return text.isprintable() or not out.isatty()


def comma_separated(model: Model, out: TextIO) -> Writer:
    """A header, then a line an image: the answer, the box of each finer scale, and what was wrong.

    A name stays what it is in a file, if it is text at all, and on a terminal does nothing to it.
    """
    table = csv.writer(out, lineterminator="\n")
    header_written = False

    def write(prediction: Prediction) -> None:
        nonlocal header_written
        if not header_written:
            header_written = True
            boxes = [f"{edge}_{n}" for n in range(2, model.scales + 1) for edge in ("x0", "y0", "x1", "y1")]
            table.writerow(["path", "label", "probability", *boxes, "error"])
        edges = [f"{value:.1f}" for box in prediction.boxes for value in box]
        edges += [""] * (4 * (model.scales - 1) - len(edges))
        probability = "" if prediction.error else f"{prediction.probability:.6f}"
        name, error = prediction.path or "", prediction.error
        name, error = (text if _goes_out(text, out) else show(text) for text in (name, error))
        table.writerow([name, prediction.label, probability, *edges, error])
        out.flush()

    return write


def aligned(model: Model, out: TextIO) -> Writer:
    """Lines for a terminal: probability, class, file, and the finest box in pixels of the file."""
    wide = max(map(len, model.classes))
    console = Console(file=out, highlight=False, width=None if out.isatty() else 200)
    console.print(f"[bold]{'':>5}  {'class':{wide}}  image[/]", soft_wrap=True)

    def write(prediction: Prediction) -> None:
        name = escape(show(prediction.path or "(in memory)"))
        if prediction.error:
            console.print(
                f"{'':>5}  {'':{wide}}  {name}  [red]{escape(show(prediction.error))}[/]", soft_wrap=True
            )
            return
        label = escape(f"{show(prediction.label):{wide}}")
        box = " ".join(f"{value:.0f}" for value in prediction.boxes[-1]) if prediction.boxes else ""
        looked = f"  [dim]looked at {box}[/]" if box else ""
        console.print(f"{prediction.probability:5.3f}  {label}  {name}{looked}", soft_wrap=True)

    return write


WRITERS: dict[Rows, Callable[[Model, TextIO], Writer]] = {
    "table": aligned,
    "jsonl": json_lines,
    "csv": comma_separated,
}


class Drawings:
    """Images with their boxes and what these show, in a folder: NAME.jpg, numbered where that is there already."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        # Small letters: some file systems know no others. The folder may be that of the images themselves.
        self._taken = {path.stem.lower() for path in folder.glob("*")}

    def add(self, prediction: Prediction, image: Path | Frame) -> Path:
        """Draw one.

        Raises:
            RacnnError: the file has gone since, or the folder cannot be written.
        """
        if isinstance(image, Frame):
            stem = Path(image.name).name.replace("#", "-").replace(":", "-")
            sheet = drawn(prediction, image.pixels, prediction.boxes)
        else:
            stem = image.stem
            read = read_image(image)
            sheet = drawn(prediction, read.pixels, draw.upright_boxes(read, prediction.boxes))
        name, number = stem, 1
        while name.lower() in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name.lower())
        target = self.folder / f"{name}.jpg"
        write_atomic(target, partial(sheet.save, quality=92, subsampling=0))
        self.count += 1
        return target


def drawn(
    prediction: Prediction, pixels: np.ndarray, boxes: list[tuple[float, float, float, float]]
) -> Image.Image:
    """The upright image (H, W, 3) uint8 with the boxes in its pixels, what they show, and a caption."""
    answer = (prediction.label, prediction.probability)
    name = Path(prediction.path or "").name
    return draw.sheet(pixels, boxes, answer, prediction.scales, name)
