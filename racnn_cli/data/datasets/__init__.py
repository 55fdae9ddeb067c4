"""The built-in data sets: made or fetched once, kept in the cache, then read like any other data."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from racnn_cli import fetch, recipe
from racnn_cli.errors import RacnnError

NAMES = ("plankton", "fieldguide")


def materialise(name: str, sample: recipe.Sample, seed: int) -> Path:
    """Where a built-in set lies; the first call makes it.

    Args:
        name: one of `NAMES`.
        sample: for `fieldguide`: how many images, of which side.
        seed: for `fieldguide`: of the drawing.

    Returns:
        For `plankton` a folder with one folder a class, for `fieldguide` a CSV file with boxes.

    Raises:
        RacnnError: the images cannot be fetched or written.
    """
    if name == "plankton":
        from racnn_cli.data.datasets import plankton

        return once(fetch.cache() / f"plankton-{plankton.VERSION}", plankton.write)

    from racnn_cli.data.datasets import fieldguide

    # The drawing code is a part of the name: after a change of it, old images are not taken for new ones.
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    folder = fetch.cache() / f"fieldguide-{sample.images}-{sample.size}-{seed}-{zlib.crc32(code):08x}"

    def draw(place: Path) -> None:
        fieldguide.write(place, images=sample.images, size=sample.size, seed=seed)

    return once(folder, draw) / "labels.csv"


def write(name: str, out: Path, sample: recipe.Sample, seed: int) -> Path:
    """A copy of a built-in set in a folder of one's own; the arguments and the result are those of `materialise`.

    Raises:
        RacnnError: no such set, `out` holds something already, or the images cannot be fetched or written.
    """
    if name not in NAMES:
        raise RacnnError(f"there is no built-in set {name!r}", f"one of {', '.join(NAMES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RacnnError(f"{out} is there already and not empty; nothing was overwritten", "another --out")
    made = materialise(name, sample, seed)
    try:
        shutil.copytree(made if made.is_dir() else made.parent, out, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise RacnnError(f"{out} could not be written: {error}", "another --out", failure=True) from error
    return out if made.is_dir() else out / made.name


def once(folder: Path, fill: Callable[[Path], object]) -> Path:
    """A folder of the cache that `fill` has filled, whole or not at all, by whichever process comes first."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        fill(temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first: its copy is the same
                raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unwritable(folder: Path, error: OSError) -> RacnnError:
    return RacnnError(
        f"{folder} could not be written: {error.strerror or error}",
        "free some space, or name another cache folder in the environment variable RACNN_CACHE",
        failure=True,
    )
