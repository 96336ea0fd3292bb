"""What a study prints: its table, progress and remaining time, read from the files of its runs."""

import contextlib
import math
import os
import statistics
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from subquad.config import Recipe
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.recipe_stages import StageCache, stage_keys, stage_tokens
from subquad.evaluate.table import WIDTH, text_table, wide_table
from subquad.modeling.summary import format_bytes
from subquad.study.results import run_results
from subquad.study.runs import ERROR, METRICS, Run, all_runs, find_runs

STAGE_CACHE = ".stages"
"""Directory of shared stages below the output."""
MAX_RUNS_SHOWN = 4
"""Running runs that a status line describes."""

COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("mixer", "mixer", str),
    ("parameters", "params", lambda n: f"{n / 1e6:.2f}M"),
    ("tokens", "tokens", lambda n: f"{n / 1e3:.0f}k"),
    ("perplexity", "ppl", lambda x: f"{x:.2f}"),
    ("teacher_perplexity", "teacher", lambda x: f"{x:.2f}"),
    ("kl_at_init", "KL init", lambda x: f"{x:.2f}"),
    ("kl", "KL", lambda x: f"{x:.3f}"),
    ("top1_agreement", "top-1", lambda x: f"{x:.1%}"),
    ("recovered_share", "recovered", lambda x: f"{x:.1%}"),
    ("seconds", "seconds", lambda x: f"{x:.0f}"),
    ("decode_tokens_per_second", "tok/s", lambda x: f"{x:.0f}"),
    ("state_bytes", "state", format_bytes),
]
"""Key of a result, column title and number format."""


def shared_stages(runs: Sequence[Run], output: Path) -> StageCache:
    counts = Counter(key for run in runs for key in stage_keys(run.recipe).values())
    return StageCache(output / STAGE_CACHE, frozenset(key for key, count in counts.items() if count > 1))


class Remaining(NamedTuple):
    """What a run has yet to train, without the stages that another run trains for it."""

    tokens: int
    seconds: float
    """Estimated; infinite if the speed of a stage is unknown."""
    guessed: bool
    """Whether a speed is that of other mixers."""


def training_metrics(run: Run) -> dict[str, dict[str, Any]]:
    """The last line of the run's `metrics.jsonl` that reports a training step of each stage."""
    lines = read_jsonl(run.directory / METRICS)
    return {line["stage"]: line for line in lines if line.get("tokens_per_second")}


def remaining_training(runs: Sequence[Run], measured: Sequence[Run], stage_cache: StageCache) -> list[Remaining]:
    """The remaining work of each run, at the median speed of its mixer in the runs `measured`, or that of the others.

    A shared stage counts for the first run that needs it.
    """
    speeds: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    for run in measured:
        for stage, line in training_metrics(run).items():
            for mixer in (run.recipe.student.name, None):
                speeds[stage, mixer].append(line["tokens_per_second"])
    remaining, counted = [], set()
    for run in runs:
        tokens, seconds, guessed = 0, 0.0, False
        done, keys = training_metrics(run), stage_keys(run.recipe)
        for stage, total in stage_tokens(run.recipe).items() if run.state != "finished" else ():
            left = total - (done[stage]["tokens"] if stage in done else 0)
            if keys[stage] in counted or stage_cache.has(keys[stage]):
                continue
            counted |= {keys[stage]} & stage_cache.shared_keys
            if left <= 0:
                continue
            own = speeds.get((stage, run.recipe.student.name))
            known = own or speeds.get((stage, None))
            tokens += left
            seconds += left / statistics.median(known) if known else math.inf
            guessed |= own is None
        remaining.append(Remaining(tokens, seconds, guessed))
    return remaining


def study_seconds(remaining: Sequence[Remaining], jobs: int) -> float:
    """Estimated time to train all runs, `jobs` at a time; infinite if a speed is unknown."""
    return max([sum(run.seconds for run in remaining) / jobs, *(run.seconds for run in remaining)], default=0.0)


def format_time(seconds: float) -> str:
    """`0:14:03`, `4 days, 4:48:00`; `unknown` if infinite."""
    return "unknown" if math.isinf(seconds) else str(timedelta(seconds=round(seconds)))


def describe_remaining_work(recipes: Sequence[Recipe], output: str | os.PathLike, jobs: int = 1) -> str:
    """A table of the runs with their remaining tokens and estimated time. Changes nothing (`--dry-run`)."""
    runs = find_runs(recipes, Path(output))
    remaining = remaining_training(runs, all_runs(Path(output)), shared_stages(runs, Path(output)))
    cells = [["run", "state", "tokens", "left", "expected"]]
    for run, (tokens, seconds, _) in zip(runs, remaining, strict=True):
        left = [tqdm.format_sizeof(tokens), format_time(seconds)] if tokens else ["", ""]
        cells.append([run.name, run.state, tqdm.format_sizeof(sum(stage_tokens(run.recipe).values())), *left])
    seconds = study_seconds(remaining, jobs)
    if math.isinf(seconds):
        time = "time unknown: no run in this directory has measured the speed of every stage"
    elif not seconds:
        time = "no training left"
    else:
        source = ", for some mixers at that of others" if any(run.guessed for run in remaining) else ""
        time = f"about {format_time(seconds)} of training at the speed measured in this directory{source}"
    to_do = sum(run.state != "finished" for run in runs)
    tokens_left = tqdm.format_sizeof(sum(run.tokens for run in remaining))
    return f"{text_table(cells)}\n\n{len(runs)} runs, {to_do} to do, {tokens_left} tokens; {time}"


@contextlib.contextmanager
def repeated(log: Callable[[str], None], line: Callable[[], str], interval: float) -> Iterator[None]:
    """Logs `line()` every `interval` seconds, from a thread."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(interval):
            log(line())

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def status_line(runs: Sequence[Run], started: Sequence[Run], stage_cache: StageCache, jobs: int) -> str:
    """`3 of 12 done, 1 failed, 2 running (...); about 0:14:03 of training left`

    started: the runs that an engine has accepted; Ray executes some of them later.
    """
    running = [run for run in started if run.state == "unfinished"]
    states = [run.state for run in runs]
    parts = [f"{states.count('finished')} of {len(runs)} done"]
    if states.count("failed"):
        parts.append(f"{states.count('failed')} failed")
    shown = [run_progress(run) for run in running[:MAX_RUNS_SHOWN]] + ["..."] * (len(running) > MAX_RUNS_SHOWN)
    parts.append(f"{len(running)} running" + (f" ({'; '.join(shown)})" if running else ""))
    pending = [run for run, state in zip(runs, states, strict=True) if state in ("new", "unfinished")]
    seconds = study_seconds(remaining_training(pending, runs, stage_cache), jobs)
    return ", ".join(parts) + ("" if math.isinf(seconds) else f"; about {format_time(seconds)} of training left")


def run_progress(run: Run) -> str:
    """`gla hidden 62%: loss 0.301, 812 tok/s`"""
    metrics = training_metrics(run)
    if not metrics:
        return f"{run.name} starting"
    stage, last = list(metrics.items())[-1]
    share, speed = last["tokens"] / stage_tokens(run.recipe)[stage], tqdm.format_sizeof(last["tokens_per_second"])
    return f"{run.name} {stage} {share:.0%}: loss {last['loss']:.3g}, {speed} tok/s"


def run_outcome(run: Run) -> str:
    """The result or the error of an ended run in one line."""
    result = run.result()
    if result is None:
        return f"{run.name} failed: {run.error_line()}"
    return (
        f"{run.name}: perplexity {result['perplexity']:.2f} (teacher {result['teacher_perplexity']:.2f}), recovered "
        f"{result['recovered_share']:.1%}, {result['seconds']:.0f} s"
    )


def format_table(results: Sequence[dict[str, Any]], width: int = WIDTH) -> str:
    """One line for each result; the first column is the mixer, or the run if several results have the same mixer. Below
    the table, notes on values that surprise."""
    mixers = [result["mixer"] for result in results]
    name = "run" if len(set(mixers)) < len(mixers) else "mixer"
    keys = [(name if key == "mixer" else key, title, show) for key, title, show in COLUMNS]
    cells = [[title for _, title, _ in keys], *[[show(result[key]) for key, _, show in keys] for result in results]]
    return "\n".join([wide_table(cells, width), *result_notes(results, name)])


def result_notes(results: Sequence[dict[str, Any]], name: str = "mixer") -> list[str]:
    """Lines about students that training made worse, and about those that are better than their teacher. name: the key
    by which a result is called."""
    notes = []
    for result in results:
        before, after = result.get("kl_at_init"), result["kl"]
        if before is not None and after > before:
            notes.append(
                f"! {result[name]}: training made it worse: on validation text its KL from the teacher was "
                f"{before:.3f} and is {after:.3f} nats per token; lower lr, or train on more tokens"
            )
    if better := [result[name] for result in results if result["recovered_share"] > 1]:
        names = ", ".join(better)
        notes.append(f"recovered above 100% ({names}): a lower loss than the teacher's on the validation text")
    return notes


def format_study(runs: Sequence[Run], width: int = WIDTH) -> str:
    """The table of the finished runs, followed by the failed and the unfinished runs."""
    results = run_results(runs)
    lines = [format_table(results, width)] if results else ["no run is finished yet"]
    failed = [run for run in runs if run.state == "failed"]
    pending = sum(run.state in ("new", "unfinished") for run in runs)
    lines += [f"{run.name} failed: {run.error_line()} (traceback: {run.directory / ERROR})" for run in failed]
    if failed:
        lines.append(f"{len(failed)} of {len(runs)} runs failed; run the same command to retry them")
    if pending:
        lines.append(f"{pending} of {len(runs)} runs are not finished; run the same command to continue them")
    return "\n".join(lines)
