"""The warning about more busy threads than cores."""

from __future__ import annotations

import pytest

from racnn_cli.threads import crowded


@pytest.mark.parametrize(
    ("threads", "processes", "cores", "load"),
    [(2, 1, 2, 0.0), (2, 1, 2, 1.0), (1, 8, 2, 9.0), (8, 2, 16, 0.5), (64, 1, 64, 20.0)],
)
def test_enough_cores(threads, processes, cores, load) -> None:
    assert crowded(threads, processes, cores, load) == ""


@pytest.mark.parametrize(
    ("threads", "processes", "cores", "load", "advice"),
    [(2, 2, 2, 0.0, 1), (2, 1, 2, 2.0, 1), (16, 2, 16, 0.0, 8), (8, 1, 8, 5.0, 3), (4, 8, 2, 0.0, 1)],
)
def test_too_few_cores(threads, processes, cores, load, advice) -> None:
    warning = crowded(threads, processes, cores, load)
    assert f"set OMP_NUM_THREADS={advice}" in warning
    assert f"{cores} core(s)" in warning
