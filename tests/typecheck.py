"""Type-check the package with mypy: `python tests/typecheck.py [mypy options]`.

`backbones/` and `recipes/` are in the repository root but are imported from `racnn_cli`, which mypy does not follow. So
this runs mypy on a temporary folder of links that has the layout of the installed package.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_package(folder: Path) -> None:
    """Link the package as a wheel installs it into `folder`."""
    package = folder / "racnn_cli"
    package.mkdir()
    parts = [path for path in (ROOT / "racnn_cli").iterdir() if path.name != "__pycache__"]
    for path in (*parts, ROOT / "backbones", ROOT / "recipes"):
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
