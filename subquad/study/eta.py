"""How long runs take: from the speeds that runs of the same directory have shown, and from nothing else."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from subquad.distill.pipeline import stage_keys, stage_tokens
from subquad.distill.progress import read_jsonl
from subquad.distill.stage_cache import StageCache
from subquad.study.runs import Run

Speeds = dict[tuple[str, str], float]


def measured(run: Run) -> list[dict[str, Any]]:
    """What a run has reported of its training so far."""
    return [row for row in read_jsonl(run.directory / "metrics.jsonl") if row.get("tokens_per_second")]


def speeds(runs: Iterable[Run]) -> Speeds:
    """Tokens per second by mixer and stage: the median of the runs that have shown one."""
    shown: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        last = {row["stage"]: row["tokens_per_second"] for row in measured(run)}
        for stage, speed in last.items():
            shown.setdefault((run.recipe.student.name, stage), []).append(speed)
    return {key: statistics.median(values) for key, values in shown.items()}


def speed_of(known: Speeds, mixer: str, stage: str) -> float | None:
    """Of a mixer that has not been through this stage yet, that of the others."""
    own = known.get((mixer, stage))
    others = [value for (_, name), value in known.items() if name == stage]
    return own or (statistics.median(others) if others else None)


@dataclass(frozen=True)
class RemainingWork:
    """Tokens that a run still has to go through, by stage; what another run trains for it not counted."""

    run: Run
    tokens: dict[str, int]

    def seconds(self, known: Speeds) -> float | None:
        """None where some stage's speed is not known."""
        total = 0.0
        for stage, tokens in self.tokens.items():
            speed = speed_of(known, self.run.recipe.student.name, stage)
            if speed is None:
                return None
            total += tokens / speed
        return total


def remaining_work(runs: Sequence[Run], shared: StageCache) -> list[RemainingWork]:
    """Of every run. A stage that several have in common counts for the first of them."""
    left, counted = [], set()
    for run in runs:
        if run.state == "finished":
            left.append(RemainingWork(run, {}))
            continue
        reached = {row["stage"]: row["tokens"] for row in measured(run)}
        tokens = {}
        for stage, whole in stage_tokens(run.recipe).items():
            key = stage_keys(run.recipe)[stage]
            if key in counted or shared.has(key):
                continue
            if key in shared.wanted:
                counted.add(key)
            if whole > reached.get(stage, 0):
                tokens[stage] = whole - reached.get(stage, 0)
        left.append(RemainingWork(run, tokens))
    return left


def expected(left: Iterable[RemainingWork], known: Speeds, jobs: int = 1) -> float | None:
    """Seconds of training for all of them, `jobs` at a time; None where a speed is not known."""
    each = [one.seconds(known) for one in left]
    if any(seconds is None for seconds in each):
        return None
    whole = [seconds for seconds in each if seconds is not None]
    return max([sum(whole) / jobs, *whole], default=0.0)


def spoken(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `4.2 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def amount(tokens: float) -> str:
    """`640`, `49k`, `1.2M`, `3.0B` tokens."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return f"{tokens / size:.1f}{unit}"
    return f"{tokens / 1e3:.0f}k" if tokens >= 1e3 else f"{tokens:.0f}"
