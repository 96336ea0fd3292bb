"""Runs a study: one run for each recipe of a grid, with all results in one directory.

    results = run_study(load_study("recipes/nano.yaml"), "demo")

The state of the study is read from its directory. Running it again executes only the runs that are new, failed or
unfinished.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from subquad.config import Recipe
from subquad.data import check_data
from subquad.distill.recipe_stages import stage_keys, stage_tokens
from subquad.distill.stage_cache import StageCache
from subquad.modeling.teachers import check_reference
from subquad.study.eta import (
    RemainingWork,
    Speeds,
    format_count,
    format_duration,
    measured_speeds,
    remaining_seconds,
    remaining_work,
)
from subquad.study.evaluation import check_suites, evaluate_study
from subquad.study.local_engine import run_in_processes, run_sequentially
from subquad.study.lock import StudyLock
from subquad.study.progress import INTERVAL, ProgressReporter
from subquad.study.results import run_results, write_results
from subquad.study.runs import Run, all_runs, find_runs
from subquad.study.scheduler import Scheduler
from subquad.utils import UserError, nearest

ENGINES = ("local", "ray")
STAGE_CACHE = ".stages"
"""Directory of shared stages below the output."""


def run_study(
    recipes: Sequence[Recipe],
    output: str | os.PathLike,
    *,
    jobs: int = 1,
    engine: str = "local",
    suites: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
    interval: float = INTERVAL,
) -> list[dict[str, Any]]:
    """Distills every recipe into its own directory below `output`.

    Skips finished runs, resumes unfinished ones from their last checkpoint and retries failed ones. A failed run writes
    `error.json` and does not stop the others. `results.json` and `results.sqlite` are rewritten after each run.

    Args:
        jobs: number of runs at once on one machine.
        engine: `local`, or `ray` for all machines of the cluster at `RAY_ADDRESS`.
        suites: suites of `subquad eval` with which all finished students are evaluated at the end.
        log: called with one line of progress, at least every `interval` seconds.

    Returns:
        The result of each finished run: metrics by name, with the run's name under `run`.

    Raises:
        UserError: an invalid teacher, corpus, suite or option, found before any model is loaded; another study is
            running in `output`.
    """
    output = Path(output)
    check(recipes, jobs, engine, suites)
    runs = find_runs(recipes, output)
    with StudyLock(output) as lock:
        stage_cache = shared_stages(runs, output)
        scheduler = Scheduler((run for run in runs if run.state != "finished"), stage_cache)
        progress = ProgressReporter(runs, stage_cache, lambda: running_runs(scheduler, engine), log, jobs, interval)

        def on_change() -> None:
            if progress.log_ended_runs():
                write_results(output, runs)

        write_results(output, runs)
        stage_cache.prune(needed_stage_keys(runs))
        with progress.periodic_status():
            run_all(scheduler, jobs, engine, lock, on_change)
        stage_cache.prune(needed_stage_keys(runs))
        if suites:
            for name, reason in evaluate_study(runs, output, suites).items():
                log(f"{name} failed: {reason}")
            write_results(output, runs)
        return run_results(runs)


def check(recipes: Sequence[Recipe], jobs: int, engine: str, suites: Sequence[str]) -> None:
    """Raises UserError for invalid arguments. Loads no model and writes no file."""
    if jobs < 1:
        raise UserError(f"jobs: got {jobs}, expected at least 1")
    if engine not in ENGINES:
        raise UserError(f"engine: got {engine!r}{nearest(engine, ENGINES)}")
    if engine == "ray":
        from subquad.study.ray_engine import import_ray

        import_ray()
    if suites:
        check_suites(suites)
    for recipe in recipes:
        check_reference(recipe.teacher)
        check_data(recipe.data)


def run_all(scheduler: Scheduler, jobs: int, engine: str, lock: StudyLock, on_change: Callable[[], None]) -> None:
    if engine == "ray":
        from subquad.study.ray_engine import run_on_cluster

        run_on_cluster(scheduler, jobs, on_change)
    elif jobs == 1:
        run_sequentially(scheduler, on_change)
    else:
        run_in_processes(scheduler, jobs, lock, on_change)


def running_runs(scheduler: Scheduler, engine: str) -> list[Run]:
    """The runs that are being executed; of those submitted to Ray, the ones that Ray has started."""
    runs = list(scheduler.running)
    return [run for run in runs if run.state == "unfinished"] if engine == "ray" else runs


def shared_stages(runs: Sequence[Run], output: Path) -> StageCache:
    return StageCache.for_runs(output / STAGE_CACHE, [stage_keys(run.recipe).values() for run in runs])


def needed_stage_keys(runs: Iterable[Run]) -> set[str]:
    """Stage keys of the runs that are not finished."""
    return {key for run in runs if run.state != "finished" for key in stage_keys(run.recipe).values()}


def describe_remaining_work(recipes: Sequence[Recipe], output: str | os.PathLike, jobs: int = 1) -> str:
    """A table of the runs with their remaining tokens and estimated time. Changes nothing (`--dry-run`)."""
    runs = find_runs(recipes, Path(output))
    remaining = remaining_work(runs, shared_stages(runs, Path(output)))
    speeds = measured_speeds(all_runs(Path(output)))
    cells = [["run", "state", "tokens", "left", "expected"]]
    for work in remaining:
        seconds = work.seconds(speeds)
        total, left = sum(stage_tokens(work.run.recipe).values()), sum(work.tokens.values())
        time = "" if not left else "unknown" if seconds is None else format_duration(seconds)
        cells.append([work.run.name, work.run.state, format_count(total), format_count(left) if left else "", time])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    to_do = sum(work.run.state != "finished" for work in remaining)
    tokens = format_count(sum(sum(work.tokens.values()) for work in remaining))
    summary = f"{len(runs)} runs, {to_do} to do, {tokens} tokens; {describe_time(remaining, speeds, jobs)}"
    return "\n".join([*lines, "", summary])


def describe_time(remaining: Sequence[RemainingWork], speeds: Speeds, jobs: int) -> str:
    """The estimated time and the measurements behind it."""
    seconds = remaining_seconds(remaining, speeds, jobs)
    if seconds is None:
        return "time unknown: no run in this directory has measured the speed of every stage"
    if not seconds:
        return "no training left"
    guessed = any((work.run.recipe.student.name, stage) not in speeds for work in remaining for stage in work.tokens)
    source = ", for some mixers at that of others" if guessed else ""
    return f"about {format_duration(seconds)} of training at the speed measured in this directory{source}"
