"""The run folder: the names of its files, and writes that never leave half a file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from racnn_cli import recipe as recipes
from racnn_cli.errors import RunError, escape_control
from racnn_cli.events import AnyEvent, EpochEvent, EvalResult, Event, read_line
from racnn_cli.recipe import Recipe

RUNS = Path("runs")
LATEST = "latest"


def printable(name: str) -> str:
    """A class name as it is, or a ValueError: control characters could do things to a terminal or split a line."""
    if any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in name):
        raise ValueError(f"the class name {name!r} holds control characters")
    return name


ClassNames = Annotated[list[Annotated[str, AfterValidator(printable)]], Field(min_length=1)]
"""In index order, and safe to print."""


HALF = ".racnn-"  # how the name of a half-written file starts


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about a write into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path} could not be written: {error.strerror or error}",
        "free some space, or choose another folder",
        failure=True,
    )


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` make the file, then put it instead of `path` in one step."""
    temporary = None
    try:
        with _translate_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{HALF}{path.name}.", suffix=path.suffix)
            os.close(handle)
            temporary = Path(name)
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)  # the name, too, outlives a power cut
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync(path: Path) -> None:
    """Let the system put a file, or the names in a folder, on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # no such thing on this system
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step.

    Raises:
        RunError: it cannot be written, or holds the name of a file that is no text in UTF-8.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise RunError(
            f"{path} would hold a name that is not UTF-8: {text[error.start - 20 : error.end]!r}",
            "rename that file or folder",
        ) from None
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def refuse_link(path: Path) -> None:
    """Raise a RunError if training would write to what a link points to."""
    if path.is_symlink():
        raise RunError(
            f"{path} is a link, and training would write to what it points to",
            "put the file or folder itself there; a whole run folder may be a link",
        )


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
    def create(
        cls,
        recipe: Recipe,
        classes: list[str],
        out: Path | None,
        *,
        fingerprint: str = "",
        latest: bool = True,
    ) -> Run:
        """Make the folder of a new run (`out`, or the next free `runs/NAME`) and point `runs/latest` at it.

        The folder is there with all that it needs, or not at all.

        Args:
            recipe, classes: of the run.
            out: the folder; it may be there if it is empty.
            fingerprint: of the data and their split.
            latest: point `runs/latest` at it.

        Raises:
            RunError: `out` holds something already.
        """
        if out and out.is_dir():
            out = out.resolve() if out.is_symlink() else out
            if out.resolve() in (Path.cwd(), *Path.cwd().parents):
                raise RunError(
                    f"--out {out} is the folder where you stand, or lies above it", "--out NAME, a new folder"
                )
        while True:
            folder = out or _next_free(RUNS / recipe.name)
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise RunError(
                    f"{folder} is there already and not empty; nothing was overwritten",
                    f"another --out, or `racnn train --resume --run {folder}` to continue with that run",
                )
            with _translate_errors(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                half = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{HALF}{folder.name}."))
                try:
                    half.chmod(0o777 & ~_umask())
                    run = cls(half)
                    write_text(run.recipe_file, recipes.dump(recipe))
                    write_json(run.classes_file, classes)
                    run.state.mkdir()
                    if fingerprint:
                        write_text(run.data, fingerprint)
                    if folder.is_dir():
                        folder.rmdir()
                    try:
                        half.rename(folder)
                    except OSError:
                        if folder.exists():  # another process was faster
                            continue
                        raise
                    _sync(folder.parent)
                finally:
                    shutil.rmtree(half, ignore_errors=True)
            if latest:
                _point_latest(folder)
            return cls(folder)

    @classmethod
    def open(cls, folder: Path | None) -> Run:
        """The run in `folder`, or the newest one.

        Raises:
            RunError: there is none.
        """
        if folder is None:
            link = RUNS / LATEST
            if link.is_symlink() and not link.exists():
                there = sorted(path.parent.name for path in RUNS.glob("*/recipe.toml"))
                raise RunError(
                    f"{link} points to {os.readlink(link)}, which is not there any more",
                    "--run DIR"
                    + (f" with one of {', '.join(f'{RUNS}/{name}' for name in there)}" if there else ""),
                )
            if not link.exists():
                raise RunError(
                    f"there is no run yet in {RUNS}/",
                    "`racnn train demo` or `racnn pretrain-cnn RECIPE --data FOLDER` starts one; "
                    "--run DIR names one elsewhere",
                )
            folder = link.resolve() if link.is_dir() else RUNS / _pointed_at(link)
        if not (folder / "recipe.toml").is_file():
            raise RunError(
                f"{folder} is not a run folder: it has no recipe.toml",
                "--run DIR with a folder that `racnn train` made",
            )
        return cls(folder)

    def recipe(self) -> Recipe:
        """The resolved recipe of this run."""
        return recipes.load(str(self.recipe_file))

    def classes(self) -> list[str]:
        """Class names in index order."""
        hint = "the run folder is damaged; take it from a backup"
        try:
            if self.classes_file.exists() and not self.classes_file.is_file():
                raise ValueError("a device or a pipe, which may have no end")
            return TypeAdapter(ClassNames).validate_json(self.classes_file.read_bytes())
        except OSError as error:
            raise RunError(f"{self.classes_file} cannot be read: {error}", hint, failure=True) from None
        except ValueError:
            raise RunError(f"{self.classes_file} is not a list of class names", hint, failure=True) from None

    def check_data(self, fingerprint: str) -> None:
        """Raise a RunError if the data, or what is in which split, are not what the run was started with."""
        if not self.data.is_file():
            return
        if self.data.read_text(encoding="utf-8", errors="replace").strip() != fingerprint:
            raise RunError(
                f"the images of {self.folder} have changed since it was started: files came, went or were renamed, "
                "and the split with them, so that test images may be ones that it was trained on",
                "put the data back as they were, or `racnn eval --data FOLDER` with images that it has never seen",
            )

    def lock(self) -> FileLock:
        """Hold the folder for this process, until the lock is released or the process ends, however it ends.

        Raises:
            RunError: another process holds it, or a file in it that training writes to is a link or a pipe: what a
                run folder that somebody else packed points to is not for us to change.
        """
        for path in (self.state, self.log, self.state / "lock"):
            refuse_link(path)
            if path.exists() and not (path.is_dir() if path == self.state else path.is_file()):
                raise RunError(
                    f"{path} is no {'folder' if path == self.state else 'regular file'}, and training writes there",
                    "move it away, or take the run folder from a backup",
                )
        lock = FileLock(self.state / "lock", timeout=0, is_singleton=True)
        try:
            self.state.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunError(
                f"another process is training in {self.folder}",
                "wait for it or stop it, or start a run of its own with --out DIR",
            ) from None
        except OSError as error:
            raise _unwritable(self.state, error) from error
        return lock

    def append_log(self, event: Event) -> None:
        """Add one line to log.jsonl."""
        with _translate_errors(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event.to_json()) + "\n")

    def sync_log(self) -> int:
        """Put log.jsonl on the disk; returns its bytes."""
        if not self.log.is_file():
            return 0
        with _translate_errors(self.log):
            _sync(self.log)
        return self.log.stat().st_size

    def cut_log(self, size: int) -> None:
        """Forget all events after the first `size` bytes: they are of steps that will be made again."""
        if self.log.is_file() and self.log.stat().st_size > size:
            with _translate_errors(self.log):
                os.truncate(self.log, size)

    def sweep(self) -> None:
        """Delete half-written files that a killed process left."""
        for folder in (self.folder, self.state):
            for file in folder.glob(f"{HALF}*"):
                if file.is_file():
                    file.unlink(missing_ok=True)

    def read_log(self) -> list[AnyEvent]:
        """All events so far; a line that is damaged, such as one cut short by a crash, is left out."""
        if not self.log.is_file():
            return []
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [event for line in lines if (event := read_line(line)) is not None]

    def epochs(self) -> list[EpochEvent]:
        """The epochs that the log tells of."""
        return [event for event in self.read_log() if isinstance(event, EpochEvent)]

    def read_eval(self) -> EvalResult:
        """eval.json.

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
            where = ".".join(map(str, first["loc"])) or "it"
            problem = escape_control(f"{where}: {first['msg']}")
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
    """What `runs/latest` says where it is no link."""
    try:
        if not file.is_file() or file.stat().st_size > 4096:
            raise ValueError("not a short text file")
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise RunError(f"{file} does not name a run: {error}", "name the run with --run DIR") from None


def _point_latest(folder: Path) -> None:
    """`runs/latest` becomes a link to the newest run (a text file where links are not allowed)."""
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
