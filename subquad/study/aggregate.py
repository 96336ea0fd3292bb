"""Runs that differ in nothing but their seed as one: means with intervals, and what may be called better.

Honest with few runs: one seed has no interval, and nothing is best where intervals overlap.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from subquad.config import Recipe, run_name
from subquad.study.results import stage_names
from subquad.study.runs import Run

T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5% of Student's t with 1 to 30 degrees of freedom."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its 95% interval, by Student's t; without one where there is but one seed."""

    value: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        value, n = statistics.fmean(values), len(values)
        if n < 2:
            return cls(value, None, None, n)
        quantile = T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else 1.96 + 2.5 / (n - 1)
        half = quantile * statistics.stdev(values) / math.sqrt(n)
        return cls(value, value - half, value + half, n)

    def intervals_disjoint(self, other: "Mean") -> bool:
        """Whether the two intervals are known and do not overlap."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.high < other.low or other.high < self.low


@dataclass(frozen=True)
class Group:
    """Runs of one recipe but for the seed.

    name: the keys in which the groups of the study differ.
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
        """`1+2+3`: the stages by number."""
        numbers = {"matrix": "1", "hidden": "2", "end_to_end": "3"}
        return "+".join(numbers[name] for name in stage_names(self.recipe))

    @property
    def copied(self) -> bool:
        return self.recipe.student.copy_qkv

    @functools.cached_property
    def finished(self) -> list[dict[str, Any]]:
        """The rows of its finished runs."""
        return [result["row"] for run in self.runs if (result := run.result()) is not None]

    def mean(self, metric: str) -> Mean | None:
        """None where no run has it."""
        values = [row[metric] for row in self.finished if row.get(metric) is not None]
        return Mean.of(values) if values else None


def groups(runs: Iterable[Run]) -> list[Group]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        tree = run.recipe.model_dump(mode="json")
        found.setdefault(json.dumps({**tree, "seed": None}, sort_keys=True), []).append(run)
    plain = {key: own[0].recipe.model_copy(update={"seed": 0}) for key, own in found.items()}
    return [Group(run_name(plain[key], list(plain.values())), tuple(own)) for key, own in found.items()]


def labels(among: Sequence[Group]) -> dict[str, str]:
    """A short name of each group: its mixer, and what of stages, copying and all else tells it from the others."""
    short = {}
    for group in among:
        parts = [group.mixer.replace("_", " ")]
        rivals = [other for other in among if other.mixer == group.mixer]
        if len({other.stages for other in rivals}) > 1:
            parts.append(group.stages)
        if len({other.copied for other in rivals}) > 1:
            parts.append("copied" if group.copied else "fresh")
        short[group.name] = " ".join(parts)
    for group in among:
        same = [other for other in among if short[other.name] == short[group.name]]
        if len(same) > 1:
            short.update({other.name: other.name for other in same})
    return short


def best(among: Sequence[Group], metric: str, lower: bool) -> Group | None:
    """The group with the best mean; None where nothing has been measured."""
    known = [(mean.value, group) for group in among if (mean := group.mean(metric)) is not None]
    if not known:
        return None
    choose: Callable[..., Any] = min if lower else max
    return choose(known, key=lambda pair: pair[0])[1]


def significant_best(among: Sequence[Group], metric: str, lower: bool) -> Group | None:
    """The best, where its interval lies apart from that of every other; else None."""
    first = best(among, metric, lower)
    if first is None:
        return None
    mine = first.mean(metric)
    others = [mean for group in among if group is not first and (mean := group.mean(metric)) is not None]
    return first if mine is not None and others and all(mine.intervals_disjoint(other) for other in others) else None
