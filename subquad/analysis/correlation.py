"""Spearman's rank correlation with a bootstrap interval."""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats

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
    if min(len(set(x)), len(set(y))) == 1:
        raise UserError("rank_correlation: got a constant sequence, expected at least two different values")
    draws = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    low, high = np.nanpercentile(spearman(np.asarray(x)[draws], np.asarray(y)[draws]), [2.5, 97.5])
    return float(spearman(np.asarray(x), np.asarray(y))), float(low), float(high)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each row of `[..., n]`; NaN where x or y is constant."""
    with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):
        return stats.pearsonr(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1), axis=-1).statistic
