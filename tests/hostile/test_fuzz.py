"""A short run of the fuzzer; `python tests/hostile/fuzz.py --inputs 100000` is a long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the fuzzer forks")
def test_broken_files_are_read_or_refused() -> None:
    command = [sys.executable, str(FUZZ), "--inputs", "400", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(rows) == 5
    for *name, inputs, read, refused, errors, _ in rows:
        assert (int(inputs), int(errors)) == (400, 0), name
        assert int(read) + int(refused) == 400, name
        assert int(read) > 0, name  # otherwise the inputs would never get past the readers' first checks
