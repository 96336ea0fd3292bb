"""What a student keeps of its teacher's scores on tasks, item by item."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.evaluate.results import Result
from subquad.evaluate.statistics import DRAWS, Estimate, estimate, resampled_sums

TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1)
OVER_TASKS = "all tasks"


@dataclass(frozen=True)
class TaskScores:
    """A task's scores of student and teacher on the same items, `[n]` each, and the score of guessing."""

    student: Tensor
    teacher: Tensor
    chance: float

    def columns(self) -> Tensor:
        return torch.stack([self.student.double(), self.teacher.double(), torch.ones(len(self.student)).double()], 1)

    @property
    def teacher_knows(self) -> bool:
        """Whether the teacher is above chance by two standard errors: else there is nothing to be kept."""
        teacher = self.teacher.double()
        error = teacher.std() / len(teacher) ** 0.5 if len(teacher) > 1 else torch.tensor(float("inf"))
        return bool(teacher.mean() - self.chance > 2 * error)


def recovered(scores: TaskScores) -> Estimate:
    """Student over teacher."""
    return estimate(scores.columns(), lambda s: s[..., 0] / s[..., 1])


def recovered_above_chance(scores: TaskScores) -> Estimate:
    """(student - chance) over (teacher - chance)."""
    return estimate(scores.columns(), _above(scores.chance))


def _above(chance: float) -> Callable[[Tensor], Tensor]:
    return lambda s: (s[..., 0] - chance * s[..., 2]) / (s[..., 1] - chance * s[..., 2])


def difference(scores: TaskScores) -> Estimate:
    """Student minus teacher: the paired bootstrap."""
    return estimate(scores.columns(), lambda s: (s[..., 0] - s[..., 1]) / s[..., 2])


def mean_recovered(tasks: Mapping[str, TaskScores], draws: int = DRAWS) -> Estimate | None:
    """The mean of `recovered_above_chance` over the tasks on which the teacher knows something; None without one.

    Items are drawn anew within each task.
    """
    known = [scores for scores in tasks.values() if scores.teacher_knows]
    if not known:
        return None
    shares = [float(_above(scores.chance)(scores.columns().sum(0))) for scores in known]
    drawn = [_above(scores.chance)(resampled_sums(scores.columns(), draws, seed)) for seed, scores in enumerate(known)]
    means = torch.stack(drawn).mean(0)
    means = means[means.isfinite()]
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Estimate(sum(shares) / len(shares), means.std().item(), low, high, len(known))


def win_and_tie_rate(pairs: Sequence[tuple[float, float]], tolerance: float) -> float:
    """Share of (student, teacher) scores of tasks in which the student reaches (1 - tolerance) times the teacher's
    score or more (arXiv 2603.15590)."""
    if not pairs:
        raise ValueError("pairs is empty; expected at least one task")
    return sum(student >= (1 - tolerance) * teacher for student, teacher in pairs) / len(pairs)


def recovery_results(task: str, scores: TaskScores) -> list[Result]:
    """A task's `recovered_share` (student over teacher), the same above chance, and the paired `difference`."""
    return [
        recovered(scores).row(task, "recovered_share"),
        recovered_above_chance(scores).row(task, "recovered_share_above_chance"),
        difference(scores).row(task, "difference"),
        Result(task, "teacher_above_chance", float(scores.teacher_knows), n=len(scores.student)),
    ]


def summary_results(scores: Mapping[str, TaskScores]) -> list[Result]:
    """Over tasks: the mean `recovered_share` above chance where the teacher is above it, and `win_and_tie@t` over all,
    t the tolerance."""
    mean = mean_recovered(scores)
    rows = [] if mean is None else [mean.row(OVER_TASKS, "recovered_share")]
    pairs = [(float(pair.student.mean()), float(pair.teacher.mean())) for pair in scores.values()]
    return rows + [
        Result(OVER_TASKS, f"win_and_tie@{t:g}", win_and_tie_rate(pairs, t), n=len(pairs)) for t in TOLERANCES
    ]
