"""Where the images come from: every file of the data with its class and split, verified before training."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from racnn_cli import recipe
from racnn_cli.data import datasets
from racnn_cli.data.decode import check, show
from racnn_cli.data.listing import Row, read_csv, read_folder
from racnn_cli.data.split import choose, hold_out
from racnn_cli.errors import RacnnError
from racnn_cli.run import printable

SPLITS = ("train", "val", "test")
SHOWN = 1000
"""So many errors are spelt out in one message; the rest is counted."""
SLACK = 0.5
"""Pixels by which a box may leave its image: it was rounded, not misplaced."""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        path: of the file.
        label: index of its class.
        box: x, y, width, height in pixels of the file as stored, where the data has one.
    """

    path: Path
    label: int
    box: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Index:
    """All images of a data set.

    Attributes:
        classes: names in index order.
        splits: `train`, `val` and `test`; `test` is empty where nothing is held out for it.
        skipped: what `data.skip_bad` left out, a sentence each.
        notes: what is worth knowing and no error, a sentence each.
        fingerprint: of which file is in which split; another one means that a run's test images may be
            images that it was trained on.
    """

    classes: list[str]
    splits: dict[str, list[Item]]
    skipped: list[str]
    notes: list[str]
    fingerprint: str


Look = Callable[[list[Row]], dict[Row, str]]
"""Rows to those whose files cannot be used, with a sentence each."""


def build_index(
    data: recipe.Data,
    *,
    seed: int,
    classes: list[str] | None = None,
    verify: Sequence[str] = SPLITS,
    share: Callable[[list[Row], Look], dict[Row, str]] = lambda rows, look: look(rows),
) -> Index:
    """List, split and verify the data.

    Args:
        data: the recipe's `data`: a folder, a CSV file or a built-in set, and how to split it.
        seed: of the split, of `data.limit` and of the drawn images.
        classes: the class names of a run, in their order; the data must have exactly these.
        verify: the splits whose files are read to the end, to find what is wrong with them.
        share: how several processes share out that work, each of which calls this.

    Raises:
        RacnnError: with every error of the data: unreadable, empty, truncated, oversized, unlabelled and
            missing files, boxes outside their images, classes that do not fit together.
    """
    root = locate(data, seed)
    listing = read_folder(root) if root.is_dir() else read_csv(root)
    names = sorted({row.label for row in listing.rows})
    problems = _name_problems(names)
    splits, single = _split(listing.rows, data, seed)
    splits = _limit(splits, data.limit, seed)
    fingerprint = _fingerprint(splits)
    if data.skip_bad:  # what is left out must not depend on what is looked at
        verify = SPLITS
    bad = share([row for split in verify for row in splits[split]], _verify)
    errors = listing.errors + list(bad.values())
    if data.skip_bad:
        splits = {name: [row for row in rows if row not in bad] for name, rows in splits.items()}
        names = sorted({row.label for rows in splits.values() for row in rows})
    problems += _class_problems(names, splits, classes)
    if problems or (errors and not data.skip_bad):
        raise _report(root, problems, errors)
    order = classes or names
    label = {name: place for place, name in enumerate(order)}
    return Index(
        classes=order,
        splits={n: [Item(row.path, label[row.label], row.box) for row in rows] for n, rows in splits.items()},
        skipped=errors,
        notes=listing.notes + _notes(names, splits, single),
        fingerprint=fingerprint,
    )


def labelled(data: recipe.Data, *, seed: int, classes: list[str]) -> list[Item]:
    """Every image of a folder or CSV file, for measuring a trained network on it: nothing is held out.

    Raises:
        RacnnError: with every error of the files, and classes that the network does not know.
    """
    root = locate(data, seed)
    listing = read_folder(root) if root.is_dir() else read_csv(root)
    names = sorted({row.label for row in listing.rows})
    problems = _name_problems(names) + _known_problems(names, classes)
    bad = _verify(listing.rows)
    errors = listing.errors + list(bad.values())
    if not listing.rows:
        problems.append("there is no labelled image")
    if problems or (errors and not data.skip_bad):
        raise _report(root, problems, errors)
    label = {name: place for place, name in enumerate(classes)}
    return [Item(row.path, label[row.label], row.box) for row in listing.rows if row not in bad]


def _fingerprint(splits: dict[str, list[Row]]) -> str:
    """Of names only, so that a folder may move and a bad file be skipped or not."""
    names = sorted(f"{split}/{row.label}/{row.path.name}" for split, rows in splits.items() for row in rows)
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass")).hexdigest()


def locate(data: recipe.Data, seed: int) -> Path:
    """The folder or CSV file that `data.path` means; a built-in set is made or fetched.

    Raises:
        RacnnError: there is no such file; the hint names what is near.
    """
    if not data.path:
        raise RacnnError(
            "no data are named: data.path is empty",
            f"--data FOLDER with a folder a class, --data FILE.csv, or --data {' or '.join(datasets.NAMES)}",
        )
    name, _, argument = data.path.partition(":")
    if name in datasets.REGISTRY:
        locate_files = datasets.REGISTRY[name].path
        if locate_files is None:
            raise RacnnError(
                f"data.path = {name!r} has no files: its images are drawn when used", "other data"
            )
        return locate_files(data.model_copy(update={"path": argument}), seed)
    path = Path(data.path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.casefold() == ".csv"):
        return path
    if path.exists():
        raise RacnnError(
            f"data.path = {show(path)} is neither a folder nor a .csv file",
            "--data FOLDER, or --data FILE.csv",
        )
    hint = f"--data FOLDER, --data FILE.csv, or one of the built-in sets {', '.join(datasets.NAMES)}"
    if near := _near(path):
        hint = f"did you mean {' or '.join(near)}? Otherwise {hint}"
    raise RacnnError(f"data.path = {data.path!r} does not exist", hint)


def _near(path: Path) -> list[str]:
    """Names like the first part of the path that does not exist: what lies there, and the built-in sets."""
    missing = path
    while missing.parent != missing and not missing.parent.exists():
        missing = missing.parent
    try:
        beside = [name for name in os.listdir(missing.parent) if not name.startswith(".")]
    except OSError:
        beside = []
    folded: dict[str, str] = {}
    for name in sorted(beside):
        folded.setdefault(name.casefold(), str(missing.parent / name))
    if missing == path and len(path.parts) == 1:
        folded.update({name: name for name in datasets.NAMES})
    return [
        show(folded[near])
        for near in difflib.get_close_matches(missing.name.casefold(), folded, n=3, cutoff=0.6)
    ]


def _split(rows: list[Row], data: recipe.Data, seed: int) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows of each split, and the classes of which nothing can be held out."""
    given: dict[str, list[Row]] = {name: [row for row in rows if row.split == name] for name in SPLITS}
    pool = [row for row in rows if not row.split] or given["train"]
    shares = {n: share for n, share in (("val", data.val), ("test", data.test)) if not given[n]}
    if sum(shares.values()) >= 1:
        raise RacnnError(
            f"data.val = {data.val} and data.test = {data.test} leave nothing to train on",
            "--set data.val=0.15 --set data.test=0.2",
        )
    by_name = {row.name: row for row in pool}
    by_class: dict[str, list[str]] = defaultdict(list)
    for row in pool:
        by_class[row.label].append(row.name)
    rest, held = hold_out(by_class, shares, seed=seed)
    given["train"] = [by_name[name] for name in rest]
    for split, names in held.items():
        given[split] = [by_name[name] for name in names]
    return given, [label for label, names in sorted(by_class.items()) if shares and len(names) == 1]


def _limit(splits: dict[str, list[Row]], limit: int, seed: int) -> dict[str, list[Row]]:
    if not limit:
        return splits
    limited = {}
    for split, rows in splits.items():
        by_class: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            by_class[row.label].append(row.name)
        kept = {name for label, names in by_class.items() for name in choose(names, limit, label, seed=seed)}
        limited[split] = [row for row in rows if row.name in kept]
    return limited


def _verify(rows: list[Row]) -> dict[Row, str]:
    """Decode every file (Pillow lets other threads run meanwhile); the bad rows with a sentence each."""

    def problem(row: Row) -> str:
        prefix = "" if row.where == show(row.path) else f"{row.where}: "
        try:
            width, height = check(row.path)
        except RacnnError as error:
            return prefix + error.message
        if row.box:
            x, y, w, h = row.box
            if x + w > width + SLACK or y + h > height + SLACK:
                return (
                    f"{prefix}the box x,y,w,h = {x:g},{y:g},{w:g},{h:g} leaves the image {show(row.path)}, "
                    f"which is {width} x {height} as stored"
                )
        return ""

    found: dict[Row, str] = {}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), 4096):  # each that waits takes memory of its own
            some = rows[start : start + 4096]
            found |= {row: text for row, text in zip(some, pool.map(problem, some), strict=True) if text}
    return found


def _name_problems(names: list[str]) -> list[str]:
    """Class names that cannot be told apart, or cannot be printed."""
    problems = []
    for name in names:
        try:
            printable(name)
        except ValueError as error:
            problems.append(str(error))
    alike = defaultdict(list)
    for name in names:
        alike[re.sub(r"[\s_]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()].append(name)
    for group in alike.values():
        if len(group) > 1:
            problems.append(
                f"{' and '.join(map(repr, group))} look like names of one class: merge or rename them"
            )
    return problems


def _known_problems(names: list[str], known: list[str]) -> list[str]:
    surplus = [name for name in names if name not in known]
    return [f"the run does not know the class {_some(surplus)}; it knows {_some(known)}"] if surplus else []


def _class_problems(names: list[str], splits: dict[str, list[Row]], known: list[str] | None) -> list[str]:
    problems = []
    present = {split: {row.label for row in rows} for split, rows in splits.items()}
    if known is not None:
        problems += _known_problems(names, known)
        if missing := [name for name in known if name not in names]:
            problems.append(f"the run's class {_some(missing)} is not in the data")
    untaught = [name for name in names if name not in present["train"]]
    if not names:
        problems.append(
            "there is no labelled image: a folder with one folder a class, or a CSV file, is expected"
        )
    elif not splits["train"]:
        problems.append("train has no image: name one split train, or name no split at all")
    elif untaught:
        elsewhere = " or ".join(split for split in ("val", "test") if present[split] & set(untaught))
        problems.append(f"class {_some(untaught)} is in {elsewhere} and not in train: it cannot be learned")
    elif len(names) == 1:
        problems.append(
            f"there is only one class, {names[0]!r}: one folder a class is expected, at least two"
        )
    elif not splits["val"]:
        problems.append("val has no image: no class has two images, so none can be held out")
    return problems


def _report(root: Path, problems: list[str], errors: list[str]) -> RacnnError:
    lines = problems + errors
    shown = lines[:SHOWN]
    if len(lines) > SHOWN:
        shown.append(f"... and {len(lines) - SHOWN} more")
    hint = "fix or remove them, or --skip-bad (data.skip_bad = true) to go on without them"
    if problems:
        hint = "fix the data, or choose another folder or CSV file with --data"
    return RacnnError(f"{show(root)} has {len(lines)} error(s):\n  " + "\n  ".join(shown), hint)


def _notes(names: list[str], splits: dict[str, list[Row]], single: list[str]) -> list[str]:
    notes = []
    if single:
        notes.append(
            f"class {_some(single)} has one image: it is in train, and nothing of it can be held out"
        )
    for split in ("val", "test"):
        present = {row.label for row in splits[split]}
        if present and (absent := [name for name in names if name not in present and name not in single]):
            notes.append(f"class {_some(absent)} has no {split} image: there are no {split} figures for it")
    return notes


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(map(repr, names[:6])) + more
