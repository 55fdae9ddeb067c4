"""The short form of the fuzzing; `python tests/hostile/fuzz.py --inputs 100000` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="it forks")
def test_broken_files_are_read_or_refused() -> None:
    words = [sys.executable, str(FUZZ), "--inputs", "400", "--seed", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(lines) == 5
    for *name, inputs, read, refused, errors, _ in lines:
        assert (int(inputs), int(errors)) == (400, 0), name
        assert int(read) + int(refused) == 400, name
        assert int(read) > 0, name  # else it would not be the readers that are tried
