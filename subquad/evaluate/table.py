"""Rows of results as tables to read: models down, what was measured across."""

from collections.abc import Callable, Sequence

from subquad.evaluate.results import Result

WIDE = 7
"""Columns side by side; more go below."""

BYTES = ("peak_bytes", "cache_bytes")
SECONDS = ("prefill_seconds", "seconds_per_token")
SHARES = ("acc", "acc_norm", "acc_generated", "chance", "recovered", "agreement", "same", "degenerate", "repetition")
HIDDEN = ("loss", "teacher_above_chance", "difference", "recovered_share_above_chance")


def tables(rows: Sequence[Result]) -> str:
    """A table for each task: `perplexity 23.1 ±0.4` stands for a value and its standard error. What belongs to one
    layer, head or depth is in the rows only."""
    texts = []
    whole = [row for row in rows if row.layer is None and row.depth is None and not row.metric.startswith("mass_")]
    for task in dict.fromkeys(row.task for row in whole):
        own = [row for row in whole if row.task == task and row.metric not in HIDDEN]
        if own:
            texts.append(f"{task}\n{one_table(own)}")
    return "\n\n".join(texts)


def one_table(rows: Sequence[Result]) -> str:
    """Rows of one task: a line a model, a column a metric, length and batch."""
    models = list(dict.fromkeys(row.model for row in rows))
    columns = list(dict.fromkeys((row.metric, row.length, row.batch) for row in rows))
    cells = [["", *[_title(*column) for column in columns]]]
    for model in models:
        own = {(row.metric, row.length, row.batch): row for row in rows if row.model == model}
        cells.append([model, *[_shown(own[column]) if column in own else "" for column in columns]])
    return "\n\n".join(
        _aligned([[line[0], *line[i : i + WIDE]] for line in cells]) for i in range(1, len(cells[0]), WIDE)
    )


def _title(metric: str, length: int | None, batch: int | None) -> str:
    where = [] if length is None else [f"{length:,}"]
    if batch is not None and batch > 1:
        where.append(f"x{batch}")
    return " ".join([metric.replace("_", " "), *where])


def _shown(row: Result) -> str:
    if row.value != row.value:
        return ""
    show = _format(row.metric)
    error = "" if row.stderr is None or row.stderr != row.stderr else f" ±{show(row.stderr)}"
    return show(row.value) + error


def _format(metric: str) -> Callable[[float], str]:
    if metric in BYTES:
        return lambda x: f"{x / 2**20:,.1f} MiB"
    if metric in SECONDS:
        return lambda x: f"{1e3 * x:,.1f} ms" if x < 1 else f"{x:,.2f} s"
    if metric.startswith(SHARES) or metric.endswith("agreement") or "@" in metric:
        return lambda x: f"{x:.1%}"
    if metric == "extrapolation_point":
        return lambda x: f"{x:,.0f}"
    return lambda x: f"{x:.2f}" if 1 <= x < 1e5 else f"{x:.3g}"


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
