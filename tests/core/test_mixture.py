"""Fusion as a mixture: its probabilities, and how its weights and temperatures are fitted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from racnn_cli.core.metrics import TEMPERATURES, ClassificationMetrics, true_class_scores
from racnn_cli.core.mixture import fit_temperature, fit_weights, log_mixture


def test_the_mixture_is_the_weighted_mean_of_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(5, 4) for _ in range(3)]
    weights, temperatures = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([1.0, 2.0, 0.5])
    parts = zip(logits, weights, temperatures, strict=True)
    expected = sum(weight * (values / temperature).softmax(dim=1) for values, weight, temperature in parts)
    torch.testing.assert_close(log_mixture(logits, weights, temperatures).exp(), expected)
    alone = log_mixture(logits, torch.tensor([0.0, 1.0, 0.0]), torch.ones(3))
    torch.testing.assert_close(alone, logits[1].log_softmax(dim=1))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(0, 1000))
def test_the_fitted_weights_are_the_most_likely_ones(classifiers, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(400, classifiers, generator=generator, dtype=torch.float64) ** 3
    weights = fit_weights(probabilities).double()
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert weights.min() > 0

    def likelihood(values: torch.Tensor) -> float:
        return ((probabilities @ values).log().sum() + values.log().sum()).item()  # with the prior

    best = likelihood(weights)
    for _ in range(20):
        other = weights * (1 + 0.05 * torch.randn(classifiers, generator=generator, dtype=torch.float64)).abs()
        assert likelihood(other / other.sum()) <= best + 1e-3


def test_a_classifier_that_is_right_more_often_gets_the_larger_weight() -> None:
    probabilities = torch.tensor([[0.9, 0.4]] * 80 + [[0.1, 0.5]] * 20)
    weights = fit_weights(probabilities)
    assert weights[0] > 0.7
    assert fit_weights(torch.ones(0, 3)).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_the_temperature_of_drawn_labels_is_recovered(temperature) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
    metrics = ClassificationMetrics(5)
    for part in (slice(0, 7_000), slice(7_000, 20_000)):
        metrics.add(logits[part].log_softmax(dim=1), labels[part])
    fitted, nll = metrics.fit_temperature()
    assert fitted == pytest.approx(temperature, rel=0.1)
    expected = -(logits / fitted).log_softmax(dim=1).gather(1, labels[:, None]).mean().item()
    assert nll == pytest.approx(expected, rel=1e-5)
    assert nll <= metrics.nll + 1e-9
    # Measured with that temperature, the probabilities are calibrated.
    calibrated = ClassificationMetrics(5, fitted)
    calibrated.add(logits.log_softmax(dim=1), labels)
    result = calibrated.compute()
    assert result["calibrated_nll"] == pytest.approx(nll, rel=1e-4)
    assert result["calibrated_ece"] < 0.02
    assert result["temperature"] == fitted
    assert result["nll"] == pytest.approx(metrics.nll)


def test_few_images_that_are_all_right_do_not_make_the_network_certain() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 4)
    labels = torch.zeros(4, dtype=torch.int64)
    costs = -true_class_scores(logits.log_softmax(dim=1), labels).sum(dim=1)
    assert costs.argmin() == 0  # without a prior, the lowest temperature
    assert TEMPERATURES[fit_temperature(costs, TEMPERATURES)] > 0.4
    assert TEMPERATURES[0] == 0.25
    assert math.isclose(TEMPERATURES[-1], 8)
