"""What all tests share."""

from __future__ import annotations

import os

# Small tensors gain nothing from threads, and shared machines lose by them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new, empty working folder, so that runs/ is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
