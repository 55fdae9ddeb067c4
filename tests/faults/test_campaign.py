"""The short form of the campaign; `python tests/faults/campaign.py --points 200` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the campaign forks")
def test_a_training_that_is_struck_anywhere_ends_bit_identical() -> None:
    words = [sys.executable, str(CAMPAIGN), "--points", "6", "--seed", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert len(found) == 6, done.stderr
    assert [entry for entry in found if not entry["identical"]] == []
    assert done.returncode == 0, done.stdout
