"""Rows of results as a table to read in a terminal."""

from collections.abc import Callable, Sequence
from typing import Any

COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("mixer", "mixer", str),
    ("parameters", "params", lambda n: f"{n / 1e6:.2f}M"),
    ("tokens", "tokens", lambda n: f"{n / 1e3:.0f}k"),
    ("perplexity", "ppl", lambda x: f"{x:.2f}"),
    ("teacher_perplexity", "teacher", lambda x: f"{x:.2f}"),
    ("initial_kl", "KL start", lambda x: f"{x:.2f}"),
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
