"""Intervals by bootstrap. Plain numbers in and out.

All draws come from a seed, so that the same numbers give the same interval.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.evaluate.results import Result

DRAWS = 1000
AT_A_TIME = 2**22
"""Drawn units in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error and the ends of its 95% interval."""

    value: float
    stderr: float
    low: float
    high: float
    n: int

    def row(self, task: str, metric: str, **where: Any) -> Result:
        """As a row of results; where: its `length`, `depth`, `layer` ..."""
        return Result(task, metric, self.value, self.stderr, self.low, self.high, self.n, **where)


def resampled_sums(values: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Sums of `values: [n, k]` over `draws` samples of n units drawn with replacement: `[draws, k]`, float64.

    Columns are drawn together: what belongs to one unit stays together (paired bootstrap).
    """
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    sums = []
    for some in torch.arange(draws).split(max(1, AT_A_TIME // n)):
        drawn = torch.randint(n, (len(some), n), generator=generator)
        weights = torch.zeros(len(some), n, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        sums.append(weights @ values.double())
    return torch.cat(sums)


def estimate(
    values: Tensor, statistic: Callable[[Tensor], Tensor], n: int | None = None, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """A statistic of column sums, and its interval over resampled units.

    Args:
        values: `[units, k]`; a unit is what is independent of the others (a row of text, a question).
        statistic: of sums `[..., k]`, such as `lambda s: s[..., 0] / s[..., 1]`.
        n: what the row of results counts (tokens, say), if not units.
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
    """Of units `[n]`."""
    pairs = torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], dim=1)
    return estimate(pairs, lambda s: s[..., 0] / s[..., 1], n)
