"""Results as tables: one table per task, a line per model, a column per metric, length and batch size."""

import math
import re
from collections.abc import Callable, Sequence

from subquad.evaluate.results import ALL_TASKS, Result, select

MAX_COLUMNS = 7
"""Columns side by side; further ones are printed below."""

SHARES = ("acc", "chance", "recovered_share", "same_continuation", "degenerate_rate", "repetition")
"""Beginnings of metrics that are printed in percent."""
METRIC_LABELS = {
    "acc": "accuracy",
    "acc_norm": "accuracy (length-normalized)",
    "acc_generated": "accuracy (generated)",
    "kl": "KL",
    "cka": "CKA",
    "top1_agreement": "top-1 agreement",
    "top5_agreement": "top-5 agreement",
    "topk_mass_overlap": "top-k mass overlap",
    "topk_mass_overlap_chance": "top-k mass overlap by chance",
    "frobenius": "Frobenius distance",
    "half_life": "half-life",
    "seconds_per_token": "decoding time per token",
    "prefill_seconds": "prefill time",
    "cache_bytes": "cache",
    "peak_bytes": "peak memory",
    "state_bytes": "cache",
    "equal_window": "uniform window of equal bytes",
}
"""Labels of metrics whose name with spaces would read badly."""


def in_tables(result: Result) -> bool:
    """Whether a result is shown in tables: it is of the whole model, and not a secondary number."""
    secondary = ["loss", "teacher_above_chance", "difference"]
    secondary += ["accuracy_ratio_above_chance"] if result.task != ALL_TASKS else []
    return result.layer is None and result.depth is None and result.metric not in secondary


def format_tables(results: Sequence[Result]) -> str:
    """A table for each task: a line per model, a column per metric, length and batch size."""
    shown = [result for result in results if in_tables(result) and not result.metric.startswith("mass_")]
    tables = []
    for task in dict.fromkeys(result.task for result in shown):
        own = select(shown, task=task)
        columns = list(dict.fromkeys(result.column for result in own))
        lines = [["", *(column_title(*column) for column in columns)]]
        for model in dict.fromkeys(result.model for result in own):
            cells = {result.column: format_result(result) for result in select(own, model=model)}
            lines.append([model, *(cells.get(column, "") for column in columns)])
        tables.append(f"{task}\n{wide_table(lines)}")
    return "\n\n".join(tables)


def wide_table(lines: Sequence[Sequence[str]]) -> str:
    """As `text_table`, with `MAX_COLUMNS` columns side by side after the first, which is repeated."""
    starts = range(1, len(lines[0]), MAX_COLUMNS)
    return "\n\n".join(text_table([[line[0], *line[i : i + MAX_COLUMNS]] for line in lines]) for i in starts)


def column_title(metric: str, length: int | None = None, batch: int | None = None) -> str:
    """`cache (1,024 tokens × 8)`, `attention mass at distance 2–3`."""
    label = METRIC_LABELS.get(metric, metric.replace("_", " "))
    if distances := re.fullmatch(r"mass_(\d+)(?:_(\d+))?", metric):
        label = "attention mass at distance " + "–".join(part for part in distances.groups() if part)
    if length is None:
        return label
    return f"{label} ({length:,} tokens{f' × {batch}' if batch is not None and batch > 1 else ''})"


def format_result(result: Result) -> str:
    """`23.1 ±0.4`"""
    show = value_formatter(result.metric)
    error = "" if result.stderr is None or math.isnan(result.stderr) else f" ±{show(result.stderr)}"
    return show(result.value) + error


def value_formatter(metric: str) -> Callable[[float], str]:
    """How values of a metric are printed: bytes, seconds, percent, or a number."""
    if metric in ("peak_bytes", "cache_bytes", "state_bytes"):
        return lambda x: f"{x / 2**20:,.1f} MiB" if x >= 2**20 else f"{x / 2**10:,.0f} KiB"
    if metric in ("prefill_seconds", "seconds_per_token"):
        return lambda x: f"{1e3 * x:,.1f} ms" if x < 1 else f"{x:,.2f} s"
    if metric.startswith(SHARES) or metric.endswith("agreement") or "@" in metric:
        return lambda x: f"{x:.1%}"
    if metric in ("degradation_length", "equal_window"):
        return lambda x: f"{x:,.0f}"
    return lambda x: f"{x:.2f}" if 1 <= x < 1e5 else f"{x:.3g}"


def text_table(cells: Sequence[Sequence[str]]) -> str:
    """Aligned columns, a rule below the first line; the first column is flush left, the others flush right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
