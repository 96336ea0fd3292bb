"""Aggregates runs that differ only in their seed: means, 95% intervals and the significantly best group.

A single seed has no interval. No group is significantly best while its interval overlaps another or is unknown.
"""

import functools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from subquad.config import Recipe, run_name
from subquad.distill.recipe_stages import recipe_stages
from subquad.study.runs import Run

STAGE_NUMBERS = {"matrix": "1", "hidden": "2", "end_to_end": "3"}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95% interval by Student's t; `low` and `high` are None for a single seed."""

    value: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        value, n = statistics.fmean(values), len(values)
        if n < 2:
            return cls(value, None, None, n)
        half_width = stdtrit(n - 1, 0.975) * statistics.stdev(values) / math.sqrt(n)
        return cls(value, value - half_width, value + half_width, n)

    def intervals_disjoint(self, other: "Mean") -> bool:
        """Whether both intervals are known and do not overlap."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.high < other.low or other.high < self.low


@dataclass(frozen=True)
class Group:
    """The runs of one recipe with different seeds.

    name: contains the recipe keys in which the groups of the study differ.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def recipe(self) -> Recipe:
        return self.runs[0].recipe

    @property
    def mixer(self) -> str:
        return self.recipe.student.name

    @property
    def stages(self) -> str:
        """The numbers of the stages: `1+2+3`, and the names of those of other packages."""
        return "+".join(STAGE_NUMBERS.get(name, name) for name in recipe_stages(self.recipe))

    @property
    def copy_qkv(self) -> bool:
        return self.recipe.student.copy_qkv

    @functools.cached_property
    def results(self) -> list[dict[str, Any]]:
        """The results of the finished runs."""
        return [result for run in self.runs if (result := run.result()) is not None]

    def mean(self, metric: str) -> Mean | None:
        """None if no run has measured the metric."""
        values = [result[metric] for result in self.results if result.get(metric) is not None]
        return Mean.of(values) if values else None


def group_by_seed(runs: Iterable[Run]) -> list[Group]:
    """Groups the runs whose recipes differ only in their seed."""
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        by_recipe.setdefault(run.recipe.model_copy(update={"seed": 0}).digest(), []).append(run)
    recipes = [own[0].recipe.model_copy(update={"seed": 0}) for own in by_recipe.values()]
    return [
        Group(run_name(recipe, recipes), tuple(own)) for recipe, own in zip(recipes, by_recipe.values(), strict=True)
    ]


def group_labels(groups: Sequence[Group]) -> dict[str, str]:
    """A short label for each group name: the mixer, with stages and copying where groups of that mixer differ in them.

    Groups that would get the same label are labeled with their name.
    """
    labels = {}
    for group in groups:
        parts = [group.mixer.replace("_", " ")]
        same_mixer = [other for other in groups if other.mixer == group.mixer]
        if len({other.stages for other in same_mixer}) > 1:
            parts.append(group.stages)
        if len({other.copy_qkv for other in same_mixer}) > 1:
            parts.append("copied" if group.copy_qkv else "not copied")
        labels[group.name] = " ".join(parts)
    counts = Counter(labels.values())
    return {name: label if counts[label] == 1 else name for name, label in labels.items()}


def best_group(groups: Sequence[Group], metric: str, lower_is_better: bool) -> Group | None:
    """The group with the best mean; None if no group has measured the metric."""
    values = {group.name: mean.value for group in groups if (mean := group.mean(metric)) is not None}
    measured = [group for group in groups if group.name in values]
    return min(measured, key=lambda group: values[group.name] * (1 if lower_is_better else -1), default=None)


def significant_best(groups: Sequence[Group], metric: str, lower_is_better: bool) -> Group | None:
    """The best group if its interval is disjoint from those of all other groups, else None."""
    best = best_group(groups, metric, lower_is_better)
    mean = None if best is None else best.mean(metric)
    others = [other for group in groups if group is not best and (other := group.mean(metric)) is not None]
    return best if mean is not None and others and all(mean.intervals_disjoint(other) for other in others) else None
