"""What a study says while it runs, a line at a time, told from what its runs leave on disk: the same for one process,
many, or many machines, on a terminal or in a log."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from subquad.distill.pipeline import stage_tokens
from subquad.distill.stage_cache import StageCache
from subquad.study.eta import amount, expected, measured, remaining_work, speeds, spoken
from subquad.study.runs import Run

INTERVAL = 30.0
"""Seconds between lines on runs that are under way."""
SHOWN = 4
"""Runs under way that a line tells of."""


class ProgressReporter:
    """Tells of the runs of a study through `say`; those that were finished before only count.

    running: gives the runs that are under way.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        shared: StageCache,
        running: Callable[[], list[Run]],
        say: Callable[[str], None],
        jobs: int = 1,
        interval: float = INTERVAL,
    ):
        self.runs, self.shared, self.running, self.say = list(runs), shared, running, say
        self.jobs, self.interval = jobs, interval
        self.told = {run.name for run in runs if run.state == "finished"}
        self.failed_before = {run.name for run in runs if run.state == "failed"}

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """Says a line every now and then, in a thread of its own."""
        stop = threading.Event()

        def tick() -> None:
            while not stop.wait(self.interval):
                self.say(self.line())

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def changed(self) -> bool:
        """Tells of runs that have ended since the last call; whether there were any."""
        before = len(self.told)
        under_way = {run.name for run in self.running()}
        self.failed_before -= under_way
        for run in self.runs:
            if run.name in self.told or run.name in under_way or run.name in self.failed_before:
                continue
            if run.state in ("finished", "failed"):
                self.told.add(run.name)
                self.say(f"[{len(self.told)}/{len(self.runs)}] {outcome(run)}")
        return len(self.told) > before

    def line(self) -> str:
        """`3 of 12 done, 1 failed, 2 running (...); about 14 min left`"""
        under_way = self.running()
        names = {run.name for run in under_way}
        states = [run.state for run in self.runs if run.name not in names]
        told = [f"{states.count('finished')} of {len(self.runs)} done"]
        if states.count("failed"):
            told.append(f"{states.count('failed')} failed")
        shown = "; ".join(progress(run) for run in under_way[:SHOWN])
        more = f"; and {len(under_way) - SHOWN} more" if len(under_way) > SHOWN else ""
        told.append(f"{len(under_way)} running" + (f" ({shown}{more})" if under_way else ""))
        left = [run for run in self.runs if run.name in names or run.state in ("new", "unfinished")]
        seconds = expected(remaining_work(left, self.shared), speeds(self.runs), self.jobs)
        return ", ".join(told) + ("" if seconds is None else f"; about {spoken(seconds)} of training left")


def outcome(run: Run) -> str:
    """How a run ended, in a line."""
    if run.state == "finished":
        row = (run.result() or {})["row"]
        return (
            f"{run.name}: perplexity {row['perplexity']:.2f} (teacher {row['teacher_perplexity']:.2f}), recovered "
            f"{row['recovered_share']:.1%}, {row['seconds']:.0f} s"
        )
    error = run.error() or {}
    return f"{run.name} failed: {error.get('type')}: {str(error.get('message')).partition(chr(10))[0]}"


def progress(run: Run) -> str:
    """`gla hidden 62%: loss 0.301, 812 tok/s`"""
    rows = measured(run)
    if not rows:
        return f"{run.name} starting"
    last, of = rows[-1], stage_tokens(run.recipe)
    whole = of.get(last["stage"], 0)
    share = f" {last['tokens'] / whole:.0%}" if whole else ""
    speed = last["tokens_per_second"]
    return f"{run.name} {last['stage']}{share}: loss {last['loss']:.3g}, {amount(speed)} tok/s"
