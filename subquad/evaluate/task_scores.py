"""A student's task scores compared with its teacher's, item by item."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.evaluate.results import ALL_TASKS, Result
from subquad.evaluate.statistics import DRAWS, Estimate, estimate, resampled_sums

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

    @property
    def teacher_above_chance(self) -> bool:
        """Whether the teacher's accuracy exceeds chance by more than two standard errors."""
        teacher = self.teacher.double()
        error = teacher.std() / len(teacher) ** 0.5 if len(teacher) > 1 else torch.tensor(float("inf"))
        return bool(teacher.mean() - self.chance > 2 * error)


def accuracy_ratio(scores: TaskScores) -> Estimate:
    """student / teacher."""
    return estimate(scores.columns(), lambda s: s[..., 0] / s[..., 1])


def accuracy_ratio_above_chance(scores: TaskScores) -> Estimate:
    """(student - chance) / (teacher - chance)."""
    return estimate(scores.columns(), _ratio_above(scores.chance))


def _ratio_above(chance: float) -> Callable[[Tensor], Tensor]:
    return lambda s: (s[..., 0] - chance * s[..., 2]) / (s[..., 1] - chance * s[..., 2])


def difference(scores: TaskScores) -> Estimate:
    """student - teacher, by paired bootstrap."""
    return estimate(scores.columns(), lambda s: (s[..., 0] - s[..., 1]) / s[..., 2])


def mean_accuracy_ratio(tasks: Mapping[str, TaskScores], draws: int = DRAWS) -> Estimate | None:
    """The mean of `accuracy_ratio_above_chance` over the tasks on which the teacher is above chance; None without one.

    Items are resampled within each task. `n` counts tasks.
    """
    known = [scores for scores in tasks.values() if scores.teacher_above_chance]
    if not known:
        return None
    ratios = [float(_ratio_above(scores.chance)(scores.columns().sum(0))) for scores in known]
    drawn = [
        _ratio_above(scores.chance)(resampled_sums(scores.columns(), draws, seed)) for seed, scores in enumerate(known)
    ]
    means = torch.stack(drawn).mean(0)
    means = means[means.isfinite()]
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Estimate(sum(ratios) / len(ratios), means.std().item(), low, high, len(known))


def win_and_tie_rate(pairs: Sequence[tuple[float, float]], tolerance: float) -> float:
    """The share of (student, teacher) task scores with student >= (1 - tolerance) teacher (arXiv 2603.15590)."""
    if not pairs:
        raise ValueError("pairs is empty; expected at least one task")
    return sum(student >= (1 - tolerance) * teacher for student, teacher in pairs) / len(pairs)


def accuracy_results(task: str, scores: TaskScores) -> list[Result]:
    """`accuracy_ratio`, `accuracy_ratio_above_chance`, `difference` and `teacher_above_chance` (0 or 1) of a task."""
    return [
        accuracy_ratio(scores).result(task, "accuracy_ratio"),
        accuracy_ratio_above_chance(scores).result(task, "accuracy_ratio_above_chance"),
        difference(scores).result(task, "difference"),
        Result(task, "teacher_above_chance", float(scores.teacher_above_chance), n=len(scores.student)),
    ]


def summary_results(scores: Mapping[str, TaskScores]) -> list[Result]:
    """Over tasks: the mean `accuracy_ratio_above_chance`, and `win_and_tie@t` for each tolerance t."""
    mean = mean_accuracy_ratio(scores)
    results = [] if mean is None else [mean.result(ALL_TASKS, "accuracy_ratio_above_chance")]
    pairs = [(float(pair.student.mean()), float(pair.teacher.mean())) for pair in scores.values()]
    return results + [
        Result(ALL_TASKS, f"win_and_tie@{t:g}", win_and_tie_rate(pairs, t), n=len(pairs)) for t in TOLERANCES
    ]
