"""Runs a study: one run for each recipe of a grid, with all results in one directory.

    results = run_study(load_study("nano"), "demo")

The state of the study is read from its directory. Running it again executes only the runs that are new, failed or
unfinished.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from subquad import progress
from subquad.config import Recipe
from subquad.data import check_data
from subquad.distill.recipe_stages import stage_keys
from subquad.evaluate import command
from subquad.evaluate.suites import settings_for
from subquad.modeling.teachers import check_reference
from subquad.study.engines import Scheduler, run_in_processes, run_sequentially
from subquad.study.progress import repeated, run_outcome, shared_stages, status_line
from subquad.study.ray_engine import import_ray, run_on_cluster
from subquad.study.results import RESULTS, run_results, write_results
from subquad.study.runs import Run, find_runs
from subquad.utils import UserError, exclusive, nearest, write_json_atomic

logger = logging.getLogger(__name__)
ENGINES = ("local", "ray")
INTERVAL = 30.0
"""Seconds between status lines."""


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
    with exclusive(output / ".lock", "study", output):
        stage_cache = shared_stages(runs, output)

        def on_end(run: Run) -> None:
            ended = len(runs) - len(scheduler.waiting) - len(scheduler.running)
            log(f"[{ended}/{len(runs)}] {run_outcome(run)}")
            write_results(output, runs)

        def prune() -> None:
            unfinished = (run for run in runs if run.state != "finished")
            stage_cache.prune(key for run in unfinished for key in stage_keys(run.recipe).values())

        scheduler = Scheduler(runs, stage_cache, on_end)
        write_results(output, runs)
        prune()
        status = repeated(log, lambda: status_line(runs, list(scheduler.running), stage_cache, jobs), interval)
        with progress.hidden("lines"), status:
            if engine == "ray":
                run_on_cluster(scheduler, jobs)
            elif jobs == 1:
                run_sequentially(scheduler)
            else:
                run_in_processes(scheduler, jobs)
        prune()
        if suites:
            if failed := evaluate_study(runs, output, suites):
                log(f"{len(failed)} parts of the evaluation failed: {', '.join(failed)}")
            write_results(output, runs)
        return run_results(runs)


def check(recipes: Sequence[Recipe], jobs: int, engine: str, suites: Sequence[str]) -> None:
    """Raises UserError for invalid arguments. Loads no model and writes no file."""
    if jobs < 1:
        raise UserError(f"jobs: got {jobs}, expected at least 1")
    if engine not in ENGINES:
        raise UserError(f"engine: got {engine!r}{nearest(engine, ENGINES)}")
    if engine == "ray":
        import_ray()
    if suites:
        settings_for(suites)
    for recipe in recipes:
        check_reference(recipe.teacher, "teacher")
        check_data(recipe.data)


def evaluate_study(runs: Sequence[Run], output: Path, suites: Sequence[str]) -> dict[str, str]:
    """Evaluates the finished students against their teacher, as `subquad eval` does, into `output`/evaluation, or with
    several teachers or corpora into one directory for each.

    Existing results are reused. One student is in memory at a time. Returns the failed parts: name and reason.
    """
    by_teacher: dict[str, list[Run]] = {}
    for run in runs:
        if run.state == "finished":
            by_teacher.setdefault(f"{run.recipe.teacher} {run.recipe.data.model_dump_json()}", []).append(run)
    failed: dict[str, str] = {}
    for number, group in enumerate(by_teacher.values(), 1):
        directory = output / ("evaluation" if number == 1 else f"evaluation-{number}")
        teacher = group[0].recipe.teacher
        logger.info("evaluating %d students against %s", len(group), teacher)
        results: dict[tuple, dict[str, Any]] = {}
        for run in group:  # the results of the teacher are cached, so it is evaluated once
            report = command.run([str(run.directory)], teacher=teacher, suites=suites, output=str(directory))
            failed |= report.failed
            for result in report.results:
                results.setdefault(result.key, result.as_dict())
            write_json_atomic(directory / RESULTS, {**report.header, "results": [*results.values()]})
    return failed
