"""The run folder: its files, its lock, and atomic writes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from racnn_cli import recipe as recipes
from racnn_cli.errors import RunError, escape_control
from racnn_cli.events import AnyEvent, Budget, ChoiceEvent, EpochEvent, EvalResult, Event, read_line
from racnn_cli.recipe import Recipe

RUNS = Path("runs")
LATEST = "latest"


def printable(name: str) -> str:
    """Return a class name unchanged.

    Raises:
        ValueError: it contains control characters, which could control a terminal or split a line.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise ValueError(f"the class name {name!r} contains control characters")
    return name


ClassNames = Annotated[list[Annotated[str, AfterValidator(printable)]], Field(min_length=1)]
"""Class names in index order, safe to print."""

PARTIAL = ".racnn-"  # prefix of files and folders that are being written


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Raise a RunError that names the file when a write fails."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror or error}",
            "free some space, or choose another folder",
            failure=True,
        ) from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file through `write(temporary)`, then replace `path` with it in one step.

    Raises:
        RunError: the file cannot be written.
    """
    with _translate_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PARTIAL}{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)  # so that the name survives a power failure
        finally:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # folders cannot be opened on this system
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step.

    Raises:
        RunError: it cannot be written, or the text contains a file name that is not UTF-8.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise RunError(
            f"{path} would contain a name that is not UTF-8: {text[error.start - 20 : error.end]!r}",
            "rename that file or folder",
        ) from None
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def refuse_link(path: Path) -> None:
    """Raise a RunError if `path` is a link: training must not write to the link's target."""
    if path.is_symlink():
        raise RunError(
            f"{path} is a link, and training would write to its target",
            "replace it with the file or folder itself; only the run folder as a whole may be a link",
        )


class _Member:
    """A path inside the run folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: Run, _: type[Run]) -> Path:
        return run.folder / self.name


@dataclass(frozen=True)
class Run:
    """The folder of one training run."""

    folder: Path

    recipe_file = _Member("recipe.toml")
    classes_file = _Member("classes.json")
    weights = _Member("weights.safetensors")
    state = _Member("state")
    data = _Member("state/data.txt")  # fingerprint of the data and the split
    log = _Member("log.jsonl")
    eval = _Member("eval.json")
    budget = _Member("budget.json")
    report = _Member("report.html")
    onnx = _Member("model.onnx")

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        classes: list[str],
        out: Path | None,
        *,
        fingerprint: str = "",
        contents: Mapping[str, bytes] | None = None,
        latest: bool = True,
    ) -> Run:
        """Create a run folder in one step, complete with its recipe and class names.

        Args:
            recipe: the resolved recipe.
            classes: class names in index order.
            out: the folder, new or empty; None: the next free `runs/NAME`.
            fingerprint: of the data and the split.
            contents: hashes of the images of splits, as in `Index.contents`.
            latest: point `runs/latest` to the folder.

        Raises:
            RunError: `out` is not empty, or the folder cannot be written.
        """
        if out and out.is_dir():
            out = out.resolve() if out.is_symlink() else out
            if out.resolve() in (Path.cwd(), *Path.cwd().parents):
                raise RunError(f"--out {out} is the current folder or one of its parents", "--out with a new folder")
        while True:
            folder = out or _next_free(RUNS / recipe.name)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise RunError(
                    f"{folder} already exists and is not empty; nothing was overwritten",
                    f"another --out, or `racnn train --resume --run {folder}` to continue that run",
                )
            with _translate_errors(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{PARTIAL}{folder.name}."))
                try:
                    partial.chmod(0o777 & ~_umask())
                    run = cls(partial)
                    write_text(run.recipe_file, recipes.dump(recipe))
                    write_json(run.classes_file, classes)
                    run.state.mkdir()
                    if fingerprint:
                        write_text(run.data, fingerprint)
                    for split, hashes in (contents or {}).items():
                        (run.state / f"{split}.hashes").write_bytes(hashes)
                    if folder.is_dir():
                        folder.rmdir()
                    try:
                        partial.rename(folder)
                    except OSError:
                        if folder.exists():  # another process created it first
                            continue
                        raise
                    _sync(folder.parent)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            if latest:
                _point_latest(folder)
            return cls(folder)

    @classmethod
    def open(cls, folder: Path | None) -> Run:
        """Open the run in `folder`, or the newest run if `folder` is None.

        Raises:
            RunError: there is no such run.
        """
        if folder is None:
            link = RUNS / LATEST
            if link.is_symlink() and not link.exists():
                runs = sorted(str(path.parent) for path in RUNS.glob("*/recipe.toml"))
                raise RunError(
                    f"{link} points to {os.readlink(link)}, which no longer exists",
                    "--run DIR" + (f" with one of {', '.join(runs)}" if runs else ""),
                )
            if not link.exists():
                raise RunError(
                    f"no run yet in {RUNS}/",
                    "`racnn train demo` or `racnn pretrain-cnn RECIPE --data FOLDER` starts one; "
                    "--run DIR opens a run in another folder",
                )
            folder = link.resolve() if link.is_dir() else RUNS / _pointed_at(link)
        if not (folder / "recipe.toml").is_file():
            raise RunError(
                f"{folder} is not a run folder: it has no recipe.toml",
                "--run DIR with a folder that `racnn train` wrote",
            )
        return cls(folder)

    def recipe(self) -> Recipe:
        """The run's recipe, resolved.

        Raises:
            RecipeError: recipe.toml is damaged.
        """
        return recipes.load(str(self.recipe_file))

    def classes(self) -> list[str]:
        """Class names in index order.

        Raises:
            RunError: classes.json is missing or damaged.
        """
        hint = "the run folder is damaged; restore it from a backup"
        try:
            if self.classes_file.exists() and not self.classes_file.is_file():
                raise ValueError("a device or a pipe, which may be endless")
            return TypeAdapter(ClassNames).validate_json(self.classes_file.read_bytes())
        except OSError as error:
            raise RunError(f"{self.classes_file} cannot be read: {error}", hint, failure=True) from None
        except ValueError:
            raise RunError(f"{self.classes_file} is not a list of class names", hint, failure=True) from None

    def contents(self) -> dict[str, bytes]:
        """Hashes of the images of the run's splits, as in `Index.contents`; without those that are not known."""
        files = {split: self.state / f"{split}.hashes" for split in ("train", "val")}
        return {split: file.read_bytes() for split, file in files.items() if file.is_file()}

    def check_data(self, fingerprint: str) -> None:
        """Raise a RunError if the images or their split have changed since the run was started."""
        if self.data.is_file() and self.data.read_text(encoding="utf-8", errors="replace").strip() != fingerprint:
            raise RunError(
                f"the images of {self.folder} have changed since the run was started: files were added, removed or "
                "renamed. The split has changed with them, so the test split may contain training images",
                "restore the data, or use `racnn eval --data FOLDER` with images that the run was not trained on",
            )

    def lock(self) -> FileLock:
        """Lock the folder until the lock is released or the process ends.

        Raises:
            RunError: another process has locked it, or training would write through a link or to a pipe. A run folder
                from someone else must not make training write elsewhere.
        """
        for path in (self.state, self.log, self.state / "lock"):
            refuse_link(path)
            if path.exists() and not (path.is_dir() if path == self.state else path.is_file()):
                kind = "folder" if path == self.state else "regular file"
                raise RunError(
                    f"{path} is not a {kind}, and training writes there",
                    "move it away, or restore the run folder from a backup",
                )
        lock = FileLock(self.state / "lock", timeout=0, is_singleton=True)
        with _translate_errors(self.state):
            self.state.mkdir(exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise RunError(
                    f"another process is training in {self.folder}",
                    "wait for it, stop it, or start another run with --out DIR",
                ) from None
        return lock

    def append_log(self, event: Event) -> None:
        """Append an event to log.jsonl."""
        with _translate_errors(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event.to_json()) + "\n")

    def sync_log(self) -> int:
        """Flush log.jsonl to disk and return its size in bytes."""
        if not self.log.is_file():
            return 0
        with _translate_errors(self.log):
            _sync(self.log)
        return self.log.stat().st_size

    def cut_log(self, size: int) -> None:
        """Truncate log.jsonl to `size` bytes: the steps after that will be repeated."""
        if self.log.is_file() and self.log.stat().st_size > size:
            with _translate_errors(self.log):
                os.truncate(self.log, size)

    def sweep(self) -> None:
        """Delete partial files that a killed process left behind."""
        for folder in (self.folder, self.state):
            for file in folder.glob(f"{PARTIAL}*"):
                if file.is_file():
                    file.unlink(missing_ok=True)

    def read_log(self) -> list[AnyEvent]:
        """All events so far, without damaged lines, such as one cut short by a crash."""
        if not self.log.is_file():
            return []
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [event for line in lines if (event := read_line(line)) is not None]

    def epochs(self) -> list[EpochEvent]:
        """All epoch events so far."""
        return [event for event in self.read_log() if isinstance(event, EpochEvent)]

    def choices(self) -> list[ChoiceEvent]:
        """Which epochs and which round were kept."""
        return [event for event in self.read_log() if isinstance(event, ChoiceEvent)]

    def read_budget(self) -> Budget | None:
        """What the run that this one is the baseline of, and this one, cost; None if it is not known.

        Raises:
            RunError: the file is damaged.
        """
        if not self.budget.is_file():
            return None
        try:
            return Budget.model_validate_json(self.budget.read_bytes())
        except (OSError, ValidationError):
            raise RunError(f"{self.budget} is damaged", "delete it: eval works without it", failure=True) from None

    def read_eval(self) -> EvalResult:
        """The contents of eval.json.

        Raises:
            RunError: it is missing or damaged.
        """
        hint = f"`racnn eval --run {self.folder}` writes it"
        try:
            if self.eval.exists() and not self.eval.is_file():
                raise ValueError("it is a device or a pipe")
            return EvalResult.model_validate(json.loads(self.eval.read_text(encoding="utf-8")))
        except OSError:
            raise RunError(f"{self.eval} does not exist", hint) from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            problem = escape_control(f"{key}: {first['msg']}" if key else first["msg"])
            raise RunError(f"{self.eval} is damaged: {problem}", hint) from None
        except (ValueError, RecursionError) as error:
            raise RunError(f"{self.eval} is damaged: {error}", hint) from None


def _next_free(folder: Path) -> Path:
    number, candidate = 1, folder
    while candidate.exists() or candidate.name == LATEST:
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _pointed_at(file: Path) -> str:
    """The run that `runs/latest` names as a text file."""
    try:
        if not file.is_file() or file.stat().st_size > 4096:
            raise ValueError("not a short text file")
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise RunError(f"{file} does not name a run: {error}", "--run DIR") from None


def _point_latest(folder: Path) -> None:
    """Make `runs/latest` a link to the newest run, or a text file where links are not allowed."""
    target = os.path.relpath(folder, RUNS)
    temporary = RUNS / f".{LATEST}.{os.getpid()}"
    with _translate_errors(RUNS / LATEST):
        RUNS.mkdir(exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(target, target_is_directory=True)
        except OSError:
            temporary.write_text(target, encoding="utf-8")
        os.replace(temporary, RUNS / LATEST)
