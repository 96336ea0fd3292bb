"""Bootstrap estimates with standard errors and 95% intervals. Seeded: equal numbers give equal intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.evaluate.results import Result

DRAWS = 1000
CHUNK_UNITS = 2**22
"""Drawn units in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error and the ends of its 95% interval."""

    value: float
    stderr: float
    low: float
    high: float
    n: int

    def result(self, task: str, metric: str, **fields: Any) -> Result:
        return Result(task, metric, self.value, self.stderr, self.low, self.high, self.n, **fields)


def resampled_sums(values: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Column sums of `values: [n, k]` over `draws` samples of n rows with replacement: `[draws, k]`, float64.

    A row is drawn as a whole, so that the columns stay paired.
    """
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    sums = []
    for chunk in torch.arange(draws).split(max(1, CHUNK_UNITS // n)):
        drawn = torch.randint(n, (len(chunk), n), generator=generator)
        weights = torch.zeros(len(chunk), n, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        sums.append(weights @ values.double())
    return torch.cat(sums)


def estimate(
    values: Tensor, statistic: Callable[[Tensor], Tensor], n: int | None = None, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """A statistic of column sums, with a percentile bootstrap interval.

    Args:
        values: `[units, k]`; units are independent of each other (rows of text, questions).
        statistic: maps sums `[..., k]` to values `[...]`, such as `lambda s: s[..., 0] / s[..., 1]`.
        n: the result's item count (tokens, for example); default: the number of units.

    Raises:
        ValueError: no units.
    """
    if not len(values):
        raise ValueError("values is empty; expected at least one unit")
    value = float(statistic(values.double().sum(0)))
    drawn = statistic(resampled_sums(values, draws, seed))
    drawn = drawn[drawn.isfinite()]
    if len(values) < 2 or not len(drawn):
        return Estimate(value, float("nan"), float("nan"), float("nan"), n or len(values))
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate(value, drawn.std().item(), low, high, n or len(values))


def mean(values: Tensor, n: int | None = None) -> Estimate:
    """The mean of `values: [units]`."""
    pairs = torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], dim=1)
    return estimate(pairs, lambda s: s[..., 0] / s[..., 1], n)
