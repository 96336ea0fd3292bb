"""Estimates the remaining training time from the speeds that runs in the same directory have measured."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.recipe_stages import stage_keys, stage_tokens
from subquad.distill.stage_cache import StageCache
from subquad.study.runs import METRICS, Run

Speeds = dict[tuple[str, str], float]
"""Tokens per second by (mixer, stage)."""


def training_metrics(run: Run) -> list[dict[str, Any]]:
    """The lines of the run's `metrics.jsonl` that report training steps."""
    return [line for line in read_jsonl(run.directory / METRICS) if line.get("tokens_per_second")]


def measured_speeds(runs: Iterable[Run]) -> Speeds:
    """Returns the median over runs of their last reported speed, by mixer and stage."""
    values: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        last = {line["stage"]: line["tokens_per_second"] for line in training_metrics(run)}
        for stage, speed in last.items():
            values.setdefault((run.recipe.student.name, stage), []).append(speed)
    return {key: statistics.median(own) for key, own in values.items()}


def estimated_speed(speeds: Speeds, mixer: str, stage: str) -> float | None:
    """The speed of a mixer in a stage; if unmeasured, the median of the other mixers; None if none is measured."""
    own = speeds.get((mixer, stage))
    others = [speed for (_, name), speed in speeds.items() if name == stage]
    return own or (statistics.median(others) if others else None)


@dataclass(frozen=True)
class RemainingWork:
    """The tokens that a run has yet to train on, by stage, without the stages that another run trains for it."""

    run: Run
    tokens: dict[str, int]

    def seconds(self, speeds: Speeds) -> float | None:
        """Estimated training time; None if the speed of a stage is unknown."""
        total = 0.0
        for stage, tokens in self.tokens.items():
            speed = estimated_speed(speeds, self.run.recipe.student.name, stage)
            if speed is None:
                return None
            total += tokens / speed
        return total


def remaining_work(runs: Sequence[Run], stage_cache: StageCache) -> list[RemainingWork]:
    """Returns the remaining work of every run. A shared stage counts for the first run that needs it."""
    remaining, counted = [], set()
    for run in runs:
        if run.state == "finished":
            remaining.append(RemainingWork(run, {}))
            continue
        done = {line["stage"]: line["tokens"] for line in training_metrics(run)}
        tokens = {}
        for stage, total in stage_tokens(run.recipe).items():
            key = stage_keys(run.recipe)[stage]
            if key in counted or stage_cache.has(key):
                continue
            if key in stage_cache.shared_keys:
                counted.add(key)
            if total > done.get(stage, 0):
                tokens[stage] = total - done.get(stage, 0)
        remaining.append(RemainingWork(run, tokens))
    return remaining


def remaining_seconds(remaining: Iterable[RemainingWork], speeds: Speeds, jobs: int = 1) -> float | None:
    """Estimated seconds to train all runs, `jobs` at a time; None if a speed is unknown."""
    seconds = []
    for work in remaining:
        estimate = work.seconds(speeds)
        if estimate is None:
            return None
        seconds.append(estimate)
    return max([sum(seconds) / jobs, *seconds], default=0.0)


def format_duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `4.2 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def format_count(number: float) -> str:
    """`640`, `49k`, `1.2M`, `3.0B`."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number / 1e3:.0f}k" if number >= 1e3 else f"{number:.0f}"
