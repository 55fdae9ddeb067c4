"""Random numbers per image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from racnn_cli.core.draws import Draws, keys

COUNT = 40_000


def test_distributions_and_independence() -> None:
    draws = Draws(keys(0, 0, torch.arange(COUNT)))
    uniform, normal = draws.uniform(3), draws.normal(2)
    assert uniform.shape == (COUNT, 3)
    assert normal.shape == (COUNT, 2)
    assert 0 < uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1
    samples = np.concatenate([uniform.numpy().T, normal.numpy().T])
    for row in samples[:3]:
        assert stats.kstest(row, "uniform").pvalue > 1e-3
    for row in samples[3:]:
        assert stats.kstest(row, "norm").pvalue > 1e-3
    # No correlation between the numbers of an image, nor between consecutive images.
    assert np.abs(np.corrcoef(samples) - np.eye(5)).max() < 0.03
    assert max(abs(np.corrcoef(row[1:], row[:-1])[0, 1]) for row in samples) < 0.03


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8, unique=True), st.integers(0, 2**31 - 1))
def test_draws_do_not_depend_on_the_rest_of_the_batch(images: list[int], seed: int) -> None:
    batch = Draws(keys(seed, 3, torch.tensor(images)))
    uniform, normal = batch.uniform(4), batch.normal(2)
    for row, image in enumerate(images):
        single = Draws(keys(seed, 3, torch.tensor([image])))
        assert torch.equal(single.uniform(4)[0], uniform[row])
        assert torch.equal(single.normal(2)[0], normal[row])


def test_seed_epoch_image_and_position_change_the_numbers() -> None:
    samples = [
        Draws(keys(seed, epoch, torch.arange(50))).uniform(5) for seed in (0, 1, 2**31 - 1) for epoch in (0, 1, 2)
    ]
    assert torch.stack(samples).unique().numel() > 0.999 * 9 * 50 * 5


def test_without_keys_the_global_generator_is_used() -> None:
    batch, samples = {"label": torch.zeros(3, dtype=torch.long)}, []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(Draws.of(batch).uniform(2))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    keyed = batch | {"key": keys(0, 0, torch.arange(3))}
    assert torch.equal(Draws.of(keyed).uniform(2), Draws.of(keyed).uniform(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_and_cpu_draw_the_same() -> None:
    samples = [Draws(keys(5, 2, torch.arange(100, device=device))).uniform(8) for device in ("cpu", "cuda")]
    assert torch.equal(samples[0], samples[1].cpu())
