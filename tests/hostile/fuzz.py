"""Feed broken files to everything that reads files: each must be read, or refused with one clear error.

    python tests/hostile/fuzz.py --inputs 100000 --seed 0

An input is a valid file, changed at random (bits flipped, spans cut, doubled, spliced, extreme numbers put in),
a pure function of the seed and its number. What is counted: files that were read, files that were refused with a
`RacnnError`, and everything else, which must be nothing: another exception, a crash of the process, more than
`LIMIT` seconds, more than `MEMORY` bytes.
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

LIMIT = 10  # seconds an input
MEMORY = 6 * 2**30  # bytes of address space, most of which torch has taken before the first input
CHUNK = 2000  # inputs a process
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a page is fsynced each time

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
    found = []
    for kind, mode in [("PNG", m) for m in ("RGB", "RGBA", "P", "L", "1", "I;16")] + [
        (k, "RGB") for k in ("JPEG", "WEBP", "BMP", "TIFF")
    ]:
        image = Image.fromarray(pixels)
        image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        image.save(file, kind, **({"exif": exif} if mode == "RGB" and kind != "BMP" else {}))
        found.append(file.getvalue())
    return found


NAMES = ["red", "green", "blue"]
SEEN = {"top1": 0.5, "nll": 1.25}
EVENTS = [
    {"event": "epoch", "stage": "alternate", "phase": phase, "round": 1, "epoch": number, "seconds": 1.5}
    | {"train_loss": {"rank 1-2": 0.25}, "val": {"scales": [SEEN, SEEN], "average": SEEN, "fused": SEEN}}
    | {"lr": 1e-3, "views": number, "images_per_second": 9.5}
    for number, phase in enumerate(("CNN phase", "APN phase", "fusion head"), start=1)
]
EVENTS.append({"event": "warning", "stage": "alternate", "round": 1, "kind": "bound", "text": "boxes sit at it"})
FIGURES = SEEN | {"top5": 1.0, "ece": 0.125}
SIDE = {"side_mean": 0.5, "side_min": 0.25, "side_max": 0.75, "at_floor": 0.0, "at_ceiling": 0.0}
RESULT = {
    **{"split": "test", "data": "birds", "images": 6, "classes": 3, "interval": [0.25, 0.75], "baseline": None},
    **{"scales": [FIGURES, FIGURES], "average": FIGURES, "fused": FIGURES, "seconds": 1.0, "images_per_second": 8.0},
    "per_class": {name: {"top1": 0.5, "n": 2} for name in NAMES},
    "boxes": [SIDE | {"iou_mean": 0.5, "hit_rate": 1.0, "coverage_mean": 0.75}],
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
    """The same bytes as each of a run folder's text files, and the page that is made of them."""
    run = Run(file.parent / "run")
    if not run.state.is_dir():
        run.state.mkdir(parents=True)
        run.recipe_file.write_text(recipes.dump(recipes.load("tiny", (), {"data.path": "nowhere"})))
    content = file.read_bytes()
    good = {run.classes_file: json_seeds()[0], run.log: json_seeds()[1], run.eval: json_seeds()[2]}
    refused: list[RacnnError] = []
    for changed_file in (*good, run.data):
        for path, whole in good.items():
            path.write_bytes(content if path == changed_file else whole)
        run.data.write_bytes(content if changed_file == run.data else b"0" * 64)
        try:
            run.classes()
            run.check_data("0" * 64)
            write_report(run)
        except RacnnError as error:
            refused.append(error)
    if len(refused) > 2:  # as the data's fingerprint always, and classes.json or eval.json but not both
        raise refused[0]


TARGETS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[Path], object]]] = {
    "recipes": ("input.toml", recipe_seeds, read_recipe),
    "CSV": ("input.csv", csv_seeds, read_csv),
    "images": ("input.png", image_seeds, read_image),
    "run folders": ("input", json_seeds, read_run),
    "safetensors": ("input.safetensors", tensor_seeds, store.read_tensors),
}


def changed(draw: random.Random, seeds: list[bytes]) -> bytes:
    """A valid file with a few changes."""
    content = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 5, 8))):
        at = draw.randrange(len(content) + 1)
        span = min(draw.choice((1, 2, 4, 8, 64, 1024)), len(content) - at)
        way = draw.randrange(8)
        if way == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif way == 1 and at < len(content):
            content[at] = draw.choice((0, 1, 127, 128, 255))
        elif way == 2:
            del content[at : at + span]
        elif way == 3:
            content[at:at] = content[at : at + span] * draw.choice((1, 2, 50))
        elif way == 4:
            content[at:at] = draw.choice(WORDS).encode()
        elif way == 5:
            del content[at:]
        elif way == 6:
            other = draw.choice(seeds)
            cut = draw.randrange(len(other) + 1)
            content[at:] = other[cut:]
        else:
            number = draw.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1))
            content[at : at + 4] = number.to_bytes(4, draw.choice(("little", "big")))
    return bytes(content)


class Hang(BaseException):
    """An input took too long."""


def one(read: Callable[[Path], object], file: Path, content: bytes) -> str:
    """`read`, `refused`, or what happened in their place."""
    file.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        read(file)
    except RacnnError as error:
        whole = str(error)
        hidden = not whole.replace("\n", "").isprintable() and "\x1b" in whole
        return "an escape sequence in a message" if hidden else "refused"
    except Hang:
        return f"more than {LIMIT} s"
    except BaseException:
        return traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> dict[str, int | list[str]]:
    """So many inputs for one reader, in processes of their own.

    Returns:
        `inputs`, `read`, `refused`, and `errors`: what else happened, with the number of the input.
    """
    title, make, read = TARGETS[name]
    seeds, counts, errors = make(), {"read": 0, "refused": 0}, []
    for start in range(0, inputs, CHUNK):
        told, at = folder / "told.json", folder / "at"
        pid = os.fork()
        if not pid:
            code = 1
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                watch()
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                answers = {"read": 0, "refused": 0, "errors": []}
                for number in range(start, min(start + CHUNK, inputs)):
                    at.write_text(str(number))
                    content = changed(random.Random(f"{name} {seed} {number}"), seeds)
                    answer = one(read, folder / title, content)
                    if answer in answers:
                        answers[answer] += 1
                    else:
                        answers["errors"].append(f"{name} {number}: {answer}")
                told.write_text(json.dumps(answers))
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        if status:
            errors.append(f"{name} {at.read_text()}: the process died, status {status}")
            continue
        answers = json.loads(told.read_text())
        errors += answers.pop("errors")
        counts = {key: counts[key] + answers[key] for key in counts}
    return {"inputs": inputs, **counts, "errors": errors}


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def watch() -> None:
    """Let an input that takes too long end as a `Hang`."""
    signal.signal(signal.SIGALRM, _hang)


HEADER = f"{'':12} {'inputs':>8} {'read':>8} {'refused':>8} {'errors':>7} {'seconds':>8}"


def line(name: str, found: Mapping[str, Any], seconds: float) -> str:
    """A reader's row of the table."""
    counts = f"{found['inputs']:8} {found['read']:8} {found['refused']:8} {len(found['errors']):7}"
    return f"{name:12} {counts} {seconds:8.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS), action="append")
    options = parser.parse_args()
    print(HEADER)
    wrong = []
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place:
        for target in options.only or TARGETS:
            began = time.monotonic()
            result = fuzz(target, options.inputs, options.seed, Path(place))
            wrong += result["errors"]
            print(line(target, result, time.monotonic() - began), flush=True)
    print("\n".join(wrong[:20]), file=sys.stderr)
    sys.exit(bool(wrong))
