"""Reports the progress of a study, one line at a time, from the files of its runs. Works the same for every engine."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from subquad.distill.recipe_stages import stage_tokens
from subquad.distill.stage_cache import StageCache
from subquad.study.eta import (
    format_count,
    format_duration,
    measured_speeds,
    remaining_seconds,
    remaining_work,
    training_metrics,
)
from subquad.study.runs import Run

INTERVAL = 30.0
"""Seconds between status lines."""
MAX_RUNS_SHOWN = 4
"""Running runs that a status line describes."""


class ProgressReporter:
    """Passes lines about the runs of a study to `log`. Runs that were finished before are only counted.

    running: returns the runs that are being executed.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        stage_cache: StageCache,
        running: Callable[[], list[Run]],
        log: Callable[[str], None],
        jobs: int = 1,
        interval: float = INTERVAL,
    ):
        self.runs, self.stage_cache, self.running, self.log = list(runs), stage_cache, running, log
        self.jobs, self.interval = jobs, interval
        self.ended = {run.name for run in runs if run.state == "finished"}
        self.failed_before = {run.name for run in runs if run.state == "failed"}

    @contextlib.contextmanager
    def periodic_status(self) -> Iterator[None]:
        """Logs a status line every `interval` seconds, from a thread."""
        stop = threading.Event()

        def loop() -> None:
            while not stop.wait(self.interval):
                self.log(self.status_line())

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def log_ended_runs(self) -> bool:
        """Logs the runs that have ended since the last call; returns whether there are any."""
        before = len(self.ended)
        running = {run.name for run in self.running()}
        self.failed_before -= running
        for run in self.runs:
            if run.name in self.ended or run.name in running or run.name in self.failed_before:
                continue
            if run.state in ("finished", "failed"):
                self.ended.add(run.name)
                self.log(f"[{len(self.ended)}/{len(self.runs)}] {run_outcome(run)}")
        return len(self.ended) > before

    def status_line(self) -> str:
        """`3 of 12 done, 1 failed, 2 running (...); about 14 min of training left`"""
        running = self.running()
        names = {run.name for run in running}
        states = [run.state for run in self.runs if run.name not in names]
        parts = [f"{states.count('finished')} of {len(self.runs)} done"]
        if states.count("failed"):
            parts.append(f"{states.count('failed')} failed")
        shown = "; ".join(run_progress(run) for run in running[:MAX_RUNS_SHOWN])
        more = f"; and {len(running) - MAX_RUNS_SHOWN} more" if len(running) > MAX_RUNS_SHOWN else ""
        parts.append(f"{len(running)} running" + (f" ({shown}{more})" if running else ""))
        pending = [run for run in self.runs if run.name in names or run.state in ("new", "unfinished")]
        seconds = remaining_seconds(remaining_work(pending, self.stage_cache), measured_speeds(self.runs), self.jobs)
        return ", ".join(parts) + ("" if seconds is None else f"; about {format_duration(seconds)} of training left")


def run_outcome(run: Run) -> str:
    """The result or the error of an ended run in one line."""
    result = run.result()
    if result is None:
        return f"{run.name} failed: {run.error_line()}"
    return (
        f"{run.name}: perplexity {result['perplexity']:.2f} (teacher {result['teacher_perplexity']:.2f}), recovered "
        f"{result['recovered_share']:.1%}, {result['seconds']:.0f} s"
    )


def run_progress(run: Run) -> str:
    """`gla hidden 62%: loss 0.301, 812 tok/s`"""
    metrics = training_metrics(run)
    if not metrics:
        return f"{run.name} starting"
    last = metrics[-1]
    total = stage_tokens(run.recipe).get(last["stage"], 0)
    share = f" {last['tokens'] / total:.0%}" if total else ""
    return (
        f"{run.name} {last['stage']}{share}: loss {last['loss']:.3g}, {format_count(last['tokens_per_second'])} tok/s"
    )
