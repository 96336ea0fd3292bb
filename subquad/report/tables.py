"""The tables of a report: all students (`grid_table`) and evaluations (`evaluation_tables`), as HTML, CSV and LaTeX."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from subquad.analysis.plot_style import TEACHER_COLOR, color, mixer_label
from subquad.evaluate.results import Result, select
from subquad.evaluate.table import column_title, format_result, in_tables
from subquad.report.figures import PlotModel, file_name
from subquad.study.aggregate import Group, Mean, group_labels, significant_best
from subquad.study.frontier import Frontier, show


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    sort_key: the number by which it is sorted; None: by its text. best: set in bold. low, high: its 95% interval.
    color: of a dot before the text.
    """

    text: str
    sort_key: float | None = None
    best: bool = False
    low: float | None = None
    high: float | None = None
    color: str | None = None


MISSING = Cell("–", math.inf)


@dataclass(frozen=True)
class Table:
    """name: stem of its files. lines: the cells by column title, with the same titles in every line."""

    name: str
    caption: str
    lines: list[dict[str, Cell]]

    @property
    def titles(self) -> list[str]:
        return list(self.lines[0])

    def is_numeric(self, title: str) -> bool:
        return any(line[title].sort_key is not None for line in self.lines)

    def to_csv(self, path: Path) -> None:
        """Writes unrounded numbers; the ends of intervals have their own columns."""
        columns: dict[str, list[object]] = {}
        for title in self.titles:
            cells = [line[title] for line in self.lines]
            columns[title] = [cell.text if cell.sort_key is None else cell.sort_key for cell in cells]
            if any(cell.low is not None for cell in cells):
                columns[f"{title} low"] = [cell.low for cell in cells]
                columns[f"{title} high"] = [cell.high for cell in cells]
        pd.DataFrame(columns, dtype=object).replace(math.inf, None).to_csv(path, index=False)

    def to_latex(self, path: Path) -> None:
        """Writes a table for the LaTeX package booktabs."""
        cells = pd.DataFrame(self.lines)
        style = cells.map(lambda cell: cell.text).style.hide(axis="index")
        style.format(escape="latex").format_index(escape="latex", axis=1)
        style.apply(lambda _: cells.map(lambda cell: "textbf:--rwrap" if cell.best else ""), axis=None)
        sides = "".join("r" if self.is_numeric(title) else "l" for title in self.titles)
        path.write_text("% needs \\usepackage{booktabs}\n" + style.to_latex(hrules=True, column_format=sides))


# ---------------------------------------------------------------------- all students


@dataclass(frozen=True)
class MetricColumn:
    """A column with a metric of runs, multiplied by `scale` and rounded to `digits`.

    lower_is_better: None: no best value is marked, and the interval is in the CSV only. of_teacher: the metric of a run
    with the teacher's value, or that value.
    """

    metric: str
    title: str
    digits: int
    lower_is_better: bool | None = None
    scale: float = 1.0
    of_teacher: str | float | None = None

    def teacher_cell(self, groups: Sequence[Group]) -> Cell:
        """The mean over all runs of what they measured of their teacher."""
        if not isinstance(self.of_teacher, str):
            return self.cell(None if self.of_teacher is None else Mean.of([self.of_teacher]), False)
        values = [r[self.of_teacher] for g in groups for r in g.results if r.get(self.of_teacher) is not None]
        return self.cell(Mean.of([statistics.fmean(values)]) if values else None, False)

    def cell(self, mean: Mean | None, best: bool) -> Cell:
        """`33.4 [32.9, 33.9]`"""
        if mean is None:
            return MISSING
        low, high = (None if end is None else end * self.scale for end in (mean.low, mean.high))
        value, text = mean.value * self.scale, f"{mean.value * self.scale:.{self.digits}f}"
        if low is not None and high is not None and self.lower_is_better is not None:
            text += f" [{low:.{self.digits}f}, {high:.{self.digits}f}]"
        return Cell(text, value, best, low, high)


GRID_COLUMNS = (
    MetricColumn("perplexity", "perplexity", 2, True, of_teacher="teacher_perplexity"),
    MetricColumn("kl", "KL, nats", 3, True, of_teacher=0.0),
    MetricColumn("top1_agreement", "top-1, %", 1, False, 100, of_teacher=1.0),
    MetricColumn("recovered_share", "recovered, %", 1, False, 100, of_teacher=1.0),
    MetricColumn("state_bytes", "state, kB", 0, scale=1e-3, of_teacher="teacher_state_bytes"),
    MetricColumn("decode_tokens_per_second", "decoding, tokens/s", 0, of_teacher="teacher_decode_tokens_per_second"),
    MetricColumn("seconds", "training, s", 0),
    MetricColumn("kl_at_init", "KL at init, nats", 2),
    MetricColumn("parameters", "parameters, M", 2, scale=1e-6),
)


def grid_table(groups: Sequence[Group]) -> Table:
    """All students, a line for each group of seeds: by increasing perplexity, groups without results last. Above them
    the teacher, if all have the same. What all students share is at the end of the lines."""
    labels = group_labels(groups)
    identified = len({(g.mixer, g.stages, g.copy_qkv) for g in groups}) == len(groups)
    best = {
        column.metric: significant_best(groups, column.metric, column.lower_is_better)
        for column in GRID_COLUMNS
        if column.lower_is_better is not None
    }
    lines: list[dict[str, Cell]] = []
    varies = {"stages": len({g.stages for g in groups}) > 1, "copied": len({g.copy_qkv for g in groups}) > 1}
    for group in groups:
        tokens = group.results[0]["tokens"] if group.results else None
        line = {} if identified else {"run": Cell(labels[group.name])}
        line["mixer"] = Cell(mixer_label(group.mixer), color=color(group.mixer))
        settings = {"stages": Cell(group.stages), "copied": Cell("yes" if group.copy_qkv else "no")}
        line |= {title: cell for title, cell in settings.items() if varies[title]}
        line |= {c.title: c.cell(group.mean(c.metric), best.get(c.metric) is group) for c in GRID_COLUMNS}
        line |= {"seeds": _seeds_cell(group), "tokens": MISSING if tokens is None else Cell(f"{tokens:,}", tokens)}
        lines.append(line | {title: cell for title, cell in settings.items() if not varies[title]})
    lines.sort(key=lambda line: line["perplexity"].sort_key or 0.0)
    if len({group.recipe.teacher for group in groups}) == 1:
        teacher = {next(iter(lines[0])): Cell("teacher", color=TEACHER_COLOR), "seeds": MISSING, "tokens": MISSING}
        teacher |= {c.title: c.teacher_cell(groups) for c in GRID_COLUMNS}
        lines.insert(0, {title: teacher.get(title, Cell("")) for title in lines[0]})
    return Table("grid", "All students, mean over seeds", lines)


def _seeds_cell(group: Group) -> Cell:
    """`2 (1 failed)`"""
    finished, failed = len(group.results), sum(run.state == "failed" for run in group.runs)
    unfinished = len(group.runs) - finished - failed
    rest = [f"{failed} failed"] * bool(failed) + [f"{unfinished} unfinished"] * bool(unfinished)
    return Cell(f"{finished} ({', '.join(rest)})" if rest else str(finished), finished)


# ---------------------------------------------------------------------- evaluations


def evaluation_tables(results: Sequence[Result], models: Sequence[PlotModel]) -> list[Table]:
    """One table for each task: a line for each model, a column for each metric, length and batch size."""
    tables = []
    shown = [r for r in results if in_tables(r)]
    for task in dict.fromkeys(r.task for r in shown):
        own = select(shown, task=task)
        columns = dict.fromkeys(r.column for r in own)
        lines = []
        for model in models:
            cells = {
                r.column: Cell(format_result(r), r.value, low=r.low, high=r.high) for r in select(own, model=model.name)
            }
            if cells:
                name = Cell(model.label, color=None if model.mixer is None else color(model.mixer))
                lines.append({"model": name} | {column_title(*c): cells.get(c, MISSING) for c in columns})
        tables.append(Table(f"evaluation-{file_name(task)}", f"Evaluation on {task}", lines))
    return tables


def frontier_table(frontier: Frontier) -> Table:
    """A line for each model of `subquad frontier`."""
    numbers = [(row, frontier.numbers(row)) for row in frontier.rows]
    titles = dict.fromkeys(title for _, found in numbers for title in found)
    lines = []
    for row, found in numbers:
        cells = {title: Cell(show(result), result.value) for title, result in found.items()}
        lines.append({"model": Cell(row.model)} | {title: cells.get(title, MISSING) for title in titles})
    return Table("frontier", "All that shrinks the teacher's cache", lines)
