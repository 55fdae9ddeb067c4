"""As `fuzz.py`, but each input is bred from those that reached new lines of our code (libFuzzer, through atheris).

    pip install atheris
    python tests/hostile/guided.py --inputs 100000 --seed 0

Prints the same table. Needs a Python that atheris has a wheel for, and is no part of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["racnn_cli", "tomllib", "csv", "PIL"]):
    import fuzz

LONGEST = 4096  # bytes of an input: of the seeds all but images are shorter


def breed(name: str, inputs: int, seed: int, folder: Path) -> None:
    """So many inputs for one reader; does not return. What was counted is left in `folder/told.json`."""
    title, make, read = fuzz.TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(make()):
        (corpus / str(number)).write_bytes(content)
    answers: dict[str, int] = {"inputs": 0, "read": 0, "refused": 0}
    errors: list[str] = []

    def one(content: bytes) -> None:
        answer = fuzz.one(read, folder / title, content)
        answers["inputs"] += 1
        if answer in answers:
            answers[answer] += 1
        else:
            errors.append(answer)
            (folder / f"error-{len(errors)}").write_bytes(content)
        if answers["inputs"] % 1000 == 0:
            (folder / "told.json").write_text(json.dumps({**answers, "errors": errors}))

    fuzz.watch()
    options = [f"-runs={inputs}", f"-seed={seed + 1}", f"-max_len={LONGEST}", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(fuzz.TARGETS), action="append")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.within:
        breed(chosen.only[0], chosen.inputs, chosen.seed, chosen.within)
    wrong = []
    print(fuzz.HEADER)
    for target in chosen.only or fuzz.TARGETS:
        with tempfile.TemporaryDirectory(dir=fuzz.MEMORY_DISK) as place:
            words = ["--inputs", str(chosen.inputs), "--seed", str(chosen.seed), "--only", target]
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, __file__, *words, "--within", place],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONHASHSEED": "0"},
                check=False,
            )
            told = json.loads((Path(place) / "told.json").read_text())
            if done.returncode:
                told["errors"].append(f"the process ended with {done.returncode}")
            wrong += [f"{target}: {error}" for error in told["errors"]]
            print(fuzz.line(target, told, time.monotonic() - began), flush=True)
    print("\n".join(wrong[:20]), file=sys.stderr)
    sys.exit(bool(wrong))
