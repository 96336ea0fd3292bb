"""Results as tables: one table per task, a line per model, a column per metric, length and batch size."""

import math
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence

from subquad.evaluate.results import ALL_TASKS, Result, select
from subquad.modeling.summary import format_bytes

WIDTH = 120
"""Characters of a table without a terminal."""
TITLE_WIDTH = 12
"""Characters of a line in the title of a column, at least."""

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


def format_tables(results: Sequence[Result], width: int = WIDTH) -> str:
    """A table for each task: a line per model, a column per metric, length and batch size; at most `width` characters
    wide."""
    shown = [result for result in results if in_tables(result) and not result.metric.startswith("mass_")]
    tables = []
    for task in dict.fromkeys(result.task for result in shown):
        own = select(shown, task=task)
        columns = list(dict.fromkeys(result.column for result in own))
        lines = [["", *(column_title(*column) for column in columns)]]
        for model in dict.fromkeys(result.model for result in own):
            cells = {result.column: format_result(result) for result in select(own, model=model)}
            lines.append([model, *(cells.get(column, "") for column in columns)])
        tables.append(f"{task}\n{wide_table(lines, width)}")
    return "\n\n".join(tables)


def wide_table(lines: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """As `text_table`, with long titles on several lines, in as many tables below each other as `width` characters
    need. The first column is repeated."""
    columns = [(wrap(title, max(map(len, cells), default=0)), cells) for title, *cells in zip(*lines, strict=True)]
    height = max(len(titles) for titles, _ in columns)
    first, *others = [[*[""] * (height - len(titles)), *titles, *cells] for titles, cells in columns]
    tables, used = [[first]], max(map(len, first))
    for column in others:
        size = 2 + max(map(len, column))
        if len(tables[-1]) > 1 and used + size > width:
            tables.append([first])
            used = max(map(len, first))
        tables[-1].append(column)
        used += size
    return "\n\n".join(text_table([*zip(*table, strict=True)], height) for table in tables)


def wrap(title: str, width: int) -> list[str]:
    """The lines of a title, of at least `TITLE_WIDTH` and `width` characters if its words allow."""
    return textwrap.wrap(title, max(width, TITLE_WIDTH), break_long_words=False) or [""]


def terminal_width() -> int:
    """The columns of the terminal, `WIDTH` without one."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


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
        return format_bytes
    if metric in ("prefill_seconds", "seconds_per_token"):
        return lambda x: f"{1e3 * x:,.1f} ms" if x < 1 else f"{x:,.2f} s"
    if metric.startswith(SHARES) or metric.endswith("agreement") or "@" in metric:
        return lambda x: f"{x:.1%}"
    if metric in ("degradation_length", "equal_window"):
        return lambda x: f"{x:,.0f}"
    return lambda x: f"{x:.2f}" if 1 <= x < 1e5 else f"{x:.3g}"


def text_table(cells: Sequence[Sequence[str]], titles: int = 1) -> str:
    """Aligned columns, the first flush left and the others flush right, with a rule below the first `titles` lines."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([*lines[:titles], "-" * max(map(len, lines)), *lines[titles:]])
