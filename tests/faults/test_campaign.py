"""A short run of the campaign; `python tests/faults/campaign.py --points 200` is a long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the campaign forks")
def test_a_run_interrupted_anywhere_ends_bit_identical() -> None:
    command = [sys.executable, str(CAMPAIGN), "--points", "5", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert len(results) == 5, done.stderr
    assert [entry for entry in results if not entry["identical"]] == []
    assert done.returncode == 0, done.stdout
