"""Feed broken files to every reader of files: each file must be read, or refused with one clear error.

    python tests/hostile/fuzz.py --inputs 100000 --seed 0

An input is a valid file with random changes: flipped bits, deleted, repeated or spliced spans, extreme numbers. It is
a pure function of the seed and the input's number. The table counts files that were read, files that were refused
with a `RacnnError`, and errors. An error is any other exception, a crash of the process, more than `LIMIT` seconds, or
more than `MEMORY` bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[number]) for number in (1, 2)]

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from racnn_cli import recipe as recipes
from racnn_cli.core import store
from racnn_cli.data.decode import read_image
from racnn_cli.data.listing import read_csv
from racnn_cli.errors import RacnnError
from racnn_cli.results.report import write_report
from racnn_cli.run import Run

LIMIT = 10  # seconds per input
MEMORY = 6 * 2**30  # bytes of address space; torch takes most of it before the first input
CHUNK = 2000  # inputs per process
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # every report is written with fsync

NUMBERS = [
    "0",
    "-1",
    "1",
    "255",
    "65536",
    "2147483648",
    "9223372036854775808",
    "1" * 400,
    "1e400",
    "-0.0",
    "nan",
    "inf",
]
WORDS = [
    *NUMBERS,
    "true",
    "null",
    "[]",
    "{}",
    '""',
    "'''",
    '"""',
    "\\u0000",
    "\\ud800",
    "../",
    "/dev/zero",
    "~",
    "\x1b[2J",
]
WORDS += [
    "[bold]",
    "\r",
    "\n",
    "\t",
    "\0",
    ",",
    ";",
    '"',
    "=",
    "[",
    "]",
    "#",
    "ÿ",
    "𝒜",
    "\ufeff",
    "\u202e",
    "a" * 5000,
    "[" * 300,
]


def recipe_seeds() -> list[bytes]:
    shipped = [path.read_bytes() for path in sorted(recipes.RECIPES.glob("*.toml"))]
    return [*shipped, recipes.dump(recipes.load("tiny")).encode()]


def csv_seeds() -> list[bytes]:
    rows = "".join(f"a/{n}.png,class {n % 3},{['train', 'val', 'test'][n % 3]},{n},{n},10,10\n" for n in range(9))
    return [
        f"path,label,split,x,y,w,h\n{rows}".encode(),
        b'path,label\r\n"a, b.png","x ""y"""\r\nc.png,z\r\n',
        "\ufeffpath,label,split\nä.png,ö,validation\n".encode(),
    ]


def image_seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    files = []
    for kind, mode in [("PNG", m) for m in ("RGB", "RGBA", "P", "L", "1", "I;16")] + [
        (k, "RGB") for k in ("JPEG", "WEBP", "BMP", "TIFF")
    ]:
        image = Image.fromarray(pixels)
        image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        image.save(file, kind, **({"exif": exif} if mode == "RGB" and kind != "BMP" else {}))
        files.append(file.getvalue())
    return files


NAMES = ["red", "green", "blue"]
SCALE_FIGURES = {"top1": 0.5, "nll": 1.25}
VALIDATION = {"scales": [SCALE_FIGURES, SCALE_FIGURES], "average": SCALE_FIGURES, "fused": SCALE_FIGURES}
EVENTS = [
    {"event": "epoch", "stage": "alternate", "phase": phase, "round": 1, "epoch": number, "seconds": 1.5}
    | {"train_loss": {"rank 1-2": 0.25}, "val": VALIDATION}
    | {"lr": 1e-3, "views": number, "images_per_second": 9.5}
    for number, phase in enumerate(("CNN phase", "APN phase", "fusion head"), start=1)
]
EVENTS.append({"event": "warning", "stage": "alternate", "round": 1, "kind": "bound", "text": "boxes sit at it"})
FIGURES = SCALE_FIGURES | {"top5": 1.0, "ece": 0.125}
BOX_FIGURES = {"side_mean": 0.5, "side_min": 0.25, "side_max": 0.75, "at_floor": 0.0, "at_ceiling": 0.0}
RESULT = {
    **{"split": "test", "data": "birds", "images": 6, "classes": 3, "interval": [0.25, 0.75], "baseline": None},
    **{"scales": [FIGURES, FIGURES], "average": FIGURES, "fused": FIGURES, "seconds": 1.0, "images_per_second": 8.0},
    "per_class": {name: {"top1": 0.5, "n": 2} for name in NAMES},
    "boxes": [BOX_FIGURES | {"iou_mean": 0.5, "hit_rate": 1.0, "coverage_mean": 0.75}],
    "confusion": [[0, 0, 1], [0, 1, 1], [1, 1, 2], [2, 2, 2]],
}


def json_seeds() -> list[bytes]:
    log = "".join(json.dumps(event) + "\n" for event in EVENTS)
    return [json.dumps(NAMES).encode(), log.encode(), json.dumps(RESULT).encode()]


def tensor_seeds() -> list[bytes]:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(1, dtype=torch.int64)}
    return [save(tensors, {"progress": "{}", "racnn": "0"}), save({"c": torch.ones(0, 4)})]


def read_recipe(file: Path) -> None:
    recipes.load(str(file))


def read_run(file: Path) -> None:
    """Use the same bytes as each text file of a run folder in turn, and write the report."""
    run = Run(file.parent / "run")
    if not run.state.is_dir():
        run.state.mkdir(parents=True)
        run.recipe_file.write_text(recipes.dump(recipes.load("tiny", (), {"data.path": "nowhere"})))
    content = file.read_bytes()
    valid = {run.classes_file: json_seeds()[0], run.log: json_seeds()[1], run.eval: json_seeds()[2]}
    refused: list[RacnnError] = []
    for changed_file in (*valid, run.data):
        for path, valid_content in valid.items():
            path.write_bytes(content if path == changed_file else valid_content)
        run.data.write_bytes(content if changed_file == run.data else b"0" * 64)
        try:
            run.classes()
            run.check_data("0" * 64)
            write_report(run)
        except RacnnError as error:
            refused.append(error)
    if len(refused) > 2:  # always the fingerprint, and for valid content at most one of classes.json and eval.json
        raise refused[0]


TARGETS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[Path], object]]] = {
    "recipes": ("input.toml", recipe_seeds, read_recipe),
    "CSV": ("input.csv", csv_seeds, read_csv),
    "images": ("input.png", image_seeds, read_image),
    "run folders": ("input", json_seeds, read_run),
    "safetensors": ("input.safetensors", tensor_seeds, store.read_tensors),
}


def mutate(draw: random.Random, seeds: list[bytes]) -> bytes:
    """Make a few random changes to one of the valid files."""
    content = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 5, 8))):
        at = draw.randrange(len(content) + 1)
        span = min(draw.choice((1, 2, 4, 8, 64, 1024)), len(content) - at)
        kind = draw.randrange(8)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(content):
            content[at] = draw.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del content[at : at + span]
        elif kind == 3:
            content[at:at] = content[at : at + span] * draw.choice((1, 2, 50))
        elif kind == 4:
            content[at:at] = draw.choice(WORDS).encode()
        elif kind == 5:
            del content[at:]
        elif kind == 6:
            donor = draw.choice(seeds)
            cut = draw.randrange(len(donor) + 1)
            content[at:] = donor[cut:]
        else:
            number = draw.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1))
            content[at : at + 4] = number.to_bytes(4, draw.choice(("little", "big")))
    return bytes(content)


class InputTimeout(BaseException):
    """An input took longer than `LIMIT` seconds."""


def try_input(read: Callable[[Path], object], file: Path, content: bytes) -> str:
    """Write the file and read it; returns `read`, `refused`, or a description of the error."""
    file.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        read(file)
    except RacnnError as error:
        message = str(error)
        has_escape = not message.replace("\n", "").isprintable() and "\x1b" in message
        return "an escape sequence in a message" if has_escape else "refused"
    except InputTimeout:
        return f"more than {LIMIT} s"
    except BaseException:
        return traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> dict[str, int | list[str]]:
    """Try n inputs on one reader, in child processes.

    Args:
        name: key of `TARGETS`.
        inputs: how many.
        seed: of the changes.
        folder: for the input files.

    Returns:
        the counts `inputs`, `read` and `refused`, and `errors`: a description of each, with the input's number.
    """
    file_name, make_seeds, read = TARGETS[name]
    seeds, counts, errors = make_seeds(), {"read": 0, "refused": 0}, []
    for start in range(0, inputs, CHUNK):
        results_file, number_file = folder / "results.json", folder / "number"
        pid = os.fork()
        if not pid:
            code = 1
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                handle_timeouts()
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                results = {"read": 0, "refused": 0, "errors": []}
                for number in range(start, min(start + CHUNK, inputs)):
                    number_file.write_text(str(number))
                    content = mutate(random.Random(f"{name} {seed} {number}"), seeds)
                    outcome = try_input(read, folder / file_name, content)
                    if outcome in results:
                        results[outcome] += 1
                    else:
                        results["errors"].append(f"{name} {number}: {outcome}")
                results_file.write_text(json.dumps(results))
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        if status:
            errors.append(f"{name} {number_file.read_text()}: the process died, status {status}")
            continue
        results = json.loads(results_file.read_text())
        errors += results.pop("errors")
        counts = {key: counts[key] + results[key] for key in counts}
    return {"inputs": inputs, **counts, "errors": errors}


def _raise_timeout(number: int, frame: FrameType | None) -> None:
    raise InputTimeout


def handle_timeouts() -> None:
    """Raise `InputTimeout` when the timer of `try_input` expires."""
    signal.signal(signal.SIGALRM, _raise_timeout)


HEADER = f"{'':12} {'inputs':>8} {'read':>8} {'refused':>8} {'errors':>7} {'seconds':>8}"


def table_row(name: str, results: Mapping[str, Any], seconds: float) -> str:
    """One row of the table, for one reader."""
    counts = f"{results['inputs']:8} {results['read']:8} {results['refused']:8} {len(results['errors']):7}"
    return f"{name:12} {counts} {seconds:8.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS), action="append")
    options = parser.parse_args()
    print(HEADER)
    problems = []
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as temporary:
        for target in options.only or TARGETS:
            start_time = time.monotonic()
            target_results = fuzz(target, options.inputs, options.seed, Path(temporary))
            problems += target_results["errors"]
            print(table_row(target, target_results, time.monotonic() - start_time), flush=True)
    print("\n".join(problems[:20]), file=sys.stderr)
    sys.exit(bool(problems))
