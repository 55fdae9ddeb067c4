"""List the labelled images of a folder or a CSV file, and every error in its layout."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from racnn_cli.data.decode import SUFFIXES, show
from racnn_cli.errors import DataError

Box = tuple[float, float, float, float]
"""x, y, width, height in pixels of the stored file."""

_SPLIT_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_BOX_COLUMNS = ("x", "y", "w", "h")
_UNSUPPORTED = {".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".ico", ".ppm", ".pgm", ".tga"}
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True)
class Row:
    """One labelled image.

    Attributes:
        path: of the file.
        name: path within the data set, with `/`; the same on every machine, so that splits are too.
        label: name of its class.
        split: train, val or test; empty if the data set does not say.
        box: ground-truth box, if there is one.
        location: the CSV file and line, for error messages; empty for a folder.
    """

    path: Path
    name: str
    label: str
    split: str
    box: Box | None = None
    location: str = ""


@dataclass
class Listing:
    """The images of a data set.

    Attributes:
        rows: sorted by name.
        errors: one sentence each.
        notes: what was ignored, one sentence each.
    """

    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_folder(root: Path) -> Listing:
    """List a folder with one folder per class, or with train, val and test folders that contain these.

    Raises:
        DataError: two folders are the same split.
    """
    listing = Listing()
    entries = _entries(root, listing)
    folders = [entry for entry in entries if entry.is_dir() and not _holds_runs(entry)]
    names = [folder.name.casefold() for folder in folders]
    if "train" in names or (names and all(name in _SPLIT_ALIASES for name in names)):
        splits: dict[str, Path] = {}
        for folder in folders:
            split = _SPLIT_ALIASES.get(folder.name.casefold())
            if split is None:
                listing.notes.append(f"the folder {show(folder)} is ignored: it is not one of train, val and test")
            elif split in splits:
                raise DataError(
                    f"{show(splits[split])} and {show(folder)} are both the {split} split", "merge them, or rename one"
                )
            else:
                splits[split] = folder
        _check_loose_files(root, entries, listing)
        for split in sorted(splits, key=["train", "val", "test"].index):
            _read_classes(splits[split], root, split, listing)
    else:
        _read_classes(root, root, "", listing)
    listing.rows.sort(key=lambda row: row.name)
    return listing


def read_csv(file: Path) -> Listing:
    """List a CSV file with the columns `path,label[,split][,x,y,w,h]`; paths are relative to its folder.

    Raises:
        DataError: not a text file, or the header lacks required columns.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            columns = [(name or "").strip().casefold() for name in reader.fieldnames or []]
            _check_header(file, columns)
            reader.fieldnames = columns
            return _read_rows(file, reader, columns)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{show(file)} is not a CSV file in UTF-8: {error}", "save it as CSV, UTF-8") from None
    except OSError as error:
        raise DataError(f"{show(file)} cannot be read: {error.strerror}", "check the path") from None


def list_images(folder: Path) -> list[Path]:
    """List all image files in a folder and its subfolders, sorted by path, without hidden ones.

    Raises:
        DataError: no such folder, or it contains no images.
    """
    if not folder.is_dir():
        raise DataError(f"{show(folder)} is not a folder", "name a folder of images")
    files = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"{show(folder)} contains no images", f"supported suffixes: {', '.join(sorted(SUFFIXES))}")
    return files


def _check_header(file: Path, columns: list[str]) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if any(name in columns for name in _BOX_COLUMNS):
        missing += [name for name in _BOX_COLUMNS if name not in columns]
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if missing or repeated:
        error = f"has no column {', '.join(missing)}" if missing else f"has two columns {', '.join(repeated)}"
        raise DataError(
            f"{show(file)} {error}; its first line is {','.join(columns)!r}",
            "start the file with a line of column names: path,label and optionally split and x,y,w,h",
        )


def _read_rows(file: Path, reader: csv.DictReader[str], columns: list[str]) -> Listing:
    listing = Listing()
    known = {"path", "label", "split", *_BOX_COLUMNS}
    if unknown := [name for name in columns if name not in known]:
        listing.notes.append(f"{show(file)}: ignored columns: {', '.join(map(show, unknown))}")
    lines: dict[str, int] = {}
    for cells in reader:
        location = f"{show(file.name)} line {reader.line_num}"
        if None in cells or None in cells.values():
            listing.errors.append(f"{location} does not have {len(columns)} cells like the first line")
            continue
        row = {name: cell.strip() for name, cell in cells.items()}
        name, label = row["path"], row["label"]
        split = _SPLIT_ALIASES.get(row.get("split", "").casefold(), "")
        box, box_error = _read_box(row)
        key = os.path.normpath(name)
        problems = (
            (not name, " has no path"),
            ("\0" in name, f": {name!r} is not a file name"),
            (not label, f": {show(name)} has no label"),
            ("split" in row and not split, f": split is {row.get('split')!r}; it must be train, val or test"),
            (box_error, f": {show(name)}: {box_error}"),
            (key in lines, f": {show(name)} is already in line {lines.get(key)}"),
        )
        if problem := next((message for applies, message in problems if applies), ""):
            listing.errors.append(location + problem)
            continue
        lines[key] = reader.line_num
        path, name = file.parent / name, Path(key).as_posix()
        listing.rows.append(Row(path=path, name=name, label=label, split=split, box=box, location=location))
    listing.rows.sort(key=lambda row: row.name)
    return listing


def _read_box(row: dict[str, str]) -> tuple[Box | None, str]:
    """The box of a row if there is one, and an error if it is not valid."""
    cells = [row.get(name, "") for name in _BOX_COLUMNS]
    if not any(cells):
        return None, ""
    try:
        x, y, w, h = map(float, cells)
    except ValueError:
        return None, f"x,y,w,h is {','.join(cells)!r}; it must be four numbers, or empty"
    if not all(map(math.isfinite, (x, y, w, h))) or min(w, h) <= 0 or min(x, y) < 0:
        return None, f"the box x,y,w,h = {','.join(cells)} must have x, y >= 0 and w, h > 0"
    return (x, y, w, h), ""


def _read_classes(folder: Path, root: Path, split: str, listing: Listing) -> None:
    entries = _entries(folder, listing)
    _check_loose_files(folder, entries, listing)
    for class_folder in entries:
        if not class_folder.is_dir():
            continue
        if _holds_runs(class_folder):
            listing.notes.append(f"the folder {show(class_folder)} is ignored: it contains a run of racnn")
            continue
        images = []
        for file in _image_files(class_folder, _walk(class_folder, listing), listing):
            if (suffix := file.suffix.casefold()) in SUFFIXES:
                images.append(file)
            else:
                listing.errors.append(f"{show(file)}: {suffix} files are not supported; convert it to JPEG or PNG")
        if not images:
            listing.errors.append(f"the class folder {show(class_folder)} contains no images")
        listing.rows += [
            Row(path=file, name=file.relative_to(root).as_posix(), label=class_folder.name, split=split)
            for file in images
        ]


def _holds_runs(folder: Path) -> bool:
    """Whether a folder is a run or contains runs: people who train where the images are have `runs/` next to them."""
    try:
        with os.scandir(folder) as entries:
            subfolders = [entry.path for entry in entries if entry.is_dir()]
    except OSError:
        return False  # reported when the folder is listed
    return any((Path(path) / "recipe.toml").is_file() for path in [str(folder), *subfolders])


def _check_loose_files(folder: Path, entries: list[Path], listing: Listing) -> None:
    """Report images beside the class folders, which have no label."""
    images = _image_files(folder, (entry for entry in entries if not entry.is_dir()), listing)
    listing.errors += [f"{show(file)} has no label: it is not in a class folder" for file in images]


def _image_files(folder: Path, files: Iterable[Path], listing: Listing) -> Iterator[Path]:
    """Yield the images, of supported or unsupported type, and note how many other files are ignored."""
    others = []
    for file in files:
        if file.suffix.casefold() in SUFFIXES | _UNSUPPORTED:
            yield file
        else:
            others.append(file.name)
    if others:
        listing.notes.append(
            f"{len(others)} file(s) in {show(folder)} are ignored: not images, such as {show(others[0])}"
        )


def _walk(folder: Path, listing: Listing, parents: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Yield every file in a folder and its subfolders; links are followed, except into a cycle."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        listing.notes.append(f"{show(folder)} links back to one of its parent folders and is not followed")
        return
    for entry in _entries(folder, listing):
        if entry.is_dir():
            yield from _walk(entry, listing, (*parents, identity))
        else:
            yield entry


def _entries(folder: Path, listing: Listing) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        listing.errors.append(f"the folder {show(folder)} cannot be read: {error.strerror}")
        return []
    return [folder / name for name in names if not name.startswith(".") and name.casefold() not in _SYSTEM_FILES]
