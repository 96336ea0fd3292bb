"""A student's task scores compared with its teacher's, item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.evaluate.results import ALL_TASKS, Result
from subquad.evaluate.statistics import estimate, resampled_sums, spread

TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class TaskScores:
    """Scores of student and teacher on the same items, `[n]` each, and the expected score of guessing."""

    student: Tensor
    teacher: Tensor
    chance: float

    def columns(self) -> Tensor:
        """`[n, 3]`: student, teacher, ones."""
        return torch.stack([self.student.double(), self.teacher.double(), torch.ones(len(self.student)).double()], 1)

    def ratio_above_chance(self, sums: Tensor) -> Tensor:
        """(student - chance) / (teacher - chance) from sums of the columns."""
        student, teacher, count = sums.unbind(-1)
        return (student - self.chance * count) / (teacher - self.chance * count)

    @property
    def teacher_above_chance(self) -> bool:
        """Whether the teacher's accuracy exceeds chance by more than two standard errors."""
        teacher = self.teacher.double()
        return len(teacher) > 1 and bool(teacher.mean() - self.chance > 2 * teacher.std() / len(teacher) ** 0.5)


def accuracy_results(task: str, scores: TaskScores) -> list[Result]:
    """`accuracy_ratio` (student / teacher), `accuracy_ratio_above_chance`, `difference` (student - teacher), each with
    an interval by paired bootstrap, and `teacher_above_chance` (0 or 1)."""
    columns = scores.columns()
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
        ratios = [float(scores.ratio_above_chance(scores.columns().sum(0))) for scores in known]
        drawn = [s.ratio_above_chance(resampled_sums(s.columns(), seed)) for seed, s in enumerate(known)]
        mean, interval = sum(ratios) / len(ratios), spread(torch.stack(drawn).mean(0))
        results.append(Result(ALL_TASKS, "accuracy_ratio_above_chance", mean, n=len(known), **interval))
    pairs = [(float(pair.student.mean()), float(pair.teacher.mean())) for pair in tasks.values()]
    rates = [(f"win_and_tie@{t:g}", win_and_tie_rate(pairs, t)) for t in TOLERANCES] if pairs else []
    return results + [Result(ALL_TASKS, metric, rate, n=len(pairs)) for metric, rate in rates]


def win_and_tie_rate(pairs: Sequence[tuple[float, float]], tolerance: float) -> float:
    """The share of (student, teacher) task scores with student >= (1 - tolerance) teacher (arXiv 2603.15590)."""
    return sum(student >= (1 - tolerance) * teacher for student, teacher in pairs) / len(pairs)
