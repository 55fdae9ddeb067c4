"""Type-check the package with mypy: `python tests/typecheck.py [mypy options]`.

`backbones/` and `recipes/` are in the repository root but belong to the package `racnn_cli`, which mypy does not know.
This script runs mypy on a temporary folder of links with the layout of the installed package.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_package(folder: Path) -> None:
    """Make links in `folder` to all parts of the package, as a wheel installs it."""
    package = folder / "racnn_cli"
    package.mkdir()
    paths = [path for path in (ROOT / "racnn_cli").iterdir() if path.name != "__pycache__"]
    for path in (*paths, ROOT / "backbones", ROOT / "recipes"):
        (package / path.name).symlink_to(path)


def main() -> int:
    """Run mypy; returns its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        link_package(Path(folder))
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
