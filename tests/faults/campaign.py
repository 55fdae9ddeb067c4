"""Kill a training anywhere, continue with `--resume`, and compare with a training that was left in peace.

    python tests/faults/campaign.py --points 200 --seed 0

A point is a seeded moment of a run: the n-th call made by the toolkit's own code, half of the points while a file is
being written. There the process is killed (SIGKILL), told to stop (SIGTERM, SIGINT), or an exception is thrown; now
and then its continuation meets the same. In the end everything that training leaves must be what it would have been:
weights byte for byte, log and eval.json but for their times.
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
    api,  # noqa: F401  (everything that a child needs is imported once)
    evaluation,  # noqa: F401
)
from racnn_cli import recipe as recipes
from racnn_cli.cli import main
from racnn_cli.results import report  # noqa: F401

OURS = (str(Path(racnn_cli.__file__).parent), str(Path(safe.__file__).parent))
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "exception")
TIMES = ("seconds", "images_per_second")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"train__save_steps": 1},
    "2 workers": {"data__workers": 2, "train__save_steps": 3},
    "everything": {  # all that has a state or draws random numbers
        "train__optimizer": "sgd",
        "train__ema": 0.9,
        "train__accumulate": 2,
        "train__batch": 2,
        "train__save_steps": 1,
        "pretrain_cnn__epochs": 4,
        "pretrain_cnn__patience": 1,
        "pretrain_cnn__lr": 0.01,
        "model__dropout": 0.3,
        "alternate__jitter": 0.3,
        "model__scales": 3,
        "model__sizes": [64, 64, 64],
    },
}


class Thrown(RuntimeError):
    """What is thrown into a training that must not die of it."""


class Injector:
    """Counts the calls that the toolkit's code makes, and strikes at one of them.

    Args:
        where: `anywhere`, or `writing`: only calls while a file is being written count.
        at: the number of the call, from 1; 0: never, only count.
        kind: one of `KINDS`.
    """

    def __init__(self, where: str = "anywhere", at: int = 0, kind: str = "SIGKILL") -> None:
        self.where, self.at, self.kind = where, at, kind
        self.counts = {"anywhere": 0, "writing": 0}
        self.depth, self.process = 0, os.getpid()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if code.co_name == "write_atomic":
            self.depth += {"call": 1, "return": -1}.get(event, 0)
        if event not in ("call", "c_call") or not code.co_filename.startswith(OURS):
            return
        if os.getpid() != self.process:  # a worker that reads images
            return
        self.counts["anywhere"] += 1
        self.counts["writing"] += self.depth > 0
        if self.at and self.counts[self.where] == self.at and (self.where == "anywhere" or self.depth):
            self.at = 0
            if self.kind == "exception":
                sys.setprofile(None)
                raise Thrown("thrown by the campaign")
            os.kill(self.process, getattr(signal, self.kind))


def child(words: list[str], said: Path, injector: Injector | None = None, told: Path | None = None) -> int:
    """`racnn WORDS` in a process of its own; returns its exit status, as a shell shows it."""
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
    code = 70
    try:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["racnn", *words]
        if injector is not None:
            injector.process = os.getpid()
            sys.setprofile(injector)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except Thrown:
            code = 71
        finally:
            sys.setprofile(None)
        if told is not None and injector is not None:
            told.write_text(json.dumps(injector.counts))
    finally:
        os._exit(code)


def left(run: Path) -> dict[str, Any]:
    """Everything that a finished training leaves, without its times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(one) for key, one in value.items() if key not in TIMES}
        return [timeless(one) for one in value] if isinstance(value, list) else value

    return {
        "weights": (run / "weights.safetensors").read_bytes(),
        "log": [timeless(json.loads(line)) for line in (run / "log.jsonl").read_text().splitlines()],
        "eval": timeless(json.loads((run / "eval.json").read_text())),
        "recipe": (run / "recipe.toml").read_text(),
        "classes": (run / "classes.json").read_text(),
        "report": (run / "report.html").is_file(),
        "left behind": sorted(path.name for path in run.rglob(".*")),
    }


def campaign(
    points: int, seed: int, folder: Path, say: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Strike at so many points, spread over the cases.

    Returns:
        one entry a point: `case`, `where`, `kind`, `at`, `of`, `status` (of the struck process), `again` (whether its
        continuation was struck, too), `survived` (it could be continued to its end), `identical`, `differs`.
    """
    torch.set_num_threads(1)
    data = write_blobs(folder / "data", {"train": 4, "val": 2, "test": 2})
    draw, found = random.Random(seed), []
    for number, (case, keys) in enumerate(CASES.items()):
        recipe = tiny(data, **{"train__batch": 4} | keys)
        file = folder / f"case-{number}.toml"
        file.write_text(recipes.dump(recipe))
        whole, said, told = folder / f"whole-{number}", folder / "said.txt", folder / "counts.json"
        if child(["train", str(file), "--out", str(whole)], said, Injector(), told):
            raise RuntimeError(said.read_text())
        counts, expected = json.loads(told.read_text()), left(whole)
        for _ in range(points // len(CASES) + (number < points % len(CASES))):
            found.append(strike(case, file, folder / "struck", said, counts, expected, draw))
            say(json.dumps(found[-1]))
    return found


def strike(
    case: str, file: Path, run: Path, said: Path, counts: dict[str, int], expected: dict[str, Any], draw: random.Random
) -> dict[str, Any]:
    """One point: strike, go on until the end, compare."""
    shutil.rmtree(run, ignore_errors=True)
    where, kind = draw.choice(list(counts)), draw.choice(KINDS)
    entry: dict[str, Any] = {"case": case, "where": where, "kind": kind, "of": counts[where]}
    entry["at"] = draw.randint(1, counts[where])
    injectors = [Injector(where, entry["at"], kind)]
    entry["again"] = draw.random() < 0.25
    if entry["again"]:
        injectors.append(Injector("anywhere", draw.randint(1, counts["anywhere"]), draw.choice(KINDS)))

    def command() -> list[str]:
        there = (run / "recipe.toml").is_file()
        return ["train", "--resume", "--run", str(run)] if there else ["train", str(file), "--out", str(run)]

    statuses = [child(command(), said, injector) for injector in injectors]
    entry["status"] = statuses[0]
    entry["survived"] = child(command(), said) == 0
    entry["identical"], entry["differs"] = False, []
    if entry["survived"]:
        now = left(run)
        entry["differs"] = [name for name in expected if now[name] != expected[name]]
        entry["identical"] = not entry["differs"]
        if "log" in entry["differs"]:
            pairs = zip(now["log"], expected["log"], strict=False)
            entry["lines"] = [len(now["log"]), len(expected["log"]), next((p for p in pairs if p[0] != p[1]), None)]
    else:
        entry["said"] = said.read_text()[-2000:]
    return entry


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """A line a case and kind: points tried, survived, bit-identical."""
    yield f"{'case':12} {'struck by':10} {'points':>6} {'survived':>8} {'identical':>9}"
    keys = [(case, kind) for case in CASES for kind in KINDS]
    for key in [*keys, None]:
        some = [entry for entry in found if key in (None, (entry["case"], entry["kind"]))]
        name = key or ("all", "")
        counts = Counter()
        for entry in some:
            counts.update(survived=entry["survived"], identical=entry["identical"])
        if some:
            yield f"{name[0]:12} {name[1]:10} {len(some):6} {counts['survived']:8} {counts['identical']:9}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        results = campaign(options.points, options.seed, Path(place), lambda line: print(line, file=sys.stderr))
    print("\n".join(table(results)))
    print(f"seed {options.seed}, {(time.monotonic() - start) / 60:.0f} minutes")
    sys.exit(any(not entry["identical"] for entry in results))
