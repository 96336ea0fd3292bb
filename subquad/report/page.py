"""A study on one page: `report.html`, which needs nothing else, and its figures and tables as files in `report/`.

Drawn from what the study left on disk, whatever of it there is; loads no model.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from subquad.analysis.plots import matrices_figure
from subquad.analysis.saved_matrices import Beside
from subquad.evaluate.results import Result
from subquad.report import eval_plots as measured
from subquad.report import figures
from subquad.report.diagram import layers_of, student_figure
from subquad.report.eval_plots import PlotModel
from subquad.report.style import RULES, data_uri, save
from subquad.report.tables import Table, evaluation_tables, grid_table, write_tables
from subquad.report.text import report_notes, summary
from subquad.study.aggregate import Group, best_group, group_by_seed, group_labels
from subquad.study.results import evaluation_results, read_study, saved_matrices
from subquad.study.runs import Run, run_directories
from subquad.utils import write_text_atomic


@dataclass(frozen=True)
class Picture:
    name: str
    caption: str
    uri: str
    width: int
    """Pixels at its natural size."""


@dataclass
class Section:
    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_report(directory: Path, page: Path | None = None) -> Path:
    """Draws the study in `directory`; returns the page, by default `directory`/report.html.

    Raises:
        UserError: there is no study.
    """
    runs = read_study(directory)
    page = page or directory / "report.html"
    folder = directory / "report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(RULES):
        report = Report(runs, evaluation_results(directory), folder, saved_matrices(directory))
        parts = report.sections()
    write_tables(report.tables, folder)
    others = len(run_directories(directory) - {run.name for run in runs})
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("subquad.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    write_text_atomic(
        page,
        template.render(
            title=directory.resolve().name,
            about=about(runs),
            notes=report_notes(runs, report.groups, report.rows, others),
            summary=summary(report.groups, report.rows),
            sections=parts,
            failed=[(run.name, run.error() or {}) for run in runs if run.state == "failed"],
            recipe=json.dumps(runs[0].recipe.model_dump(mode="json"), indent=1) if runs else "",
        ),
    )
    return page


def about(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was run on what."""
    results = [info for run in runs if (info := run.info()) is not None]

    def each(values: Sequence[object]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "unknown"

    corpora = [run.recipe.data.source for run in runs]
    names = [c if isinstance(c, str) else " + ".join(c) for c in corpora]
    versions = [f"{name} {number}" for result in results for name, number in result["versions"].items()]
    return [
        ("teacher", each([Path(run.recipe.teacher).name for run in runs])),
        ("text", each([Path(name).name for name in names])),
        ("runs", f"{len(results)} finished of {len(runs)}"),
        ("device", each([result.get("device") for result in results])),
        ("versions", each(versions)),
        ("commit", each([(result.get("commit") or "")[:12] for result in results])),
    ]


class Report:
    """The sections of a page, each figure written as it is drawn."""

    def __init__(self, runs: Sequence[Run], rows: Sequence[Result], folder: Path, matrices: Mapping[str, Beside]):
        self.runs, self.folder, self.matrices = list(runs), folder, matrices
        strangers = run_directories(folder.parent) - {run.name for run in runs}
        self.rows = [row for row in rows if row.model not in strangers]
        self.groups = group_by_seed(runs)
        self.labels = group_labels(self.groups)
        self.tables: list[Table] = []
        self.who = self._who(self.groups)
        self.chosen = self._who(self._best_of_each_mixer())
        first = [
            next(run.name for run in group.runs if run.state == "finished") for group in self._best_of_each_mixer()
        ]
        self.once = [one for one in self.chosen if one.mixer is None or one.name in first]
        """One seed of each, for figures that take a panel a model."""

    def _best_of_each_mixer(self) -> list[Group]:
        by_mixer: dict[str, list[Group]] = {}
        for group in self.groups:
            by_mixer.setdefault(group.mixer, []).append(group)
        found = [best_group(own, "perplexity", lower_is_better=True) for own in by_mixer.values()]
        return [group for group in found if group is not None]

    def _who(self, among: Sequence[Group]) -> list[PlotModel]:
        """Teachers and the like first, then runs."""
        names = {run.name for run in self.runs}
        others = dict.fromkeys(row.model for row in self.rows if row.model not in names)
        found = [PlotModel(name, name, None) for name in others]
        for group in among:
            for run in group.runs:
                seed = f", seed {run.recipe.seed}" if len(group.runs) > 1 else ""
                found.append(PlotModel(run.name, self.labels[group.name] + seed, group.mixer))
        return found

    def sections(self) -> list[Section]:
        parts = [self._grid(), self._cost(), *self._long(), *self._recall(), *self._diagnostics()]
        return [part for part in [*parts, self._losses(), self._student(), *self._evaluation()] if part is not None]

    def draw(self, name: str, figure: Figure | None, caption: str) -> list[Picture]:
        if figure is None:
            return []
        uri = data_uri(save(figure, self.folder / name))
        return [Picture(name, caption, uri, round(96 * figure.get_figwidth()))]

    def draw_all(self, drawn: Mapping[str, Figure], caption: str) -> list[Picture]:
        return [one for name, figure in drawn.items() for one in self.draw(name, figure, caption)]

    def _grid(self) -> Section:
        table = grid_table(self.groups)
        self.tables.append(table)
        pictures = self.draw(
            "recovered",
            figures.recovered_figure(self.groups),
            "What students recover, by mixer, stages and copying; lines are 95% intervals over seeds, where there are "
            "several",
        )
        pictures += self._pareto()
        text = (
            "Means over seeds, with 95% intervals by Student's t in brackets where there are at least two. Bold: the "
            "interval lies apart from that of every other line. A click on a title sorts."
        )
        return Section("All students", text, pictures, [table])

    def _pareto(self) -> list[Picture]:
        points = []
        for group in self.groups:
            speed, perplexity = group.mean("decode_tokens_per_second"), group.mean("perplexity")
            if speed is not None and perplexity is not None:
                points.append((self.labels[group.name], group.mixer, 1 / speed.value, perplexity.value))
        if not points:
            return []
        rows = next(group.results for group in self.groups if group.results)
        figure = figures.cost_figure(
            points, "milliseconds a decoded token, batch of one", rows[0]["teacher_perplexity"]
        )
        caption = "Held-out perplexity against the time of a decoded token, as each run measured both at its end"
        return self.draw("pareto", figure, caption)

    def _cost(self) -> Section | None:
        drawn = measured.cost_figures(self.rows, self.chosen)
        pictures = self.draw_all(drawn, "The best student of each mixer, and what is no student in black")
        return Section("Time and memory against length", "", pictures) if pictures else None

    def _long(self) -> list[Section]:
        found = []
        for metric, ylabel in (
            ("perplexity", "perplexity of the first tokens"),
            ("perplexity_by_position", "perplexity at this place"),
        ):
            figure = measured.length_figure(self.rows, self.chosen, metric, ylabel)
            found += self.draw(metric.replace("_", "-"), figure, "The best student of each mixer, and the teacher")
        return [Section("Long contexts", "", found)] if found else []

    def _recall(self) -> list[Section]:
        found = []
        for task in measured.recall_tasks(self.rows):
            safe = "".join(c if c.isalnum() else "-" for c in task)
            found += self.draw(f"recall-{safe}", measured.recall_maps(self.rows, self.once, task), f"Recall: {task}")
        return [Section("Recall", "The best student of each mixer, one seed of it.", found)] if found else []

    def _diagnostics(self) -> list[Section]:
        found = self.draw_all(
            measured.diagnostic_figures(self.rows, self.chosen, self.once), "The best student of each mixer"
        )
        for one in self.once:
            if one.name in self.matrices:
                figure = matrices_figure(self.matrices[one.name], f"{one.label}: what each token attends to")
                caption = f"{one.label}: its mixing matrices below the teacher's attention, from the same input"
                found += self.draw(f"matrices-{one.mixer}", figure, caption)
        return [Section("Mixing matrices and states", "", found)] if found else []

    def _losses(self) -> Section | None:
        drawn = figures.loss_figures(self.groups)
        return Section("Training", "", self.draw_all(drawn, "Loss of every run")) if drawn else None

    def _student(self) -> Section | None:
        group = best_group(self.groups, "perplexity", lower_is_better=True)
        if group is None:
            return None
        run = next(run for run in group.runs if run.state == "finished")
        caption = "The best student: a layer of the teacher and of the student, and what each stage compares"
        return Section("The student", "", self.draw("student", student_figure(run.recipe, layers_of(run)), caption))

    def _evaluation(self) -> list[Section]:
        tables = evaluation_tables(self.rows, self.who)
        self.tables += tables
        text = "Every model that was measured; ± is a standard error."
        return [Section("Evaluation", text, [], tables)] if tables else []
