"""As `fuzz.py`, but guided by coverage: inputs that reach new code are mutated further (libFuzzer, through atheris).

    pip install atheris
    python tests/hostile/guided.py --inputs 100000 --seed 0

Prints the same table. It needs a Python version for which atheris has a wheel, and is not run by the tests.
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

MAX_LENGTH = 4096  # bytes of an input; all seeds except images are shorter


def fuzz_target(name: str, inputs: int, seed: int, folder: Path) -> None:
    """Try n inputs on one reader and write the counts to `folder/results.json`; does not return."""
    file_name, make_seeds, read = fuzz.TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(make_seeds()):
        (corpus / str(number)).write_bytes(content)
    counts: dict[str, int] = {"inputs": 0, "read": 0, "refused": 0}
    errors: list[str] = []

    def try_input(content: bytes) -> None:
        outcome = fuzz.try_input(read, folder / file_name, content)
        counts["inputs"] += 1
        if outcome in counts:
            counts[outcome] += 1
        else:
            errors.append(outcome)
            (folder / f"error-{len(errors)}").write_bytes(content)
        if counts["inputs"] % 1000 == 0:
            (folder / "results.json").write_text(json.dumps({**counts, "errors": errors}))

    fuzz.handle_timeouts()
    options = [f"-runs={inputs}", f"-seed={seed + 1}", f"-max_len={MAX_LENGTH}", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], try_input)
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(fuzz.TARGETS), action="append")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within:
        fuzz_target(options.only[0], options.inputs, options.seed, options.within)
    problems = []
    print(fuzz.HEADER)
    for target in options.only or fuzz.TARGETS:
        with tempfile.TemporaryDirectory(dir=fuzz.MEMORY_DISK) as temporary:
            arguments = ["--inputs", str(options.inputs), "--seed", str(options.seed), "--only", target]
            start_time = time.monotonic()
            done = subprocess.run(
                [sys.executable, __file__, *arguments, "--within", temporary],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONHASHSEED": "0"},
                check=False,
            )
            results = json.loads((Path(temporary) / "results.json").read_text())
            if done.returncode:
                results["errors"].append(f"the process ended with exit code {done.returncode}")
            problems += [f"{target}: {error}" for error in results["errors"]]
            print(fuzz.table_row(target, results, time.monotonic() - start_time), flush=True)
    print("\n".join(problems[:20]), file=sys.stderr)
    sys.exit(bool(problems))
