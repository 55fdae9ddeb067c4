"""List the images of a data set with their classes and splits, checked before training."""

from __future__ import annotations

import hashlib
import math
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from racnn_cli import recipe
from racnn_cli.data import checks
from racnn_cli.data.checks import CheckedFile
from racnn_cli.data.color import ValueRange, as_range, choose_range
from racnn_cli.data.duplicates import find_duplicates, overlap_notes
from racnn_cli.data.listing import Listing, Row, read_csv, read_folder
from racnn_cli.data.locate import locate
from racnn_cli.data.split import choose, hold_out
from racnn_cli.data.types import SPLITS, Index, Item, Labelled
from racnn_cli.errors import DataError

CheckFiles = Callable[[list[Row]], dict[Row, CheckedFile]]
"""Reads the files of rows."""
ShareWork = Callable[[list[Row], CheckFiles], dict[Row, CheckedFile]]
"""Runs a check on rows, possibly divided among processes; every process gets the whole result."""


def check_alone(rows: list[Row], check: CheckFiles) -> dict[Row, CheckedFile]:
    """The `ShareWork` of a single process."""
    return check(rows)


def build_index(
    data: recipe.Data,
    *,
    seed: int,
    classes: list[str] | None = None,
    verify: Sequence[str] = SPLITS,
    share: ShareWork = check_alone,
) -> Index:
    """List, split and check the images of a folder, a CSV file or a built-in data set.

    Args:
        data: the recipe's `data`.
        seed: of the split, of `data.limit` and of generated images.
        classes: class names of a run in index order; the data must have exactly these.
        verify: the splits whose files are decoded to find errors.
        share: divides the decoding among processes, all of which call this function.

    Raises:
        DataError: lists every error of the data set: unreadable, empty, truncated, oversized, unlabelled and missing
            files, boxes outside their images, classes that do not fit together; many test images that are in train.
    """
    root, listing = _list_rows(data, seed, classes)
    images = Counter(row.label for row in listing.rows)
    problems, name_notes = checks.class_name_problems(images)
    splits, singletons = _split(listing.rows, data, seed)
    splits = {split: _limit(rows, data, seed) for split, rows in splits.items()}
    fingerprint = _fingerprint(splits)
    if data.skip_bad:  # what is skipped must not depend on which splits are verified
        verify = SPLITS
    checked = {} if listing.problems else share([row for s in verify for row in splits[s]], checks.check_files)
    errors = _errors(listing, checked)
    names, left_out, left_out_notes = sorted(images), dict[str, dict[str, int]](), list[str]()
    if data.skip_bad:
        bad = {row for row, file in checked.items() if file.error}
        counts = {split: Counter(row.label for row in rows if row in bad) for split, rows in splits.items()}
        splits = {split: [row for row in rows if row not in bad] for split, rows in splits.items()}
        names = sorted({row.label for rows in splits.values() for row in rows})
        images.update(row.label for row in listing.unsupported)
        unsplit = Counter[str]()
        for row in listing.unsupported:
            counts.get(row.split, unsplit)[row.label] += 1
        left_out = {split: dict(count) for split, count in counts.items()}
        left_out_notes = checks.left_out_notes(errors, counts.values(), unsplit)
        problems += checks.lost_classes(set(images) - set(names), images)
    problems += listing.problems
    if classes is not None:
        problems += checks.run_class_problems(names, classes)
    if not problems or not data.skip_bad:
        problems += checks.split_problems(names, splits)
    if problems or (errors and not data.skip_bad):
        raise checks.error_report(root, problems, errors)
    used = {split: [(row, checked[row]) for row in rows if row in checked] for split, rows in splits.items()}
    files = [pair for pairs in used.values() for pair in pairs]
    value_range, range_notes = _value_range(data, [file for _, file in files])
    digests = {split: [(row, file.digest) for row, file in pairs] for split, pairs in used.items()}
    # A run that was started with copies may be continued and measured; its first lines have said so.
    duplicates = find_duplicates(digests, allow=data.allow_duplicates or classes is not None)
    classes = classes or names
    return Index(
        classes=classes,
        splits={split: _items(rows, classes) for split, rows in splits.items()},
        skipped=errors,
        notes=[
            *listing.notes,
            *left_out_notes,
            *name_notes,
            *_notes(names, splits, singletons),
            *duplicates,
            *range_notes,
            *checks.summarize((row.name, note) for row, file in files for note in file.notes),
        ],
        fingerprint=fingerprint,
        left_out=left_out,
        value_range=value_range,
        contents={split: b"".join(sorted(digest for _, digest in digests[split])) for split in ("train", "val")},
        own_splits=frozenset(row.split for row in listing.rows if row.split),
        side=_median_side(data, [file for _, file in files]),
    )


def labelled(
    data: recipe.Data,
    *,
    seed: int,
    classes: list[str],
    share: ShareWork = check_alone,
    contents: Mapping[str, bytes] | None = None,
) -> Labelled:
    """List every image of a folder or CSV file, unsplit, to evaluate a trained network on it.

    Args:
        data, seed, share: as in `build_index`.
        classes: of the network.
        contents: `Index.contents` of the run; the images that it was trained or chosen on are counted in a note.

    Raises:
        DataError: lists every error of the files, and classes that the network does not know.
    """
    root, listing = _list_rows(data, seed, classes)
    images = Counter(row.label for row in (*listing.rows, *listing.unsupported))
    problems = checks.class_name_problems(images)[0]
    problems += checks.run_class_problems(sorted(images), classes, complete=False) + listing.problems
    checked = {} if listing.problems else share(listing.rows, checks.check_files)
    errors = _errors(listing, checked)
    if not listing.rows:
        problems.append("there is no labelled image")
    if problems or (errors and not data.skip_bad):
        raise checks.error_report(root, problems, errors)
    rows = [row for row in listing.rows if not checked[row].error]
    left_out = Counter(row.label for row in listing.rows if checked[row].error)
    left_out.update(row.label for row in listing.unsupported)
    files = [(row, checked[row]) for row in rows]
    value_range, range_notes = _value_range(data, [file for _, file in files])
    return Labelled(
        items=_items(rows, classes),
        left_out=dict(left_out),
        notes=[
            *listing.notes,
            *checks.left_out_notes(errors, [left_out]),
            *overlap_notes([(row, file.digest) for row, file in files], contents or {}),
            *range_notes,
            *checks.summarize((row.name, note) for row, file in files for note in file.notes),
        ],
        value_range=value_range,
    )


def list_rows(data: recipe.Data, *, seed: int = 0) -> list[Row]:
    """List the image files of a data set, as named by folders or a CSV file; they are not opened.

    Raises:
        DataError: what can be wrong with the listing.
    """
    root, listing = _list_rows(data, seed, None)
    if listing.problems or listing.errors:
        raise checks.error_report(root, listing.problems, [text for _, text in listing.errors])
    return listing.rows


def _list_rows(data: recipe.Data, seed: int, classes: Sequence[str] | None) -> tuple[Path, Listing]:
    """The folder or CSV file, and its listing; a run's classes are spelled as in the run."""
    root = locate(data, seed)
    listing = read_folder(root) if root.is_dir() else read_csv(root)
    spelling = {unicodedata.normalize("NFC", name): name for name in classes or ()}
    if any(name != normal for normal, name in spelling.items()):
        listing.rows, listing.unsupported = (
            [replace(row, label=spelling.get(row.label, row.label)) for row in rows]
            for rows in (listing.rows, listing.unsupported)
        )
    return root, listing


def _errors(listing: Listing, checked: Mapping[Row, CheckedFile]) -> list[str]:
    """The errors of all files, in the order of the CSV file's lines."""
    errors = listing.errors + [(row.line, file.error) for row, file in checked.items() if file.error]
    return [text for _, text in sorted(errors, key=lambda error: error[0])]


def _median_side(data: recipe.Data, files: Sequence[CheckedFile]) -> int:
    """The side of the square that an image becomes at its own resolution, in the median."""
    sides = []
    for width, height in (file.stored_size for file in files):
        middle = round(math.sqrt(width * height))
        sides.append({"crop": min(width, height), "pad": max(width, height), "squash": middle}[data.fit])
    return statistics.median_low(sides) if sides else 0


def _value_range(data: recipe.Data, files: Iterable[CheckedFile]) -> tuple[ValueRange | None, list[str]]:
    """The range of the images with more than 8 bits, and notes on it.

    Raises:
        DataError: some images hold integers and others floats, and no range is set.
    """
    levels = [file.levels for file in files if file.levels is not None]
    if data.range:
        value_range = as_range(data.range)
        assert value_range is not None
        beyond = sum(entry.low < value_range[0] or entry.high > value_range[1] for entry in levels)
        text = f"{beyond} image(s) have values outside data.range = {list(data.range)}, which were clipped"
        return value_range, [text] if beyond else []
    if not levels:
        return None, []
    kinds = {entry.kind for entry in levels}
    if len(kinds) > 1:
        ranges = {kind: choose_range(entry for entry in levels if entry.kind == kind) for kind in sorted(kinds)}
        raise DataError(
            "some images hold integers with more than 8 bits and others floats, in the ranges "
            + " and ".join(f"{low:g}..{high:g} ({kind})" for kind, (low, high) in ranges.items()),
            "convert them to one of the two, or set the range of both: --set data.range=[0,65535]",
        )
    low, high = choose_range(levels)
    return (low, high), [f"{len(levels)} image(s) have more than 8 bits: {low:g}..{high:g} becomes 0..255 (data.range)"]


def _items(rows: list[Row], classes: list[str]) -> list[Item]:
    labels = {name: label for label, name in enumerate(classes)}
    return [Item(row.path, labels[row.label], row.box) for row in rows]


def _fingerprint(splits: dict[str, list[Row]]) -> str:
    """A hash of names only, so that a folder may move and bad files may be skipped or not."""
    names = sorted(
        unicodedata.normalize("NFC", f"{split}/{row.label}/{row.path.name}")
        for split, rows in splits.items()
        for row in rows
    )
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).hexdigest()


def _split(rows: list[Row], data: recipe.Data, seed: int) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of each split, and the classes with too few images to hold any out."""
    splits = {name: [row for row in rows if row.split == name] for name in SPLITS}
    pool = [row for row in rows if not row.split] or splits["train"]
    shares = {name: share for name, share in (("val", data.val), ("test", data.test)) if not splits[name]}
    if sum(shares.values()) >= 1:
        raise DataError(
            f"data.val = {data.val} and data.test = {data.test} leave nothing to train on",
            "--set data.val=0.15 --set data.test=0.2",
        )
    by_name = {row.name: row for row in pool}
    by_class = _names_by_class(pool)
    rest, held = hold_out(by_class, shares, seed=seed)
    for split, names in {"train": rest, **held}.items():
        splits[split] = [by_name[name] for name in names]
    return splits, [label for label, names in sorted(by_class.items()) if shares and len(names) == 1]


def _limit(rows: list[Row], data: recipe.Data, seed: int) -> list[Row]:
    """At most `data.limit` rows per class, and as many as make `data.images` together; 0 keeps all."""
    by_class = _names_by_class(rows)
    together = max(data.images // max(len(by_class), 1), 1) if data.images else 0
    limits = [limit for limit in (data.limit, together) if limit]
    if not limits:
        return rows
    limit = min(limits)
    chosen = {name for label, names in by_class.items() for name in choose(names, limit, label, seed=seed)}
    return [row for row in rows if row.name in chosen]


def _names_by_class(rows: list[Row]) -> dict[str, list[str]]:
    by_class: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_class[row.label].append(row.name)
    return by_class


def _notes(names: list[str], splits: dict[str, list[Row]], singletons: list[str]) -> list[str]:
    notes = []
    if singletons:
        notes.append(f"class {checks.quote_names(singletons)} has only one image: it is in train, none can be held out")
    for split in ("val", "test"):
        present = {row.label for row in splits[split]}
        if present and (absent := [name for name in names if name not in present and name not in singletons]):
            notes.append(f"class {checks.quote_names(absent)} has no {split} image and therefore no {split} metrics")
    return notes
