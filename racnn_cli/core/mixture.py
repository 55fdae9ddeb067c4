"""Fusion of classifiers as a mixture: a convex weight and a temperature for each, fitted on held-out images.

A fusion head that is trained on images which the scales know by heart cannot learn which scale to trust on new ones.
The mixture has two numbers per classifier, which few held-out images determine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 200  # of expectation maximization, which converges to the only maximum
PRIOR = 1.0  # images that each classifier counts as right beforehand, so that few images do not exclude one


def log_mixture(logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor) -> Tensor:
    """Map the logits K × (B, N) of K classifiers to log-probabilities (B, N) of their mixture.

    Args:
        logits: of each classifier.
        weights: (K,), which add up to 1.
        temperatures: (K,) of their softmax.
    """
    parts = [
        (values.float() / temperature).log_softmax(dim=1) + weight.log()
        for values, weight, temperature in zip(logits, weights, temperatures, strict=True)
    ]
    return torch.stack(parts).logsumexp(dim=0)


def fit_weights(probabilities: Tensor) -> Tensor:
    """Fit the weights (K,) of a mixture by expectation maximization (Dempster et al. 1977).

    Args:
        probabilities: (M, K) probability that each of K classifiers gives the true class of M held-out images.
    """
    count, classifiers = probabilities.shape
    probabilities = probabilities.double().clamp_min(1e-30)
    weights = torch.full((classifiers,), 1 / classifiers, dtype=torch.float64)
    for _ in range(STEPS):
        shares = probabilities * weights
        shares = shares / shares.sum(dim=1, keepdim=True)
        weights = (shares.sum(dim=0) + PRIOR) / (count + classifiers * PRIOR)
    return weights.float()


def fit_temperature(costs: Tensor, temperatures: Sequence[float]) -> int:
    """Return the position of the best temperature: the one with the lowest negative log-likelihood.

    A standard normal prior on its logarithm keeps it near 1 where there are few images, all of which may be right by
    chance.

    Args:
        costs: (T,) negative log-likelihood of all images at each temperature.
        temperatures: T values.
    """
    prior = torch.tensor([math.log(value) ** 2 / 2 for value in temperatures], dtype=torch.float64)
    return int((costs.double().cpu() + prior).argmin())
