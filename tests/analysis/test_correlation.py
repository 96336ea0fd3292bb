"""Rank correlation against known values, and its interval."""

import numpy as np
import pytest

from scripts.analyze_nano import rank_correlation, spearman
from subquad.utils import UserError


def test_tied_values_have_their_mean_rank():
    # Pearson's correlation of the ranks 4, 1, 2.5, 2.5 and 1, 2, 3, 4
    assert spearman(np.array([30.0, 10, 20, 20]), np.arange(4.0)) == pytest.approx(-1.5 / np.sqrt(4.5 * 5))


def test_draws_without_variation_are_left_out():
    assert rank_correlation([1, 2, 2], [1, 2, 3])[1:] == pytest.approx((0.866, 1.0), abs=0.2)


def test_spearman_of_known_orders():
    x = np.arange(5.0)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    # 1 - 6 sum d^2 / n (n^2 - 1) with d = 0, 1, 1, 1, 1
    assert spearman(x, np.array([0.0, 2, 1, 4, 3])) == pytest.approx(1 - 6 * 4 / (5 * 24))


def test_interval_contains_the_value_and_widens_with_fewer_pairs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=100)
    y = x + rng.normal(size=100)
    rho, low, high = rank_correlation(x, y)
    assert low < rho < high
    assert (rho, low, high) == rank_correlation(x, y)
    _, few_low, few_high = rank_correlation(x[:8], y[:8])
    assert few_high - few_low > 2 * (high - low)


def test_too_few_or_constant_values_are_refused():
    with pytest.raises(UserError, match="at least 3"):
        rank_correlation([1, 2], [1, 2])
    with pytest.raises(UserError, match="constant"):
        rank_correlation([1, 1, 1], [1, 2, 3])
