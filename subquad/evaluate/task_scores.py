"""A student's task scores compared with its teacher's, item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from subquad.evaluate.results import ALL_TASKS, Result
from subquad.evaluate.statistics import estimate, resampled_sums, spread

TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1)


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
        mean, interval = sum(ratios) / len(ratios), spread(torch.stack(drawn).mean(0))
        results.append(Result(ALL_TASKS, "accuracy_ratio_above_chance", mean, n=len(known), **interval))
    if not tasks:
        return results
    students, teachers, _ = torch.stack([scores.columns.mean(0) for scores in tasks.values()]).unbind(1)
    for tolerance in TOLERANCES:  # win-and-tie rate, arXiv 2603.15590
        rate = (students >= (1 - tolerance) * teachers).double().mean()
        results.append(Result(ALL_TASKS, f"win_and_tie@{tolerance:g}", float(rate), n=len(tasks)))
    return results
