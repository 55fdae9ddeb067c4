"""Interrupt a training run anywhere, continue it with `--resume`, and compare it with an uninterrupted run.

    python tests/faults/campaign.py --points 200 --seed 0

A point is a seeded moment of a run: the n-th call that the package's own code makes; about half of the points are
while a file is being written. There the process is killed (SIGKILL), asked to stop (SIGTERM, SIGINT), or an exception
is raised. Now and then the resumed process is interrupted too. In the end the run must have the same files as the
uninterrupted one: weights byte for byte, log and eval.json except for their times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[number]) for number in (1, 2)]

import torch
from blobs import tiny, write_blobs
from safetensors import torch as safe

import racnn_cli
from racnn_cli import (
    api,  # noqa: F401  (imported here once, so that no child process has to)
    evaluation,  # noqa: F401
)
from racnn_cli import recipe as recipes
from racnn_cli.cli import main
from racnn_cli.data import transforms  # noqa: F401
from racnn_cli.results import report  # noqa: F401
from racnn_cli.training import stages  # noqa: F401

SOURCES = (str(Path(racnn_cli.__file__).parent), str(Path(safe.__file__).parent))
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "exception")
TIMES = ("seconds", "images_per_second")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"train__save_steps": 1},
    "2 workers": {"data__workers": 2, "train__save_steps": 3},
    "everything": {  # everything that keeps state or draws random numbers
        "train__optimizer": "sgd",
        "train__ema": 0.9,
        "train__accumulate": 2,
        "train__batch": 2,
        "train__save_steps": 1,
        "pretrain_cnn__epochs": 3,
        "pretrain_cnn__patience": 1,
        "pretrain_cnn__lr": 0.01,
        "model__dropout": 0.3,
        "alternate__jitter": 0.3,
        "model__scales": 3,
        "model__sizes": [64, 64, 64],
    },
}


class InjectedError(RuntimeError):
    """The exception that the campaign raises inside a training run."""


class Injector:
    """A profile function that counts the calls of the package's code and interrupts one of them.

    Args:
        where: `anywhere`, or `writing` to count only calls while a file is being written.
        at: the number of the call to interrupt, from 1; 0: none, only count.
        kind: one of `KINDS`.
    """

    def __init__(self, where: str = "anywhere", at: int = 0, kind: str = "SIGKILL") -> None:
        self.where, self.at, self.kind = where, at, kind
        self.counts = {"anywhere": 0, "writing": 0}
        self.depth, self.process = 0, os.getpid()
        self.own: dict[str, bool] = {}  # by file name: this runs at every call of the process

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        own = self.own.get(code.co_filename)
        if own is None:
            own = self.own[code.co_filename] = code.co_filename.startswith(SOURCES)
        if not own:
            return
        if code.co_name == "write_atomic":
            self.depth += {"call": 1, "return": -1}.get(event, 0)
        if event not in ("call", "c_call"):
            return
        if os.getpid() != self.process:  # a worker process that reads images
            return
        self.counts["anywhere"] += 1
        self.counts["writing"] += self.depth > 0
        if self.at and self.counts[self.where] == self.at and (self.where == "anywhere" or self.depth):
            self.at = 0
            if self.kind == "exception":
                sys.setprofile(None)
                raise InjectedError("raised by the campaign")
            os.kill(self.process, getattr(signal, self.kind))


def run_child(
    arguments: list[str], output: Path, injector: Injector | None = None, counts_file: Path | None = None
) -> int:
    """Run `racnn ARGUMENTS` in a child process.

    Args:
        arguments: of the command.
        output: file for what it prints.
        injector: interrupts the process.
        counts_file: file for the injector's counts, as JSON.

    Returns:
        the exit status, as a shell shows it.
    """
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
    code = 70
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["racnn", *arguments]
        if injector is not None:
            injector.process = os.getpid()
            sys.setprofile(injector)
        try:
            main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except InjectedError:
            code = 71
        finally:
            sys.setprofile(None)
        if counts_file is not None and injector is not None:
            counts_file.write_text(json.dumps(injector.counts))
    finally:
        os._exit(code)


def read_results(run: Path) -> dict[str, Any]:
    """The contents of a finished run folder, without times."""

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_times(entry) for key, entry in value.items() if key not in TIMES}
        return [without_times(entry) for entry in value] if isinstance(value, list) else value

    return {
        "weights": (run / "weights.safetensors").read_bytes(),
        "log": [without_times(json.loads(line)) for line in (run / "log.jsonl").read_text().splitlines()],
        "eval": without_times(json.loads((run / "eval.json").read_text())),
        "recipe": (run / "recipe.toml").read_text(),
        "classes": (run / "classes.json").read_text(),
        "report": (run / "report.html").is_file(),
        "temporary files": sorted(path.name for path in run.rglob(".*")),
    }


def campaign(
    points: int, seed: int, folder: Path, log: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Interrupt training at n points, spread over the cases.

    Args:
        points: how many.
        seed: of their choice.
        folder: for the data and the runs.
        log: called with each result as a line of JSON.

    Returns:
        one entry per point: `case`, `where`, `kind`, `at`, `of`, `status` (of the interrupted process), `again`
        (whether the resumed process was interrupted too), `survived` (the run could be finished), `identical`,
        `differs` (what is not identical).
    """
    torch.set_num_threads(1)
    data = write_blobs(folder / "data", {"train": 4, "val": 2, "test": 2})
    draw, results = random.Random(seed), []
    for number, (case, keys) in enumerate(CASES.items()):
        short = {"train__batch": 4, "pretrain_apn__epochs": 1, "fusion__epochs": 1}
        recipe = tiny(data, **short | keys)
        file = folder / f"case-{number}.toml"
        file.write_text(recipes.dump(recipe))
        uninterrupted = folder / f"uninterrupted-{number}"
        output, counts_file = folder / "output.txt", folder / "counts.json"
        if run_child(["train", str(file), "--out", str(uninterrupted)], output, Injector(), counts_file):
            raise RuntimeError(output.read_text())
        counts, expected = json.loads(counts_file.read_text()), read_results(uninterrupted)
        for _ in range(points // len(CASES) + (number < points % len(CASES))):
            results.append(
                try_point(
                    draw,
                    case=case,
                    file=file,
                    run=folder / "interrupted",
                    output=output,
                    counts=counts,
                    expected=expected,
                )
            )
            log(json.dumps(results[-1]))
    return results


def try_point(
    draw: random.Random,
    *,
    case: str,
    file: Path,
    run: Path,
    output: Path,
    counts: dict[str, int],
    expected: dict[str, Any],
) -> dict[str, Any]:
    """Interrupt a run at one random point, resume it until it is finished, and compare it with `expected`."""
    shutil.rmtree(run, ignore_errors=True)
    where, kind = draw.choice(list(counts)), draw.choice(KINDS)
    entry: dict[str, Any] = {"case": case, "where": where, "kind": kind, "of": counts[where]}
    entry["at"] = draw.randint(1, counts[where])
    injectors = [Injector(where, entry["at"], kind)]
    entry["again"] = draw.random() < 0.25
    if entry["again"]:
        injectors.append(Injector("anywhere", draw.randint(1, counts["anywhere"]), draw.choice(KINDS)))

    def command() -> list[str]:
        exists = (run / "recipe.toml").is_file()
        return ["train", "--resume", "--run", str(run)] if exists else ["train", str(file), "--out", str(run)]

    statuses = [run_child(command(), output, injector) for injector in injectors]
    entry["status"] = statuses[0]
    entry["survived"] = run_child(command(), output) == 0
    entry["identical"], entry["differs"] = False, []
    if entry["survived"]:
        results = read_results(run)
        entry["differs"] = [name for name in expected if results[name] != expected[name]]
        entry["identical"] = not entry["differs"]
        if "log" in entry["differs"]:
            pairs = zip(results["log"], expected["log"], strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), None)
            entry["lines"] = [len(results["log"]), len(expected["log"]), first]
    else:
        entry["output"] = output.read_text()[-2000:]
    return entry


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """One line per case and kind: points tried, survived, bit-identical."""
    yield f"{'case':12} {'kind':10} {'points':>6} {'survived':>8} {'identical':>9}"
    keys = [(case, kind) for case in CASES for kind in KINDS]
    for key in [*keys, None]:
        entries = [entry for entry in results if key in (None, (entry["case"], entry["kind"]))]
        name = key or ("all", "")
        counts = Counter()
        for entry in entries:
            counts.update(survived=entry["survived"], identical=entry["identical"])
        if entries:
            yield f"{name[0]:12} {name[1]:10} {len(entries):6} {counts['survived']:8} {counts['identical']:9}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        entries = campaign(options.points, options.seed, Path(temporary), lambda line: print(line, file=sys.stderr))
    print("\n".join(table(entries)))
    print(f"seed {options.seed}, {(time.monotonic() - start) / 60:.0f} minutes")
    sys.exit(any(not entry["identical"] for entry in entries))
