"""A study: every student of a recipe with lists, each once, and their results in one place.

    rows = run_study(load_study("recipes/nano.yaml"), "demo")

Which runs there are and what is left of them is read from the directory; a study that was cut off, or whose recipe has
changed, does what is missing.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from subquad.config import Recipe
from subquad.data import check_data
from subquad.distill.pipeline import stage_keys, stage_tokens
from subquad.distill.stage_cache import StageCache
from subquad.modeling.teachers import check_reference
from subquad.study.eta import RemainingWork, Speeds, amount, expected, remaining_work, speeds, spoken
from subquad.study.evaluation import check_suites, evaluate_study
from subquad.study.execute import Task
from subquad.study.local_engine import run_here, run_in_processes
from subquad.study.lock import StudyLock
from subquad.study.progress import INTERVAL, ProgressReporter
from subquad.study.results import table_rows, write_results
from subquad.study.runs import Run, all_runs, find_runs
from subquad.study.scheduler import Scheduler
from subquad.utils import UserError, nearest

ENGINES = ("local", "ray")
STAGES = ".stages"


def run_study(
    recipes: Sequence[Recipe],
    output: str | os.PathLike,
    *,
    jobs: int = 1,
    engine: str = "local",
    suites: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    interval: float = INTERVAL,
) -> list[dict[str, Any]]:
    """Distils every recipe into a directory of its own below `output`; finished runs are left as they are, others go on
    from their last checkpoint, and failed ones are tried again. Whatever goes wrong with one stays in its `error.json`
    and does not stop the others.

    After each run `results.json` and `results.sqlite` are written anew.

    Args:
        jobs: runs at once on a machine.
        engine: `local`, or `ray`: on all machines of the cluster at `RAY_ADDRESS`.
        suites: of `subquad eval`; all finished students are measured by them at the end.
        say: is called with a line whenever there is something to tell, at least every `interval` seconds.

    Returns:
        A row of results for each finished run.

    Raises:
        UserError: what is wrong with teachers, corpora, suites or options, before anything is loaded; another study at
            work in `output`.
    """
    output = Path(output)
    check(recipes, jobs, engine, suites)
    runs = find_runs(recipes, output)
    with StudyLock(output) as lock:
        shared = shared_stages(runs, output)
        board = Scheduler(Task(run, shared) for run in runs if run.state != "finished")
        live = ProgressReporter(runs, shared, lambda: under_way(board, engine), say, jobs, interval)

        def changed() -> None:
            if live.changed():
                write_results(output, runs)

        write_results(output, runs)
        shared.prune(needed(runs))
        with live.ticking():
            run_all(board, jobs, engine, lock, changed)
        shared.prune(needed(runs))
        if suites:
            for name, why in evaluate_study(runs, output, suites).items():
                say(f"{name} failed: {why}")
            write_results(output, runs)
        return table_rows(runs)


def check(recipes: Sequence[Recipe], jobs: int, engine: str, suites: Sequence[str]) -> None:
    """UserError for what can be told before anything is loaded or written."""
    if jobs < 1:
        raise UserError(f"jobs: got {jobs}, expected at least 1")
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}{nearest(engine, ENGINES)}")
    if engine == "ray":
        from subquad.study.ray_engine import import_ray

        import_ray()
    if suites:
        check_suites(suites)
    for recipe in recipes:
        check_reference(recipe.teacher)
        check_data(recipe.data)


def run_all(board: Scheduler, jobs: int, engine: str, lock: StudyLock, changed: Callable[[], None]) -> None:
    if engine == "ray":
        from subquad.study.ray_engine import run_on_cluster

        run_on_cluster(board, jobs, changed)
    elif jobs == 1:
        run_here(board, changed)
    else:
        run_in_processes(board, jobs, lock, changed)


def under_way(board: Scheduler, engine: str) -> list[Run]:
    """Of those that Ray has, the ones that it has started."""
    given = [task.run for task in list(board.running)]
    return [run for run in given if run.state == "unfinished"] if engine == "ray" else given


def shared_stages(runs: Sequence[Run], output: Path) -> StageCache:
    return StageCache.among(output / STAGES, [stage_keys(run.recipe).values() for run in runs])


def needed(runs: Iterable[Run]) -> set[str]:
    """Keys of the stages of runs that have not ended."""
    return {key for run in runs if run.state != "finished" for key in stage_keys(run.recipe).values()}


def describe_plan(recipes: Sequence[Recipe], output: str | os.PathLike, jobs: int = 1) -> str:
    """What a study would do: its runs, the tokens that are left to each, and how long that takes as far as runs in the
    directory have shown."""
    runs = find_runs(recipes, Path(output))
    left = remaining_work(runs, shared_stages(runs, Path(output)))
    known = speeds(all_runs(Path(output)))
    cells = [["run", "state", "tokens", "left", "expected"]]
    for one in left:
        seconds = one.seconds(known)
        whole, rest = sum(stage_tokens(one.run.recipe).values()), sum(one.tokens.values())
        time = "" if not rest else "unknown" if seconds is None else spoken(seconds)
        cells.append([one.run.name, one.run.state, amount(whole), amount(rest) if rest else "", time])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    todo = sum(one.run.state != "finished" for one in left)
    tokens = sum(sum(one.tokens.values()) for one in left)
    return "\n".join(
        [*lines, "", f"{len(runs)} runs, {todo} to do, {amount(tokens)} tokens; {told(left, known, jobs)}"]
    )


def told(left: Sequence[RemainingWork], known: Speeds, jobs: int) -> str:
    """The expected time in words, with what it rests on."""
    seconds = expected(left, known, jobs)
    if seconds is None:
        return "time unknown: no run here has shown the speed of every stage"
    if not seconds:
        return "nothing is left to train"
    guessed = any((one.run.recipe.student.name, stage) not in known for one in left for stage in one.tokens)
    others = ", for some mixers that of others" if guessed else ""
    return f"about {spoken(seconds)} of training at the speed that runs here have shown{others}"
