"""The one rule for walking a folder, shared by training, prediction, evaluation and the check of exported files.

Links are followed, each folder once. Hidden files and the system folders of desktops, notebooks and network disks are
skipped. Every file with an image's suffix is listed, also if it cannot be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from racnn_cli.data.decode import OTHER_SUFFIXES, SUFFIXES, show

SYSTEM_NAMES = {
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "found.000",
    "__macosx",
    "lost+found",
    "lost.dir",
    "@eadir",
    "#recycle",
    "@recycle",
    "#snapshot",
    "@recently-snapshot",
    "__pycache__",
}
"""Names in lower case that Windows, macOS, Linux, Android, Synology and QNAP give to files that are not the user's."""


@dataclass
class Walker:
    """Lists folders and records what could not be read or was not followed.

    Attributes:
        errors: folders that cannot be read, one sentence each.
        notes: what was ignored, one sentence each.
    """

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The folders and the files in a folder, each sorted by name, without hidden and system ones."""
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(folder) as members:
                for entry in members:
                    if not entry.name.startswith(".") and entry.name.casefold() not in SYSTEM_NAMES:
                        (folders if _is_folder(entry) else files).append(entry.name)
        except OSError as error:
            self.errors.append(f"the folder {show(folder)} cannot be read: {error.strerror}")
        return [folder / name for name in sorted(folders)], [folder / name for name in sorted(files)]

    def files(self, folder: Path) -> Iterator[Path]:
        """Yield every file in a folder and its subfolders."""
        parents = {_identity(parent): parent for parent in folder.absolute().parents}
        yield from self._files(folder, parents)

    def images(self, folder: Path) -> Iterator[Path]:
        """Yield every file with an image's suffix, supported or not, in a folder and its subfolders."""
        return (file for file in self.files(folder) if is_image_name(file))

    def _files(self, folder: Path, visited: dict[tuple[int, int], Path]) -> Iterator[Path]:
        identity = _identity(folder)
        if identity in visited:
            self.notes.append(f"{show(folder)} links to {show(visited[identity])}, which is listed once only")
            return
        visited[identity] = folder
        folders, files = self.entries(folder)
        yield from files
        for subfolder in folders:
            yield from self._files(subfolder, visited)


def is_image_name(path: Path) -> bool:
    """Whether a name has the suffix of an image, supported or not."""
    suffix = path.suffix.casefold()
    return suffix in SUFFIXES or suffix in OTHER_SUFFIXES


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False
