"""What a folder or a CSV file says: one row an image, and every error in the way it is laid out."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from racnn_cli.data.decode import SUFFIXES, show
from racnn_cli.errors import RacnnError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Names that a split may have in the data, and ours."""
BOX = ("x", "y", "w", "h")

_OTHER_PICTURES = {
    ".gif",
    ".heic",
    ".heif",
    ".avif",
    ".jp2",
    ".jxl",
    ".svg",
    ".psd",
    ".ico",
    ".ppm",
    ".pgm",
    ".tga",
}
_CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True)
class Row:
    """One labelled image.

    Attributes:
        path: of the file.
        name: its path within the data, with `/`; the same on every machine, so that splits are.
        label: name of its class.
        split: train, val or test; empty where the data names none.
        box: x, y, width, height in pixels of the file as stored.
        where: how a message names it.
    """

    path: Path
    name: str
    label: str
    split: str
    box: tuple[float, float, float, float] | None
    where: str


@dataclass
class Listing:
    """Attributes: rows in the order of their names; errors, each a sentence; notes on what was left aside."""

    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_folder(root: Path) -> Listing:
    """A folder with one folder a class, or with train, val and test folders that hold them.

    Raises:
        RacnnError: two folders of one split, or no train folder beside a val or test folder.
    """
    listing = Listing()
    folders = [entry for entry in _entries(root, listing) if entry.is_dir() and not _holds_runs(entry)]
    names = [folder.name.casefold() for folder in folders]
    if "train" in names or (names and all(name in SPLITS for name in names)):
        splits: dict[str, Path] = {}
        for folder in folders:
            split = SPLITS.get(folder.name.casefold())
            if split is None:
                listing.notes.append(
                    f"the folder {show(folder)} is not used: it is no split beside train, val and test"
                )
            elif split in splits:
                raise RacnnError(
                    f"{show(splits[split])} and {show(folder)} are both the {split} split",
                    "merge or rename one",
                )
            else:
                splits[split] = folder
        _loose_files(root, listing)
        for split in sorted(splits, key=["train", "val", "test"].index):
            _read_classes(splits[split], root, split, listing)
    else:
        _read_classes(root, root, "", listing)
    listing.rows.sort(key=lambda row: row.name)
    return listing


def read_csv(file: Path) -> Listing:
    """A CSV file `path,label[,split][,x,y,w,h]` with a header; paths are relative to its folder.

    Raises:
        RacnnError: not a text file, or a header without the columns that are needed.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            columns = [(name or "").strip().casefold() for name in reader.fieldnames or []]
            _check_header(file, columns)
            reader.fieldnames = columns
            return _read_rows(file, reader, columns)
    except (UnicodeDecodeError, csv.Error) as error:
        raise RacnnError(
            f"{show(file)} is not a CSV file in UTF-8: {error}", "save it as CSV, UTF-8"
        ) from None
    except OSError as error:
        raise RacnnError(f"{show(file)} cannot be read: {error.strerror}", "check the path") from None


def _check_header(file: Path, columns: list[str]) -> None:
    wanted = "path,label, and if need be split and x,y,w,h"
    missing = [name for name in ("path", "label") if name not in columns]
    if any(name in columns for name in BOX):
        missing += [name for name in BOX if name not in columns]
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if missing or twice:
        error = (
            f"has no column {', '.join(missing)}" if missing else f"names the column {', '.join(twice)} twice"
        )
        raise RacnnError(
            f"{show(file)} {error}; its first line is {','.join(columns)!r}",
            f"start the file with a line that names its columns, separated by commas: {wanted}",
        )


def _read_rows(file: Path, reader: csv.DictReader[str], columns: list[str]) -> Listing:
    listing = Listing()
    used = {"path", "label", "split", *BOX}
    if unused := [name for name in columns if name not in used]:
        listing.notes.append(f"{show(file)}: these columns are not used: {', '.join(map(show, unused))}")
    seen: dict[str, int] = {}
    for cells in reader:
        line = reader.line_num
        where = f"{show(file.name)} line {line}"
        if None in cells or None in cells.values():
            listing.errors.append(f"{where} has not {len(columns)} cells as the first line has")
            continue
        row = {name: cell.strip() for name, cell in cells.items()}
        name = row["path"]
        split = SPLITS.get(row.get("split", "").casefold(), "")
        box, box_error = _read_box(row)
        key = os.path.normpath(name)
        if not name:
            listing.errors.append(f"{where} names no file")
        elif "\0" in name:
            listing.errors.append(f"{where}: {name!r} is not a file name")
        elif not row["label"]:
            listing.errors.append(f"{where}: {show(name)} has no label")
        elif "split" in row and not split:
            listing.errors.append(f"{where}: split is {row['split']!r}; train, val or test can be read")
        elif box_error:
            listing.errors.append(f"{where}: {show(name)}: {box_error}")
        elif key in seen:
            listing.errors.append(f"{where}: {show(name)} is there already in line {seen[key]}")
        else:
            seen[key] = line
            listing.rows.append(
                Row(file.parent / name, Path(key).as_posix(), row["label"], split, box, where)
            )
    listing.rows.sort(key=lambda row: row.name)
    return listing


def _read_box(row: dict[str, str]) -> tuple[tuple[float, float, float, float] | None, str]:
    cells = [row.get(name, "") for name in BOX]
    if not any(cells):
        return None, ""
    try:
        x, y, w, h = map(float, cells)
    except ValueError:
        return None, f"x,y,w,h is {','.join(cells)!r}; four numbers are needed, or none"
    if not all(map(math.isfinite, (x, y, w, h))) or min(w, h) <= 0 or min(x, y) < 0:
        return None, f"the box x,y,w,h = {','.join(cells)} must have x, y >= 0 and w, h > 0"
    return (x, y, w, h), ""


def _read_classes(folder: Path, root: Path, split: str, listing: Listing) -> None:
    classes = [entry for entry in _entries(folder, listing) if entry.is_dir()]
    _loose_files(folder, listing)
    for place in classes:
        if _holds_runs(place):
            listing.notes.append(f"the folder {show(place)} is not used: it holds a run of racnn")
            continue
        found, others = [], []
        for file in _walk(place, listing):
            suffix = file.suffix.casefold()
            if suffix in SUFFIXES:
                found.append(file)
            elif suffix in _OTHER_PICTURES:
                listing.errors.append(f"{show(file)}: {suffix} files are not read; convert it to JPEG or PNG")
            else:
                others.append(file)
        _note_others(place, others, listing)
        if not found:
            listing.errors.append(f"the class folder {show(place)} holds no image")
        listing.rows += [
            Row(file, file.relative_to(root).as_posix(), place.name, split, None, show(file))
            for file in found
        ]


def _holds_runs(folder: Path) -> bool:
    """Whether a folder is a run, or has runs in it: who trains where the images lie has them beside the classes."""
    try:
        with os.scandir(folder) as entries:
            inside = [entry.path for entry in entries if entry.is_dir()]
    except OSError:
        return False  # who lists it will say so
    return any((Path(place) / "recipe.toml").is_file() for place in [str(folder), *inside])


def _loose_files(folder: Path, listing: Listing) -> None:
    """FileSource beside the class folders: images among them have no label."""
    files = [entry for entry in _entries(folder, listing) if not entry.is_dir()]
    images = [file for file in files if file.suffix.casefold() in SUFFIXES | _OTHER_PICTURES]
    listing.errors += [f"{show(file)} has no label: it lies in no class folder" for file in images]
    _note_others(folder, [file for file in files if file not in images], listing)


def _note_others(folder: Path, files: list[Path], listing: Listing) -> None:
    if files:
        listing.notes.append(
            f"{len(files)} file(s) in {show(folder)} are not used: no images, such as {show(files[0].name)}"
        )


def _walk(folder: Path, listing: Listing, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Every file in a folder and the folders in it; links are followed, but never in a circle."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        listing.notes.append(f"{show(folder)} links back to a folder that it lies in, and is not followed")
        return
    for entry in _entries(folder, listing):
        if entry.is_dir():
            yield from _walk(entry, listing, (*above, here))
        else:
            yield entry


def _entries(folder: Path, listing: Listing) -> Iterable[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        listing.errors.append(f"the folder {show(folder)} cannot be read: {error.strerror}")
        return []
    return [folder / name for name in names if not name.startswith(".") and name.casefold() not in _CLUTTER]


def list_images(folder: Path) -> list[Path]:
    """All image files of a folder and below, in the order of their names; hidden ones are left out.

    Raises:
        RacnnError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise RacnnError(f"{show(folder)} is no folder", "name a folder of images")
    found = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise RacnnError(f"{show(folder)} holds no images", f"images end in {', '.join(sorted(SUFFIXES))}")
    return found
