"""Tell from the names of folders, and from what they hold, which folders are splits and which are classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from racnn_cli.data.decode import show
from racnn_cli.data.walk import Walker, is_image_name
from racnn_cli.errors import DataError

EVAL = "eval"
"""A split that is `val`, or `test` beside a folder that means `val`."""
_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "development": "val",
    "test": "test",
    "testing": "test",
    "eval": EVAL,
    "evaluation": EVAL,
}
_SUFFIX = re.compile(r"(?:set|data|images?|imgs?|split|folder|dir)$")


@lru_cache(maxsize=4096)
def split_meaning(name: str) -> str:
    """The split that a name means, such as `train` for `Training`, `cub_train` and `train-set`; empty if none.

    A name with words of two splits, such as `train_val`, means none.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = [word for word in re.split(r"[\W_\d]+", spaced.casefold()) if word]
    meanings = {_WORDS.get(word) or _WORDS.get(_SUFFIX.sub("", word), "") for word in words} - {""}
    return meanings.pop() if len(meanings) == 1 else ""


def settle_eval(meanings: Iterable[str]) -> dict[str, str]:
    """Map the meanings in use to split names: `eval` is `test` beside a `val` that lacks a `test`, else `val`."""
    meanings = set(meanings)
    is_test = "val" in meanings and "test" not in meanings
    return {meaning: ("test" if is_test else "val") if meaning == EVAL else meaning for meaning in meanings}


def enter(folder: Path, walker: Walker) -> Path:
    """The folder itself, or the one inside it that holds the class folders, if the way there has no other folders.

    Unpacked archives often have such a folder. Adds a note if it is entered.
    """
    inner = folder
    while True:
        folders, files = Walker().entries(inner)
        if any(map(is_image_name, files)):
            return folder
        if len(folders) != 1:
            break
        inner = folders[0]
    if inner == folder or sum(map(_has_image, folders)) < 2:
        return folder
    walker.notes.append(f"the classes are read from {show(inner)}, the only folder with images in {show(folder)}")
    return inner


def find_splits(folders: Sequence[Path], walker: Walker) -> dict[str, list[Path]]:
    """Find the folders that are splits.

    Args:
        folders: in the data set's folder.
        walker: takes notes on what is ignored or has an unusual name.

    Returns:
        Split name to its folders; empty if the folders are classes.

    Raises:
        DataError: the names mean splits, but what the folders hold leaves doubt.
    """
    meaning = {folder: split_meaning(folder.name) for folder in folders}
    named = [folder for folder in folders if meaning[folder]]
    with_classes = [folder for folder in named if any(map(_has_image, Walker().entries(folder)[0]))]
    flat = [folder for folder in named if folder not in with_classes and _has_direct_image(folder)]
    others = [folder for folder in folders if not meaning[folder]]
    if not named:
        return {}
    if not with_classes:
        if flat and others:
            walker.notes += [f"the folder {show(folder)} is a class: it holds images directly" for folder in flat]
        elif flat and len(named) > 1:
            raise _doubt(folders, "their names mean splits, but they hold images directly and no folder per class")
        return {} if flat or others else _by_split(named, meaning)
    doubtful = [folder for folder in others if _has_direct_image(folder)]
    if doubtful and len(with_classes) == 1:
        raise _doubt(
            [*with_classes, *doubtful],
            f"{_list(with_classes)} would be a split by its name, and {_list(doubtful)} a class by what it holds",
        )
    for folder in others:
        images = sum(1 for _ in Walker().images(folder))
        walker.notes.append(
            f"the folder {show(folder)} is ignored: it is not one of train, val and test (it holds {images} images)"
        )
    splits = _by_split(named, meaning)
    walker.notes += [
        f"the folder {show(folder)} is used as {split}"
        for split, members in splits.items()
        for folder in members
        if folder.name.casefold() != split
    ]
    return splits


def find_inner_splits(classes: dict[str, Sequence[str]]) -> bool:
    """Whether every class folder holds its images in folders that mean splits.

    Args:
        classes: path of a class folder to the names of its folders with images; an empty name stands for images that
            lie in it directly.

    Raises:
        DataError: some images lie in such folders and others do not.
    """
    inner = {
        folder: {name for name in names if name and split_meaning(name)} for folder, names in classes.items() if names
    }
    if not any(inner.values()):
        return False
    if all(set(classes[folder]) == names for folder, names in inner.items()):
        return True
    # Those with splits and more first, then one of each other kind.
    mixed = [folder for folder, names in inner.items() if names and set(classes[folder]) != names][:4]
    clear = [folder for folder, names in inner.items() if names and set(classes[folder]) == names][:1]
    plain = [folder for folder, names in inner.items() if not names][:1]
    raise DataError(
        "some class folders hold folders that mean splits, and others do not or hold more: "
        + "; ".join(f"{show(folder)} holds {_names(classes[folder])}" for folder in [*mixed, *clear, *plain]),
        "give every class the same train, val and test folders, or rename them if they do not mean splits",
    )


def _names(names: Sequence[str]) -> str:
    return ", ".join(show(name) if name else "images" for name in sorted(names))


def _by_split(folders: Iterable[Path], meaning: dict[Path, str]) -> dict[str, list[Path]]:
    folders = list(folders)
    names = settle_eval(meaning[folder] for folder in folders)
    splits: dict[str, list[Path]] = {}
    for folder in folders:
        splits.setdefault(names[meaning[folder]], []).append(folder)
    for split, members in splits.items():
        if len(members) > 1:
            raise DataError(
                f"{show(members[0])} and {show(members[1])} are both the {split} split", "merge them, or rename one"
            )
    return splits


def _doubt(folders: Sequence[Path], reason: str) -> DataError:
    return DataError(
        f"it is not clear which folders are splits and which are classes: {reason}. The folders are {_list(folders)}",
        "use train, val and test folders that hold one folder per class, or only class folders, and rename the others",
    )


def _list(folders: Sequence[Path]) -> str:
    more = f" and {len(folders) - 8} more" if len(folders) > 8 else ""
    return ", ".join(show(folder) for folder in folders[:8]) + more


def _has_image(folder: Path) -> bool:
    return next(iter(Walker().images(folder)), None) is not None


def _has_direct_image(folder: Path) -> bool:
    return any(map(is_image_name, Walker().entries(folder)[1]))
