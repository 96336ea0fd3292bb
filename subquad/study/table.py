"""Rows of results as a table to read in a terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from subquad.study.results import table_rows
from subquad.study.runs import Run

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


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row under a head; where several rows have one mixer, each is named after its run instead."""
    mixers = [row["mixer"] for row in rows]
    name = "run" if len(set(mixers)) < len(mixers) else "mixer"
    keys = [(name if key == "mixer" else key, title, show) for key, title, show in COLUMNS]
    cells = [[title for _, title, _ in keys], *[[show(row[key]) for key, _, show in keys] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def format_study(runs: Sequence[Run]) -> str:
    """The table of the finished runs; below it what became of the others."""
    rows = table_rows(runs)
    lines = [format_table(rows)] if rows else ["no run is finished yet"]
    failed = [run for run in runs if run.state == "failed"]
    waiting = sum(run.state in ("new", "unfinished") for run in runs)
    for run in failed:
        error = run.error() or {}
        message = str(error.get("message", "")).partition("\n")[0]
        lines.append(f"{run.name} failed: {error.get('type')}: {message} (all of it in {run.directory / 'error.json'})")
    if failed:
        lines.append(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")
    if waiting:
        lines.append(f"{waiting} of {len(runs)} runs are not finished; the same command goes on with them")
    return "\n".join(lines)
