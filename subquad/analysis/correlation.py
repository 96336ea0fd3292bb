"""Whether one number goes with another across a few students: Spearman's rank correlation and how sure it is."""

from collections.abc import Sequence

import numpy as np

from subquad.utils import UserError


def rank_correlation(
    x: Sequence[float], y: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's rho of x and y, ties at their mean rank, and the ends of its 95% bootstrap interval (percentiles over
    pairs drawn with replacement; draws in which x or y is constant say nothing and are left out).

    Raises:
        UserError: fewer than three pairs, as many x as y, or all x or y the same.
    """
    if len(x) != len(y) or len(x) < 3:
        raise UserError(f"rank_correlation: got {len(x)} and {len(y)} values, expected as many, at least 3")
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    rho = spearman(a, b)
    if np.isnan(rho):
        raise UserError("rank_correlation: all values are the same; expected some that differ")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(a), (resamples, len(a)))
    found = np.array([spearman(a[draw], b[draw]) for draw in draws])
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return rho, float(low), float(high)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """NaN where one of them is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


def ranks(x: np.ndarray) -> np.ndarray:
    """From 1 on; ties have the mean of their places."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
