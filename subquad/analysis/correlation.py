"""Spearman's rank correlation with a bootstrap interval."""

from collections.abc import Sequence

import numpy as np

from subquad.utils import UserError


def rank_correlation(
    x: Sequence[float], y: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's rho of x and y (ties have their mean rank) and its 95% percentile bootstrap interval.

    Pairs are drawn with replacement; draws in which x or y is constant are left out.

    Raises:
        UserError: fewer than three pairs, different lengths, constant x or y.
    """
    if len(x) != len(y) or len(x) < 3:
        raise UserError(f"rank_correlation: got {len(x)} and {len(y)} values, expected equally many, at least 3")
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    rho = spearman(a, b)
    if np.isnan(rho):
        raise UserError("rank_correlation: got a constant sequence, expected at least two different values")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(a), (resamples, len(a)))
    resampled = np.array([spearman(a[draw], b[draw]) for draw in draws])
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return rho, float(low), float(high)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """NaN if x or y is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties have their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
