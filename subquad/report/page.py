"""Writes the report of a study: `report.html`, a self-contained page, and its figures and tables as files in `report/`.

Reads result files only; loads no model.
"""

import base64
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2
import matplotlib

from subquad.analysis.mixing_matrices import MatrixPairs
from subquad.analysis.plot_style import RC_PARAMS, NamedFigure, save_figure
from subquad.analysis.plots import matrices_figure
from subquad.evaluate.results import Result
from subquad.report.diagram import student_figure
from subquad.report.eval_plots import (
    PlotModel,
    cost_figures,
    diagnostic_figures,
    long_context_figures,
    recall_figures,
)
from subquad.report.run_plots import loss_figures, pareto_figure, recovered_figure
from subquad.report.tables import Table, evaluation_tables, grid_table, write_tables
from subquad.report.text import report_notes, summary
from subquad.study.aggregate import Group, best_group, group_by_seed, group_labels
from subquad.study.results import evaluation_results, read_study, saved_matrices
from subquad.study.runs import Run, unrelated_runs
from subquad.utils import write_text_atomic

GRID_TEXT = (
    "Means over seeds; in brackets their 95% intervals by Student's t, from two seeds on. Bold: the interval does not "
    "overlap that of any other line. Click a column title to sort."
)


@dataclass(frozen=True)
class Image:
    """A figure of the page. width: in pixels."""

    name: str
    caption: str
    uri: str
    width: int


@dataclass
class Section:
    title: str
    text: str = ""
    images: list[Image] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_report(directory: Path, page: Path | None = None) -> Path:
    """Writes the report of the study in `directory` and returns its path, by default `directory`/report.html.

    Raises:
        UserError: `directory` holds no study.
    """
    runs = read_study(directory)
    page = page or directory / "report.html"
    output = directory / "report"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    unrelated = unrelated_runs(directory, runs)
    results = [result for result in evaluation_results(directory) if result.model not in unrelated]
    report = Report(runs, results, saved_matrices(directory), output)
    with matplotlib.rc_context(RC_PARAMS):
        sections = report.sections()
    write_tables([table for section in sections for table in section.tables], output)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("subquad.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    text = template.render(
        title=directory.resolve().name,
        header=header(runs),
        notes=report_notes(runs, report.groups, results, len(unrelated)),
        summary=summary(report.groups, results),
        sections=sections,
        failed=[(run.name, run.error() or {}) for run in runs if run.state == "failed"],
        recipe=json.dumps(runs[0].recipe.model_dump(mode="json"), indent=1) if runs else "",
    )
    write_text_atomic(page, text)
    return page


def header(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Teacher, data, number of runs, device, versions and commit."""
    infos = [info for run in runs if (info := run.info()) is not None]

    def distinct(values: Sequence[object]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "unknown"

    sources = [run.recipe.data.source for run in runs]
    names = [source if isinstance(source, str) else " + ".join(source) for source in sources]
    versions = [f"{name} {version}" for info in infos for name, version in info["versions"].items()]
    return [
        ("teacher", distinct([Path(run.recipe.teacher).name for run in runs])),
        ("data", distinct([Path(name).name for name in names])),
        ("runs", f"{len(infos)} of {len(runs)} finished"),
        ("device", distinct([info.get("device") for info in infos])),
        ("versions", distinct(versions)),
        ("commit", distinct([(info.get("commit") or "")[:12] for info in infos])),
    ]


class Report:
    """The sections of a report. Figures are written to `output` as they are drawn.

    results: of evaluations. matrices: saved mixing matrices by run name.
    """

    def __init__(
        self, runs: Sequence[Run], results: Sequence[Result], matrices: Mapping[str, MatrixPairs], output: Path
    ):
        self.runs, self.results, self.matrices, self.output = runs, results, matrices, output
        self.groups = group_by_seed(runs)
        best_groups = self._best_of_each_mixer()
        self.models = self._plot_models(self.groups)
        self.best_models = self._plot_models(best_groups)
        names = [next(run.name for run in group.runs if run.state == "finished") for group in best_groups]
        self.one_seed_models = [model for model in self.best_models if model.mixer is None or model.name in names]

    def _best_of_each_mixer(self) -> list[Group]:
        by_mixer: dict[str, list[Group]] = {}
        for group in self.groups:
            by_mixer.setdefault(group.mixer, []).append(group)
        best = [best_group(own, "perplexity", lower_is_better=True) for own in by_mixer.values()]
        return [group for group in best if group is not None]

    def _plot_models(self, groups: Sequence[Group]) -> list[PlotModel]:
        """The teachers and baselines of the evaluation, then the runs of `groups`."""
        labels, names = group_labels(self.groups), {run.name for run in self.runs}
        others = dict.fromkeys(result.model for result in self.results if result.model not in names)
        models = [PlotModel(name, name, None) for name in others]
        for group in groups:
            for run in group.runs:
                seed = f", seed {run.recipe.seed}" if len(group.runs) > 1 else ""
                models.append(PlotModel(run.name, labels[group.name] + seed, group.mixer))
        return models

    def sections(self) -> list[Section]:
        """The sections in the order of the page; those without content are left out."""
        sections = [
            Section(
                "All students",
                GRID_TEXT,
                self._save(recovered_figure(self.groups) + pareto_figure(self.groups)),
                [grid_table(self.groups)],
            ),
            Section("Time and memory by context length", "", self._save(cost_figures(self.results, self.best_models))),
            Section("Long context", "", self._save(long_context_figures(self.results, self.best_models))),
            Section("Recall", "", self._save(recall_figures(self.results, self.one_seed_models))),
            Section("Mixing matrices and hidden states", "", self._save(self._diagnostics())),
            Section("Training", "", self._save(loss_figures(self.groups))),
            Section("The student", "", self._save(self._diagram())),
            Section(
                "Evaluation",
                "All evaluated models. ± is the standard error.",
                [],
                evaluation_tables(self.results, self.models),
            ),
        ]
        return [section for section in sections if section.images or section.tables]

    def _save(self, figures: Sequence[NamedFigure]) -> list[Image]:
        images = []
        for drawn in figures:
            svg, _ = save_figure(drawn.figure, self.output / drawn.name, "svg", "pdf")
            # As a data URI, an image keeps its element ids separate from those of other images on the page.
            uri = "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
            images.append(Image(drawn.name, drawn.caption, uri, round(96 * drawn.figure.get_figwidth())))
        return images

    def _diagnostics(self) -> list[NamedFigure]:
        figures = diagnostic_figures(self.results, self.best_models, self.one_seed_models)
        for model in self.one_seed_models:
            if model.name in self.matrices:
                figure = matrices_figure(self.matrices[model.name], model.label)
                caption = f"{model.label}: the teacher's attention and the student's mixing matrices on the same input"
                figures.append(NamedFigure(f"matrices-{model.mixer}", caption, figure))
        return figures

    def _diagram(self) -> list[NamedFigure]:
        best = best_group(self.groups, "perplexity", lower_is_better=True)
        return [] if best is None else student_figure(next(run for run in best.runs if run.state == "finished"))
