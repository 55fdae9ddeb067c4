"""List the images of a data set with their classes and splits, checked before training."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from racnn_cli import recipe
from racnn_cli.data import checks
from racnn_cli.data.listing import Listing, Row, read_csv, read_folder
from racnn_cli.data.locate import locate
from racnn_cli.data.split import choose, hold_out
from racnn_cli.data.types import SPLITS, Index, Item, Labelled
from racnn_cli.errors import DataError

CheckFiles = Callable[[list[Row]], dict[Row, str]]
"""Maps rows to those whose files cannot be used, each with its error."""
ShareWork = Callable[[list[Row], CheckFiles], dict[Row, str]]
"""Runs a check on rows, possibly divided among processes; every process gets the whole result."""


def check_alone(rows: list[Row], check: CheckFiles) -> dict[Row, str]:
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
            files, boxes outside their images, classes that do not fit together.
    """
    root, listing, names = _list_rows(data, seed)
    problems = checks.class_name_problems(names)
    splits, singletons = _split(listing.rows, data, seed)
    splits = {split: _limit(rows, data.limit, seed) for split, rows in splits.items()}
    fingerprint = _fingerprint(splits)
    if data.skip_bad:  # what is skipped must not depend on which splits are verified
        verify = SPLITS
    bad = share([row for split in verify for row in splits[split]], checks.check_files)
    errors = listing.errors + list(bad.values())
    left_out = {split: _count_classes(row for row in rows if row in bad) for split, rows in splits.items()}
    if data.skip_bad:
        splits = {split: [row for row in rows if row not in bad] for split, rows in splits.items()}
        names = sorted({row.label for rows in splits.values() for row in rows})
    if classes is not None:
        problems += checks.run_class_problems(names, classes)
    problems += checks.split_problems(names, splits)
    if problems or (errors and not data.skip_bad):
        raise checks.error_report(root, problems, errors)
    classes = classes or names
    return Index(
        classes=classes,
        splits={split: _items(rows, classes) for split, rows in splits.items()},
        skipped=errors,
        notes=listing.notes + _notes(names, splits, singletons),
        fingerprint=fingerprint,
        left_out=left_out,
        own_splits=frozenset(row.split for row in listing.rows if row.split),
    )


def labelled(data: recipe.Data, *, seed: int, classes: list[str], share: ShareWork = check_alone) -> Labelled:
    """List every image of a folder or CSV file, unsplit, to evaluate a trained network on it.

    Raises:
        DataError: lists every error of the files, and classes that the network does not know.
    """
    root, listing, names = _list_rows(data, seed)
    problems = checks.class_name_problems(names) + checks.run_class_problems(names, classes, complete=False)
    bad = share(listing.rows, checks.check_files)
    errors = listing.errors + list(bad.values())
    if not listing.rows:
        problems.append("there is no labelled image")
    if problems or (errors and not data.skip_bad):
        raise checks.error_report(root, problems, errors)
    items = _items([row for row in listing.rows if row not in bad], classes)
    return Labelled(items=items, left_out=_count_classes(bad), notes=listing.notes)


def _count_classes(rows: Iterable[Row]) -> dict[str, int]:
    """Class name to its number of rows; without classes that have none."""
    return dict(sorted(Counter(row.label for row in rows).items()))


def _list_rows(data: recipe.Data, seed: int) -> tuple[Path, Listing, list[str]]:
    """The folder or CSV file, its listing, and its class names."""
    root = locate(data, seed)
    listing = read_folder(root) if root.is_dir() else read_csv(root)
    return root, listing, sorted({row.label for row in listing.rows})


def _items(rows: list[Row], classes: list[str]) -> list[Item]:
    labels = {name: label for label, name in enumerate(classes)}
    return [Item(row.path, labels[row.label], row.box) for row in rows]


def _fingerprint(splits: dict[str, list[Row]]) -> str:
    """A hash of names only, so that a folder may move and bad files may be skipped or not."""
    names = sorted(f"{split}/{row.label}/{row.path.name}" for split, rows in splits.items() for row in rows)
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


def _limit(rows: list[Row], limit: int, seed: int) -> list[Row]:
    """At most `limit` rows per class; 0 keeps all."""
    if not limit:
        return rows
    by_class = _names_by_class(rows)
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
