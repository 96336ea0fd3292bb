"""Bootstrap estimates with standard errors and 95% intervals, and a student's task scores compared with its teacher's,
item by item. Seeded: equal numbers give equal intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from subquad.evaluate.results import ALL_TASKS, Result

DRAWS = 1000
CHUNK_UNITS = 2**22
"""Drawn units in memory at a time."""
TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1)


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


# ---------------------------------------------------------------------- task scores


@dataclass(frozen=True)
class TaskScores:
    """Scores of student and teacher on the same items, and the expected score of guessing."""

    student: Sequence[float]
    teacher: Sequence[float]
    chance: float

    @cached_property
    def columns(self) -> Tensor:
        """`[n, 3]`, float64: student, teacher, ones."""
        return torch.tensor([self.student, self.teacher, [1.0] * len(self.student)], dtype=torch.float64).T

    def ratio_above_chance(self, sums: Tensor) -> Tensor:
        """(student - chance) / (teacher - chance) from sums of the columns."""
        student, teacher, count = sums.unbind(-1)
        return (student - self.chance * count) / (teacher - self.chance * count)

    @property
    def teacher_above_chance(self) -> bool:
        """Whether the teacher's accuracy exceeds chance by more than two standard errors."""
        scores = self.columns[:, 1]
        return len(scores) > 1 and bool(scores.mean() - self.chance > 2 * scores.std() / len(scores) ** 0.5)


def accuracy_results(task: str, scores: TaskScores) -> list[Result]:
    """`accuracy_ratio` (student / teacher), `accuracy_ratio_above_chance`, `difference` (student - teacher), each with
    an interval by paired bootstrap, and `teacher_above_chance` (0 or 1)."""
    columns = scores.columns
    return [
        estimate(task, "accuracy_ratio", columns, lambda s: s[..., 0] / s[..., 1]),
        estimate(task, "accuracy_ratio_above_chance", columns, scores.ratio_above_chance),
        estimate(task, "difference", columns, lambda s: (s[..., 0] - s[..., 1]) / s[..., 2]),
        Result(task, "teacher_above_chance", float(scores.teacher_above_chance), n=len(columns)),
    ]


def summary_results(tasks: Mapping[str, TaskScores]) -> list[Result]:
    """Over tasks: the mean `accuracy_ratio_above_chance` of those on which the teacher is above chance, and
    `win_and_tie@t` for each tolerance t.

    Items are resampled within each task. `n` counts tasks.
    """
    results = []
    known = [scores for scores in tasks.values() if scores.teacher_above_chance]
    if known:
        ratios = [float(scores.ratio_above_chance(scores.columns.sum(0))) for scores in known]
        drawn = [s.ratio_above_chance(resampled_sums(s.columns, seed)) for seed, s in enumerate(known)]
        average, interval = sum(ratios) / len(ratios), spread(torch.stack(drawn).mean(0))
        results.append(Result(ALL_TASKS, "accuracy_ratio_above_chance", average, n=len(known), **interval))
    if not tasks:
        return results
    students, teachers, _ = torch.stack([scores.columns.mean(0) for scores in tasks.values()]).unbind(1)
    for tolerance in TOLERANCES:  # win-and-tie rate, arXiv 2603.15590
        rate = (students >= (1 - tolerance) * teachers).double().mean()
        results.append(Result(ALL_TASKS, f"win_and_tie@{tolerance:g}", float(rate), n=len(tasks)))
    return results
