"""The run folder: the names of its files, and writes that never leave half a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racnn_cli import recipe as recipes
from racnn_cli.errors import RacnnError
from racnn_cli.recipe import Recipe

RUNS = Path("runs")
LATEST = "latest"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the system says about a write into an error that names the file."""
    try:
        yield
    except OSError as fault:
        raise RacnnError(
            f"{path} could not be written: {fault.strerror or fault}",
            "free some space, or choose another folder",
            failure=True,
        ) from fault


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` make the file, then put it in the place of `path` in one step."""
    temporary = None
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
            os.close(handle)
            temporary = Path(name)
            write(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Run:
    """One folder that holds everything that a training made."""

    folder: Path

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.toml"

    @property
    def classes_file(self) -> Path:
        return self.folder / "classes.json"

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def data(self) -> Path:
        """Fingerprint of the data and their split."""
        return self.state / "data.txt"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def eval(self) -> Path:
        return self.folder / "eval.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def onnx(self) -> Path:
        return self.folder / "model.onnx"

    @classmethod
    def create(cls, recipe: Recipe, classes: list[str], out: Path | None, *, latest: bool = True) -> Run:
        """Make the folder of a new run (`out`, or the next free `runs/NAME`) and point `runs/latest` at it.

        Raises:
            RacnnError: `out` holds something already.
        """
        folder = out or _next_free(RUNS / recipe.name)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RacnnError(
                f"{folder} is there already and not empty; nothing was overwritten",
                f"another --out, or `racnn train --resume --run {folder}` to go on with that run",
            )
        run = cls(folder)
        write_text(run.recipe_file, recipes.dump(recipe))
        write_json(run.classes_file, classes)
        run.state.mkdir(exist_ok=True)
        if latest:
            _point_latest(folder)
        return run

    @classmethod
    def open(cls, folder: Path | None) -> Run:
        """The run in `folder`, or the newest one.

        Raises:
            RacnnError: there is none.
        """
        if folder is None:
            link = RUNS / LATEST
            if not link.exists():
                raise RacnnError(
                    f"there is no run yet in {RUNS}/",
                    "`racnn train demo` or `racnn pretrain-cnn RECIPE --data FOLDER` starts one; "
                    "--run DIR names one elsewhere",
                )
            folder = link.resolve() if link.is_dir() else RUNS / link.read_text(encoding="utf-8").strip()
        if not (folder / "recipe.toml").is_file():
            raise RacnnError(
                f"{folder} is not a run folder: it has no recipe.toml",
                "--run DIR with a folder that `racnn train` made",
            )
        return cls(folder)

    def recipe(self) -> Recipe:
        """The resolved recipe of this run."""
        return recipes.load(str(self.recipe_file))

    def classes(self) -> list[str]:
        """Class names in index order."""
        try:
            names = json.loads(self.classes_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise RacnnError(
                f"{self.classes_file} cannot be read: {fault}",
                "the run folder is damaged; take it from a backup",
                failure=True,
            ) from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RacnnError(
                f"{self.classes_file} is not a list of class names",
                "the run folder is damaged; take it from a backup",
                failure=True,
            )
        return names

    def check_data(self, fingerprint: str) -> None:
        """Raise a RacnnError if the data, or what is in which split, are not what the run was started with."""
        if self.data.is_file() and self.data.read_text(encoding="utf-8").strip() != fingerprint:
            raise RacnnError(
                f"the pictures of {self.folder} have changed since it was started: files came, went or were renamed, "
                "and the split with them, so that test pictures may be ones that it was trained on",
                "put the data back as they were, or `racnn eval --data FOLDER` with pictures that it has never seen",
            )

    def append_log(self, event: dict[str, Any]) -> None:
        """Add one line to log.jsonl."""
        with _explained(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All events so far; a last line cut short by a crash is left out."""
        if not self.log.is_file():
            return []
        events = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events


def _next_free(folder: Path) -> Path:
    number, candidate = 1, folder
    while candidate.exists() or candidate.name == LATEST:
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _point_latest(folder: Path) -> None:
    """`runs/latest` becomes a link to the newest run (a text file where links are not allowed)."""
    target = os.path.relpath(folder, RUNS)
    temporary = RUNS / f".{LATEST}.{os.getpid()}"
    with _explained(RUNS / LATEST):
        RUNS.mkdir(exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(target, target_is_directory=True)
        except OSError:
            temporary.write_text(target, encoding="utf-8")
        os.replace(temporary, RUNS / LATEST)
