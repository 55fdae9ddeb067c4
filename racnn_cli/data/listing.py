"""List the labelled images of a folder or a CSV file, and every error in its layout."""

from __future__ import annotations

import csv
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from racnn_cli.data.decode import SUFFIXES, show
from racnn_cli.data.layout import EVAL, enter, find_inner_splits, find_splits, settle_eval, split_meaning
from racnn_cli.data.walk import Walker, is_image_name
from racnn_cli.errors import DataError

Box = tuple[float, float, float, float]
"""x, y, width, height in pixels of the stored file."""

_BOX_COLUMNS = ("x", "y", "w", "h")
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
MISSING_LABELS = {"nan", "<na>", "null", "#n/a"}
"""How pandas, databases and spreadsheets write a missing value."""


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
        line: in the CSV file; 0 for a folder.
        folder: of its class; of the CSV file.
    """

    path: Path
    name: str
    label: str
    split: str
    box: Box | None = None
    location: str = ""
    line: int = 0
    folder: Path = Path()

    def __hash__(self) -> int:  # names are unique, and hashing every field of a million rows takes seconds
        return hash(self.name)


@dataclass
class Listing:
    """The images of a data set.

    Attributes:
        rows: sorted by name.
        errors: line of the CSV file (0 for a folder) and one sentence each, for single files that cannot be used.
        problems: one sentence each, of the data set as a whole.
        notes: what was ignored, one sentence each.
        unsupported: files in formats that cannot be read; each is one of `errors`, too.
    """

    rows: list[Row] = field(default_factory=list)
    errors: list[tuple[int, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unsupported: list[Row] = field(default_factory=list)

    def sort(self) -> None:
        """Sort the rows by name, and keep names apart that differ in their Unicode form alone."""
        counts = Counter(row.name for row in self.rows)
        self.rows = sorted(
            (row if counts[row.name] == 1 else replace(row, name=str(row.path)) for row in self.rows),
            key=lambda row: row.name,
        )


def read_folder(root: Path) -> Listing:
    """List a folder with one folder per class, with or without train, val and test folders around or inside these.

    Raises:
        DataError: two folders are the same split, or it is not clear which folders are splits.
    """
    listing, walker = Listing(), Walker()
    top = enter(root, walker)
    folders, files = walker.entries(top)
    folders = [folder for folder in folders if not _is_run(folder, walker)]
    if splits := find_splits(folders, walker):
        _check_loose_files(top, files, listing, walker)
        for split in sorted(splits, key=["train", "val", "test"].index):
            folder = enter(splits[split][0], walker)
            inner, files = walker.entries(folder)
            _check_loose_files(folder, files, listing, walker)
            _read_classes(inner, root, split, listing, walker)
    else:
        _check_loose_files(top, files, listing, walker)
        _read_classes(folders, root, "", listing, walker)
        _split_inside_classes(listing, walker)
    listing.errors += [(0, error) for error in walker.errors]
    listing.notes += walker.notes
    listing.sort()
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
    """List all image files in a folder and its subfolders, sorted by path; also those that cannot be read.

    Raises:
        DataError: no such folder, it contains no images, or one of its folders cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{show(folder)} is not a folder", "name a folder of images")
    walker = Walker()
    files = sorted(walker.images(folder))
    if walker.errors:
        raise DataError("; ".join(walker.errors), "change its permissions, or name other folders")
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
            listing.errors.append(
                (reader.line_num, f"{location} does not have {len(columns)} cells like the first line")
            )
            continue
        row = {name: cell.strip() for name, cell in cells.items()}
        name, label = row["path"], unicodedata.normalize("NFC", row["label"])
        split = split_meaning(row.get("split", ""))
        box, box_error = _read_box(row)
        key = os.path.normpath(name)
        problems = (
            (not name, " has no path"),
            ("\0" in name, f": {name!r} is not a file name"),
            (not label, f": {show(name)} has no label"),
            (
                label.casefold() in MISSING_LABELS,
                f": {show(name)} has the label {label!r}, which is how a missing label is often written; if it is a "
                "class, give it another name",
            ),
            ("split" in row and not split, f": split is {row.get('split')!r}; it must be train, val or test"),
            (box_error, f": {show(name)}: {box_error}"),
            (key in lines, f": {show(name)} is already in line {lines.get(key)}"),
        )
        if problem := next((message for applies, message in problems if applies), ""):
            listing.errors.append((reader.line_num, location + problem))
            continue
        lines[key] = reader.line_num
        path, name = _existing(file.parent / name), _portable(Path(key))
        listing.rows.append(
            Row(path, name=name, label=label, split=split, box=box, location=location, line=reader.line_num)
        )
    splits = settle_eval(row.split for row in listing.rows)
    if EVAL in splits:
        listing.rows = [replace(row, split=splits[row.split]) for row in listing.rows]
        listing.notes.append(f"the split eval is used as {splits[EVAL]}")
    listing.problems += [*_missing_files(file, listing.rows), *_box_units(listing.rows)]
    listing.sort()
    return listing


def _existing(path: Path) -> Path:
    """The path, or the one that differs in its Unicode form alone, if only that exists."""
    if str(path).isascii() or os.path.exists(path):
        return path
    forms = [Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")]
    return next((form for form in forms if os.path.exists(form)), path)


def _missing_files(file: Path, rows: list[Row]) -> list[str]:
    """One problem with its likely cause if none of the files exists."""
    if not rows or any(os.path.exists(row.path) for row in rows):
        return []
    problem = (
        f"none of the {len(rows)} files exists, such as {show(rows[0].path)}; paths are relative to "
        f"{show(file.parent)}/"
    )
    name = rows[0].path.relative_to(file.parent).as_posix() if rows[0].path.is_relative_to(file.parent) else ""
    slashes = name.replace("\\", "/")
    if slashes != name:
        problem += f"; {show(name)} has backslashes"
    # The folder that is missing in the paths, or the leading part that is one too many.
    candidates = [file.parent / slashes, Path(slashes)]
    candidates += [folder / slashes for folder in sorted(file.parent.iterdir()) if folder.is_dir()]
    candidates += [file.parent.joinpath(*Path(slashes).parts[start:]) for start in range(1, len(Path(slashes).parts))]
    if name and (existing := next((path for path in candidates if os.path.isfile(path)), None)):
        problem += f", and {show(existing)} exists"
    return [problem]


def _box_units(rows: list[Row]) -> list[str]:
    """One problem if the boxes look like fractions of the images."""
    boxes = [row.box for row in rows if row.box]
    if not boxes or any(max(box) > 1 for box in boxes):
        return []
    example = ",".join(f"{value:g}" for value in boxes[0])
    return [
        f"all {len(boxes)} boxes are smaller than a pixel, such as x,y,w,h = {example}: they look like fractions, and "
        "x,y,w,h are pixels; multiply x and w by the image's width, y and h by its height"
    ]


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


def _read_classes(folders: list[Path], root: Path, split: str, listing: Listing, walker: Walker) -> None:
    for class_folder in folders:
        if _is_run(class_folder, walker):
            continue
        label = unicodedata.normalize("NFC", class_folder.name)
        images, unsupported = list[Row](), list[Row]()
        for file in _image_files(class_folder, walker.files(class_folder), listing):
            row = Row(path=file, name=_portable(file.relative_to(root)), label=label, split=split, folder=class_folder)
            if (suffix := file.suffix.casefold()) in SUFFIXES:
                images.append(row)
            else:
                unsupported.append(row)
                hint = "pip install 'racnn[heif]', or convert it" if suffix in HEIF_SUFFIXES else "convert it"
                listing.errors.append((0, f"{show(file)}: {suffix} files are not supported; {hint} to JPEG or PNG"))
        if not images and not unsupported:
            listing.errors.append((0, f"the class folder {show(class_folder)} contains no images"))
        listing.rows += images
        listing.unsupported += unsupported


def _split_inside_classes(listing: Listing, walker: Walker) -> None:
    """Take the splits from the folders inside the class folders, where every class has them."""
    inner: dict[Path, set[str]] = {}
    for row in listing.rows:
        inner.setdefault(row.folder, set()).add(_inner_folder(row))
    if not find_inner_splits({show(folder): sorted(names) for folder, names in inner.items()}):
        return
    meanings = settle_eval(split_meaning(name) for names in inner.values() for name in names)
    listing.rows, listing.unsupported = (
        [replace(row, split=meanings.get(split_meaning(_inner_folder(row)), "")) for row in rows]
        for rows in (listing.rows, listing.unsupported)
    )
    names = sorted({name for names in inner.values() for name in names})
    walker.notes.append(f"the splits are read from the folders inside each class: {', '.join(map(show, names))}")


def _inner_folder(row: Row) -> str:
    """The name of the folder inside its class folder that an image is in; empty if it is in none."""
    parts = row.path.relative_to(row.folder).parts
    return parts[0] if len(parts) > 1 else ""


def _is_run(folder: Path, walker: Walker) -> bool:
    """Whether a folder is a run or contains runs: people who train where the images are have `runs/` next to them."""
    try:
        with os.scandir(folder) as entries:
            subfolders = [entry.path for entry in entries if entry.is_dir()]
    except OSError:
        return False  # reported when the folder is listed
    if any((Path(path) / "recipe.toml").is_file() for path in [str(folder), *subfolders]):
        walker.notes.append(f"the folder {show(folder)} is ignored: it contains a run of racnn")
        return True
    return False


def _check_loose_files(folder: Path, files: list[Path], listing: Listing, walker: Walker) -> None:
    """Report images beside the class folders, which have no label."""
    images = _image_files(folder, files, listing)
    listing.errors += [(0, f"{show(file)} has no label: it is not in a class folder") for file in images]


def _image_files(folder: Path, files: Iterable[Path], listing: Listing) -> Iterator[Path]:
    """Yield the images, of supported or unsupported type, and note how many other files are ignored."""
    others = []
    for file in files:
        if is_image_name(file):
            yield file
        else:
            others.append(file.name)
    if others:
        listing.notes.append(
            f"{len(others)} file(s) in {show(folder)} are ignored: not images, such as {show(others[0])}"
        )


def _portable(path: Path) -> str:
    """A path with `/`, in Unicode's composed form: macOS writes the names of the same files decomposed."""
    return unicodedata.normalize("NFC", path.as_posix())
