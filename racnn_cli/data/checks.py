"""Check a data set before it is used: every file is decoded, and the classes must fit together."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from racnn_cli.data.decode import check, show
from racnn_cli.data.listing import Row
from racnn_cli.errors import DataError
from racnn_cli.run import printable

MAX_REPORTED = 1000
"""One message lists at most this many errors; the rest are only counted."""
BOX_TOLERANCE = 0.5
"""Pixels by which a box may extend beyond its image: it was rounded, not misplaced."""


def check_files(rows: list[Row]) -> dict[Row, str]:
    """Decode every file; returns the rows that cannot be used, each with its error."""
    errors: dict[Row, str] = {}
    # Threads suffice, because Pillow releases the interpreter lock. Chunks bound the memory of waiting tasks.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), 4096):
            chunk = rows[start : start + 4096]
            errors |= {row: text for row, text in zip(chunk, pool.map(_file_error, chunk), strict=True) if text}
    return errors


def class_name_problems(names: Sequence[str]) -> list[str]:
    """Class names that cannot be printed, or that differ only in case, spaces or underscores."""
    problems = []
    similar = defaultdict(list)
    for name in names:
        try:
            printable(name)
        except ValueError as error:
            problems.append(str(error))
        similar[re.sub(r"[\s_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()].append(name)
    problems += [
        f"{' and '.join(map(repr, group))} look like names of the same class: merge or rename them"
        for group in similar.values()
        if len(group) > 1
    ]
    return problems


def run_class_problems(names: Sequence[str], known: Sequence[str], *, complete: bool = True) -> list[str]:
    """Classes of the data that the run was not trained on; with `complete` also those of the run that the data lack."""
    problems = []
    if unknown := [name for name in names if name not in known]:
        problems.append(f"the run does not know the class {quote_names(unknown)}; it knows {quote_names(known)}")
    if complete and (missing := [name for name in known if name not in names]):
        problems.append(f"the run's class {quote_names(missing)} is not in the data")
    return problems


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


def _file_error(row: Row) -> str:
    prefix = f"{row.location}: " if row.location else ""
    try:
        width, height = check(row.path)
    except DataError as error:
        return prefix + error.message
    if row.box:
        x, y, w, h = row.box
        if x + w > width + BOX_TOLERANCE or y + h > height + BOX_TOLERANCE:
            return (
                f"{prefix}the box x,y,w,h = {x:g},{y:g},{w:g},{h:g} extends beyond the image {show(row.path)}, "
                f"which is stored as {width} x {height}"
            )
    return ""
