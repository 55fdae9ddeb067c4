"""Check a data set before it is used: every file is decoded, and the classes must fit together."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from racnn_cli.data.color import Levels
from racnn_cli.data.decode import check, show
from racnn_cli.data.listing import Row
from racnn_cli.errors import DataError
from racnn_cli.events import count_by_class
from racnn_cli.run import printable

MAX_REPORTED = 1000
"""One message lists at most this many errors; the rest are only counted."""
BOX_TOLERANCE = 0.5
"""Pixels by which a box may extend beyond its image: it was rounded, not misplaced."""
DELIBERATE = 0.1
"""Two classes whose names differ in case are meant if the smaller has this share of the larger one's images."""

# Letters of the Cyrillic and Greek alphabets that look like Latin ones.
_LOOK_ALIKES = str.maketrans(
    "аеорсухіјѕһАВЕКМНОРСТХІЈЅοαρνΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "aeopcyxijshABEKMHOPCTXIJSoapvABEZHIKMNOPTYX"
)


@dataclass(frozen=True)
class CheckedFile:
    """What is known of a file after it was read.

    Attributes:
        error: why it cannot be used; empty if it can.
        digest, levels, notes, stored_size: as in `FileCheck`.
    """

    error: str = ""
    digest: bytes = b""
    levels: Levels | None = None
    notes: tuple[str, ...] = ()
    stored_size: tuple[int, int] = (0, 0)


def check_files(rows: list[Row]) -> dict[Row, CheckedFile]:
    """Decode every file."""
    checked: dict[Row, CheckedFile] = {}
    # Threads suffice, because Pillow releases the interpreter lock. Chunks bound the memory of waiting tasks.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), 4096):
            chunk = rows[start : start + 4096]
            checked |= zip(chunk, pool.map(_check_file, chunk), strict=True)
    return checked


def class_name_problems(images: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Find class names that cannot be printed, or that look like names of the same class.

    Args:
        images: class name to its number of images.

    Returns:
        Problems, and notes on names that differ in case alone and are kept apart, since both have many images.
    """
    problems, notes = [], []
    similar = defaultdict(list)
    for name in sorted(images):
        try:
            printable(name)
        except ValueError as error:
            problems.append(str(error))
        similar[_skeleton(name)].append(name)
    for group in similar.values():
        if len(group) < 2:
            continue
        text = " and ".join(map(repr, group)) + _code_points(group)
        counts = [images[name] for name in group]
        deliberate = min(counts) > 1 and min(counts) >= DELIBERATE * max(counts)
        if deliberate and len({name.casefold() for name in group}) == 1:
            notes.append(f"the classes {text} differ in case only and are kept apart")
        else:
            problems.append(f"{text} look like names of the same class: merge or rename them")
    return problems, notes


def _skeleton(name: str) -> str:
    """What names have in common that look alike."""
    name = unicodedata.normalize("NFKC", name).translate(_LOOK_ALIKES)
    visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return re.sub(r"[\s_]+", " ", visible.casefold()).strip()


def _code_points(names: Sequence[str]) -> str:
    """The code points in which names differ, if the names are not ASCII alone and may look the same."""
    if all(name.isascii() for name in names):
        return ""
    sets = [set(name) for name in names]
    common = set.intersection(*sets)
    differing = [" ".join(f"U+{ord(character):04X}" for character in sorted(own - common)) for own in sets]
    return f" (code points {' against '.join(text or 'none' for text in differing)})"


def run_class_problems(names: Sequence[str], known: Sequence[str], *, complete: bool = True) -> list[str]:
    """Classes of the data that the run was not trained on; with `complete` also those of the run that the data lack."""
    problems = []
    if unknown := [name for name in names if name not in known]:
        problems.append(f"the run does not know the class {quote_names(unknown)}; it knows {quote_names(known)}")
    if complete and (missing := [name for name in known if name not in names]):
        problems.append(f"the run's class {quote_names(missing)} is not in the data")
    return problems


def lost_classes(names: Iterable[str], images: Mapping[str, int]) -> list[str]:
    """Classes of which no image can be read, so that `--skip-bad` would drop them."""
    return [
        f"the class {name!r} has lost all of its {images[name]} images: none of them can be read"
        for name in sorted(names)
    ]


def left_out_notes(
    errors: Sequence[str], counted: Iterable[Mapping[str, int]], unsplit: Mapping[str, int] | None = None
) -> list[str]:
    """What `--skip-bad` leaves out beyond the images that are counted per split and class.

    Args:
        errors: of all files.
        counted: class name to number of images, per split.
        unsplit: class name to number of files in formats that cannot be read, if no split has them.
    """
    unsplit = unsplit or {}
    rest = len(errors) - sum(sum(counts.values()) for counts in (*counted, unsplit))
    notes = [f"left out without a class: {rest} file(s), lines or folders"] if rest else []
    if unsplit:
        count, classes = sum(unsplit.values()), count_by_class(unsplit)
        notes.append(f"left out, in no split: {count} file(s) in formats that cannot be read: {classes}")
    return notes


def split_problems(names: Sequence[str], splits: Mapping[str, Sequence[Row]]) -> list[str]:
    """What makes the splits unusable for training: one problem at most."""
    labels = {split: {row.label for row in rows} for split, rows in splits.items()}
    untrained = [name for name in names if name not in labels["train"]]
    if not names:
        return ["there is no labelled image: expected a folder with one folder per class, or a CSV file"]
    if not splits["train"]:
        return ["train has no image: name one split train, or name no split at all"]
    if untrained:
        held_out = " or ".join(split for split in ("val", "test") if labels[split] & set(untrained))
        return [f"class {quote_names(untrained)} is in {held_out} and not in train: it cannot be learned"]
    if len(names) == 1:
        return [f"there is only one class, {names[0]!r}: expected one folder per class, at least two"]
    if not splits["val"]:
        return ["val has no image: no class has two images, so none can be held out"]
    return []


def error_report(data: object, problems: Sequence[str], errors: Sequence[str]) -> DataError:
    """One error that lists everything wrong with a data set.

    Args:
        data: the folder or file.
        problems: of the data set as a whole.
        errors: of single files, which `--skip-bad` leaves out.
    """
    lines = [*problems, *errors]
    shown = lines[:MAX_REPORTED]
    if len(lines) > MAX_REPORTED:
        shown.append(f"... and {len(lines) - MAX_REPORTED} more")
    hint = "fix or remove them, or continue without them: --skip-bad (data.skip_bad = true)"
    if problems:
        hint = "fix the data, or choose another folder or CSV file with --data"
    return DataError(f"{show(data)} has {len(lines)} error(s):\n  " + "\n  ".join(shown), hint)


def quote_names(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(map(repr, names[:6])) + more


def summarize(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Count notes on single images.

    Args:
        notes: name of the image, and what is to be said.

    Returns:
        One sentence for each kind of note.
    """
    names = defaultdict(list)
    for name, note in notes:
        names[note].append(name)
    return [f"{len(group)} image(s): {note}, such as {show(group[0])}" for note, group in names.items()]


def _check_file(row: Row) -> CheckedFile:
    prefix = f"{row.location}: " if row.location else ""
    try:
        file = check(row.path)
    except DataError as error:
        return CheckedFile(prefix + error.message)
    width, height = file.stored_size
    if row.box:
        x, y, w, h = row.box
        if x + w > width + BOX_TOLERANCE or y + h > height + BOX_TOLERANCE:
            return CheckedFile(
                f"{prefix}the box x,y,w,h = {x:g},{y:g},{w:g},{h:g} extends beyond the image {show(row.path)}, "
                f"which is stored as {width} x {height}"
            )
    return CheckedFile(digest=file.digest, levels=file.levels, notes=file.notes, stored_size=file.stored_size)
