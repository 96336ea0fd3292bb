"""Bootstrap estimates with standard errors and 95% intervals. Seeded: equal numbers give equal intervals."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subquad.evaluate.results import Result

DRAWS = 1000
CHUNK_UNITS = 2**22
"""Drawn units in memory at a time."""


def resampled_sums(values: Tensor, seed: int = 0) -> Tensor:
    """Column sums of `values: [n, k]` over 1,000 samples of n rows with replacement: `[1000, k]`, float64.

    A row is drawn as a whole, so that the columns stay paired.
    """
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    sums = []
    for chunk in torch.arange(DRAWS).split(max(1, CHUNK_UNITS // n)):
        drawn = torch.randint(n, (len(chunk), n), generator=generator)
        weights = torch.zeros(len(chunk), n, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        sums.append(weights @ values.double())
    return torch.cat(sums)


def spread(drawn: Tensor) -> dict[str, Any]:
    """The fields `stderr`, `low` and `high` of a result from its resampled values; NaN if fewer than two are finite."""
    drawn = drawn[drawn.isfinite()]
    if len(drawn) < 2:
        return dict.fromkeys(("stderr", "low", "high"), float("nan"))
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return {"stderr": drawn.std().item(), "low": low, "high": high}


def estimate(
    task: str,
    metric: str,
    values: Tensor,
    statistic: Callable[[Tensor], Tensor],
    n: int | None = None,
    **fields: Any,
) -> Result:
    """A statistic of column sums, with a percentile bootstrap interval.

    Args:
        values: `[units, k]`; units are independent of each other (rows of text, questions).
        statistic: maps sums `[..., k]` to values `[...]`, such as `lambda s: s[..., 0] / s[..., 1]`.
        n: the result's item count (tokens, for example); default: the number of units.
        fields: more fields of the result.

    Raises:
        ValueError: no units.
    """
    if not len(values):
        raise ValueError("values is empty; expected at least one unit")
    value = float(statistic(values.double().sum(0)))
    drawn = statistic(resampled_sums(values))[: None if len(values) > 1 else 0]
    return Result(task, metric, value, n=n or len(values), **spread(drawn), **fields)


def mean(task: str, metric: str, values: Tensor, **fields: Any) -> Result:
    """The mean of `values: [units]`."""
    pairs = torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], dim=1)
    return estimate(task, metric, pairs, lambda s: s[..., 0] / s[..., 1], **fields)
