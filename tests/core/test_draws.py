"""Chance that belongs to an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from racnn_cli.core.draws import Draws, keys

COUNT = 40_000


def test_numbers_are_spread_as_they_should_be() -> None:
    draws = Draws(keys(0, 0, torch.arange(COUNT)))
    even, normal = draws.uniform(3), draws.normal(2)
    assert even.shape == (COUNT, 3)
    assert normal.shape == (COUNT, 2)
    assert 0 < even.min() < 1e-4
    assert 1 - 1e-4 < even.max() < 1
    every = np.concatenate([even.numpy().T, normal.numpy().T])
    for row in every[:3]:
        assert stats.kstest(row, "uniform").pvalue > 1e-3
    for row in every[3:]:
        assert stats.kstest(row, "norm").pvalue > 1e-3
    # neither one number after the other nor one image after the other knows anything of the one before
    assert np.abs(np.corrcoef(every) - np.eye(5)).max() < 0.03
    assert max(abs(np.corrcoef(row[1:], row[:-1])[0, 1]) for row in every) < 0.03


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8, unique=True), st.integers(0, 2**31 - 1))
def test_a_images_draws_the_same_in_any_company(images: list[int], seed: int) -> None:
    together = Draws(keys(seed, 3, torch.tensor(images)))
    first, second = together.uniform(4), together.normal(2)
    for row, image in enumerate(images):
        alone = Draws(keys(seed, 3, torch.tensor([image])))
        assert torch.equal(alone.uniform(4)[0], first[row])
        assert torch.equal(alone.normal(2)[0], second[row])


def test_seed_epoch_images_and_turn_all_count() -> None:
    found = [
        Draws(keys(seed, epoch, torch.arange(50))).uniform(5)
        for seed in (0, 1, 2**31 - 1)
        for epoch in (0, 1, 2)
    ]
    assert torch.stack(found).unique().numel() > 0.999 * 9 * 50 * 5


def test_without_keys_the_global_generator_decides() -> None:
    batch, drawn = {"label": torch.zeros(3, dtype=torch.long)}, []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(Draws.of(batch).uniform(2))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    given_keys = batch | {"key": keys(0, 0, torch.arange(3))}
    assert torch.equal(Draws.of(given_keys).uniform(2), Draws.of(given_keys).uniform(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    where = [Draws(keys(5, 2, torch.arange(100, device=device))).uniform(8) for device in ("cpu", "cuda")]
    assert torch.equal(where[0], where[1].cpu())
