"""The tables of a report: cells with their numbers beside them, as HTML sorts them, as CSV and as LaTeX (booktabs)."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from subquad.evaluate.results import Result
from subquad.evaluate.table import HIDDEN, _format
from subquad.report.eval_plots import PlotModel
from subquad.report.style import colour
from subquad.study.aggregate import Group, Mean, group_labels, significant_best


@dataclass(frozen=True)
class Cell:
    """text: as it is read. sort: the number by which it is sorted; None: by its text. best: set in bold. dot: a colour
    before it."""

    text: str
    sort: float | None = None
    best: bool = False
    low: float | None = None
    high: float | None = None
    dot: str | None = None


@dataclass(frozen=True)
class Table:
    """A name for its files, a caption, titles of its columns and its lines."""

    name: str
    caption: str
    titles: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return any(line[column].sort is not None for line in self.lines)

    def to_csv(self, path: Path) -> None:
        """Numbers unrounded, and ends of intervals in columns of their own."""
        wide = [any(line[i].low is not None for line in self.lines) for i in range(len(self.titles))]
        head: list[str] = []
        for title, has in zip(self.titles, wide, strict=True):
            head += [title, f"{title} low", f"{title} high"] if has else [title]
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for line in self.lines:
                out: list[object] = []
                for cell, has in zip(line, wide, strict=True):
                    out.append(cell.text if cell.sort is None else "" if math.isinf(cell.sort) else cell.sort)
                    out += ["" if end is None else end for end in (cell.low, cell.high)] if has else []
                writer.writerow(out)

    def to_latex(self, path: Path) -> None:
        columns = "".join("r" if self.numeric(i) else "l" for i in range(len(self.titles)))
        body = [" & ".join(_latex(cell.text, cell.best) for cell in line) + r" \\" for line in self.lines]
        text = [
            r"% needs \usepackage{booktabs}",
            r"\begin{tabular}{" + columns + "}",
            r"\toprule",
            " & ".join(_latex(title) for title in self.titles) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
        path.write_text("\n".join(text) + "\n")


def _latex(text: str, bold: bool = False) -> str:
    escaped = "".join(
        {
            "\\": r"\textbackslash{}",
            "±": r"$\pm$",
            "–": "--",
            "~": r"\textasciitilde{}",
            "^": r"\textasciicircum{}",
        }.get(c, "\\" + c if c in "%_&#${}" else c)
        for c in text
    )
    return rf"\textbf{{{escaped}}}" if bold else escaped


@dataclass(frozen=True)
class Column:
    """A metric of runs in a unit that is read: its value times `scale`, with so many digits.

    lower: whether less is better; None: no best is named, and the interval is in the CSV only.
    """

    metric: str
    title: str
    digits: int
    lower: bool | None = None
    scale: float = 1.0

    def cell(self, mean: Mean | None, best: bool) -> Cell:
        """`33.4 [32.9, 33.9]`"""
        if mean is None:
            return Cell("–", float("inf"))
        low, high = (None if end is None else end * self.scale for end in (mean.low, mean.high))
        value = mean.value * self.scale
        ends = (
            ""
            if low is None or high is None or self.lower is None
            else f" [{low:.{self.digits}f}, {high:.{self.digits}f}]"
        )
        return Cell(f"{value:.{self.digits}f}{ends}", value, best, low, high)


GRID = (
    Column("perplexity", "perplexity", 2, True),
    Column("kl", "KL, nats", 3, True),
    Column("top1_agreement", "top-1, %", 1, False, 100),
    Column("recovered_share", "recovered, %", 1, False, 100),
    Column("kl_at_init", "KL at the start", 2),
    Column("seconds", "training, s", 0),
    Column("decode_tokens_per_second", "decoding, tokens/s", 0),
    Column("state_bytes", "state, KiB", 0, scale=1 / 1024),
    Column("parameters", "parameters, M", 2, scale=1e-6),
)


def grid_table(groups: Sequence[Group]) -> Table:
    """A line a group of seeds, the best perplexity first; groups of which nothing is finished at the end."""
    named = group_labels(groups)
    plain = len({(g.mixer, g.stages, g.copy_qkv) for g in groups}) == len(groups)
    first = {c.metric: significant_best(groups, c.metric, c.lower) for c in GRID if c.lower is not None}
    lines = []
    for group in groups:
        done, failed = len(group.results), sum(run.state == "failed" for run in group.runs)
        others = len(group.runs) - done - failed
        told = str(done) + (f", {failed} failed" if failed else "") + (f", {others} unfinished" if others else "")
        tokens = next((row["tokens"] for row in group.results), None)
        lines.append(
            (
                *([] if plain else [Cell(named[group.name])]),
                Cell(group.mixer.replace("_", " "), dot=colour(group.mixer)),
                Cell(group.stages),
                Cell("yes" if group.copy_qkv else "no"),
                Cell(told, done),
                Cell("–" if tokens is None else f"{tokens:,}", float("inf") if tokens is None else tokens),
                *(c.cell(group.mean(c.metric), first.get(c.metric) is group) for c in GRID),
            )
        )
    head = ([] if plain else ["run"]) + ["mixer", "stages", "copied", "seeds", "tokens"]
    where = len(head)
    lines.sort(key=lambda line: line[where].sort or 0.0)
    titles = (*head, *(column.title for column in GRID))
    return Table("grid", "Every student, means over seeds", titles, tuple(lines))


def evaluation_tables(rows: Sequence[Result], who: Sequence[PlotModel]) -> list[Table]:
    """For each task of an evaluation the models down, metrics (and lengths) across, with standard errors."""
    found = []
    plain = [r for r in rows if r.layer is None and r.depth is None and r.metric not in HIDDEN]
    for task in dict.fromkeys(row.task for row in plain):
        own = [row for row in plain if row.task == task]
        columns = list(dict.fromkeys((row.metric, row.length, row.batch) for row in own))
        lines = []
        for model in who:
            mine = {(row.metric, row.length, row.batch): row for row in own if row.model == model.name}
            if mine:
                dot = None if model.mixer is None else colour(model.mixer)
                lines.append((Cell(model.label, dot=dot), *(_measured(mine.get(column)) for column in columns)))
        titles = ("model", *(_title(*column) for column in columns))
        safe = "".join(c if c.isalnum() else "-" for c in task)
        found.append(Table(f"evaluation-{safe}", f"Evaluation: {task}", titles, tuple(lines)))
    return found


def _measured(row: Result | None) -> Cell:
    if row is None:
        return Cell("–", float("inf"))
    show = _format(row.metric)
    error = "" if row.stderr is None or row.stderr != row.stderr else f" ±{show(row.stderr)}"
    return Cell(show(row.value) + error, row.value, low=row.low, high=row.high)


def _title(metric: str, length: int | None, batch: int | None) -> str:
    where = [] if length is None else [f"{length:,}"]
    return " ".join([metric.replace("_", " "), *where, *([f"x{batch}"] if batch is not None and batch > 1 else [])])


def write_tables(tables: Iterable[Table], folder: Path) -> None:
    for table in tables:
        table.to_csv(folder / f"{table.name}.csv")
        table.to_latex(folder / f"{table.name}.tex")
