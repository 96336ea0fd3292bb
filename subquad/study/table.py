"""The table of a study for the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from subquad.evaluate.table import text_table
from subquad.study.results import run_results
from subquad.study.runs import ERROR, Run

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
    ("state_bytes", "state", lambda n: f"{n / 1024:.0f} KiB"),
]
"""Key of a result, column title and number format."""


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each result; the first column is the mixer, or the run if several results have the same mixer."""
    mixers = [result["mixer"] for result in results]
    name = "run" if len(set(mixers)) < len(mixers) else "mixer"
    keys = [(name if key == "mixer" else key, title, show) for key, title, show in COLUMNS]
    cells = [[title for _, title, _ in keys], *[[show(result[key]) for key, _, show in keys] for result in results]]
    return text_table(cells)


def format_study(runs: Sequence[Run]) -> str:
    """The table of the finished runs, followed by the failed and the unfinished runs."""
    results = run_results(runs)
    lines = [format_table(results)] if results else ["no run is finished yet"]
    failed = [run for run in runs if run.state == "failed"]
    pending = sum(run.state in ("new", "unfinished") for run in runs)
    lines += [f"{run.name} failed: {run.error_line()} (traceback: {run.directory / ERROR})" for run in failed]
    if failed:
        lines.append(f"{len(failed)} of {len(runs)} runs failed; run the same command to retry them")
    if pending:
        lines.append(f"{pending} of {len(runs)} runs are not finished; run the same command to continue them")
    return "\n".join(lines)
