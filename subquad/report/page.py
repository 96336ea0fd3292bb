"""Writes the report of a study: `report.html`, a self-contained page, and its figures and tables as files in `report/`.

Reads result files only; loads no model.
"""

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from subquad.analysis import plot_style as style
from subquad.analysis.plot_style import RC_PARAMS, SAVE_OPTIONS, save_figure
from subquad.analysis.plots import frontier_figure, matrices_figure
from subquad.evaluate.results import Result
from subquad.report import figures
from subquad.report.diagram import draw_student
from subquad.report.figures import NamedFigure, PlotModel
from subquad.report.tables import Table, evaluation_tables, frontier_table, grid_table
from subquad.report.text import report_notes, sample, summary
from subquad.study.aggregate import Group, best_group, group_by_seed, group_labels
from subquad.study.frontier import panels, read_frontier
from subquad.study.results import evaluation_results, read_study, saved_matrices
from subquad.study.runs import Run, read_json, unrelated_runs
from subquad.utils import write_text_atomic

GRID_TEXT = (
    "Means over seeds; in brackets their 95% intervals by Student's t, from two seeds on. Bold: the interval does not "
    "overlap that of any other line. Click a column title to sort."
)
EVALUATION_TEXT = "All evaluated models. ± is the standard error."


class Section(NamedTuple):
    title: str
    figures: Sequence[NamedFigure]
    tables: Sequence[Table] = ()
    text: str = ""


@matplotlib.rc_context(RC_PARAMS)
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
    groups = group_by_seed(runs)
    sections = report_sections(directory, runs, groups, results)
    data_uris, keys = {}, {}
    for section in sections:
        saved = [save_figure(drawn.figure, output / drawn.name, "svg", "pdf")[0] for drawn in section.figures]
        keys[section.title] = key = shared_key(section)
        for drawn, file in zip(section.figures, saved, strict=True):
            data_uris[drawn.name] = data_uri(file.read_bytes() if key is None else draw_svg(drawn.figure))
        for table in section.tables:
            table.to_csv(output / f"{table.name}.csv")
            table.to_latex(output / f"{table.name}.tex")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = mark_code
    template = environment.from_string(files("subquad.report").joinpath("page.html").read_text(encoding="utf-8"))
    text = template.render(
        title=directory.resolve().name,
        header=header(runs),
        notes=report_notes(runs, groups, results, len(unrelated)),
        summary=summary(groups, results),
        sections=sections,
        data_uris=data_uris,
        keys=keys,
        sample=sample(groups),
        failed=[(run.name, run.error() or {}) for run in runs if run.state == "failed"],
        recipe=json.dumps(runs[0].recipe.model_dump(mode="json"), indent=1) if runs else "",
    )
    write_text_atomic(page, text)
    return page


def draw_svg(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="svg", **SAVE_OPTIONS["svg"])
    return content.getvalue()


def data_uri(svg: bytes) -> str:
    """A figure as SVG in a data URI, in which its element ids are separate from those of other images on a page."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def shared_key(section: Section) -> str | None:
    """The key of a section in which several figures have the same, as a data URI; the figures lose theirs."""
    legends = [drawn.figure.legends[0] for drawn in section.figures if drawn.figure.legends]
    texts = {tuple(text.get_text() for text in legend.get_texts()) for legend in legends}
    if len(legends) < 2 or len(texts) > 1:
        return None
    key = data_uri(draw_svg(style.legend_figure(legends[0])))
    for legend in legends:
        legend.remove()
    return key


def mark_code(text: str) -> Markup:
    """HTML of a text in which commands and names are between backticks."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def header(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Teacher, data, number of runs, device, versions and commit."""
    infos = [info for run in runs if (info := run.info()) is not None]

    def distinct(values: Sequence[object]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "unknown"

    sources = [run.recipe.data.source for run in runs]
    names = [source if isinstance(source, str) else " + ".join(source) for source in sources]
    return [
        ("teacher", distinct([Path(run.recipe.teacher).name for run in runs])),
        ("data", distinct([Path(name).name for name in names])),
        ("runs", f"{len(infos)} of {len(runs)} finished"),
        ("device", distinct([info.get("device") for info in infos])),
        ("versions", distinct([f"{name} {version}" for info in infos for name, version in info["versions"].items()])),
        ("commit", distinct([(info.get("commit") or "")[:12] for info in infos])),
    ]


def report_sections(
    directory: Path, runs: Sequence[Run], groups: Sequence[Group], results: Sequence[Result]
) -> list[Section]:
    """The sections in the order of the page; those without content are left out."""
    by_mixer: dict[str, list[Group]] = {}
    for group in groups:
        by_mixer.setdefault(group.mixer, []).append(group)
    best = [one for own in by_mixer.values() if (one := best_group(own, "perplexity", lower_is_better=True))]
    labels, names = group_labels(groups), {run.name for run in runs}
    made = {r.model: r.model.removeprefix(f"{r.teacher}, ") for r in results if r.model not in names}
    others = [PlotModel(name, label, None) for name, label in made.items()]
    others.sort(key=lambda model: model.name not in {r.teacher for r in results})
    students: dict[str, list[PlotModel]] = {}
    for group in groups:
        for run in group.runs:
            seed = f", seed {run.recipe.seed}" if len(group.runs) > 1 else ""
            model = PlotModel(run.name, labels[group.name] + seed, group.mixer)
            students.setdefault(group.name, []).append(model)
    best_models = [*others, *(model for group in best for model in students[group.name])]
    first_runs = [next(run for run in group.runs if run.state == "finished") for group in best]
    one_seed = [model for model in best_models if model.mixer is None or model.name in {run.name for run in first_runs}]
    diagnostics = figures.diagnostic_figures(results, best_models, one_seed)
    matrices = saved_matrices(directory)
    for model in one_seed:
        if model.name in matrices:
            figure = matrices_figure(matrices[model.name], model.label)
            caption = f"{model.label}: the teacher's attention and the student's mixing matrices on the same input"
            diagnostics.append(NamedFigure(f"matrices-{model.mixer}", caption, figure))
    all_models = [*others, *(model for own in students.values() for model in own)]
    overview = figures.recovered_figure(groups) + figures.pareto_figure(groups)
    costs = figures.length_figures(results, best_models, figures.COSTS, "cost-")
    sections = [
        Section("All students", overview, [grid_table(groups)], GRID_TEXT),
        Section("Time and memory by context length", costs),
        frontier_section(directory / "frontier"),
        Section("Long context", figures.length_figures(results, best_models, figures.LONG_CONTEXT)),
        Section("Recall", figures.recall_figures(results, one_seed)),
        Section("Mixing matrices and hidden states", diagnostics),
        Section("Training", figures.loss_figures(groups)),
        Section("The student", student_figures(groups)),
        Section("Evaluation", (), evaluation_tables(results, all_models), EVALUATION_TEXT),
    ]
    return [section for section in sections if section.figures or section.tables]


def frontier_section(directory: Path) -> Section:
    """What `subquad frontier` has measured into `directory`; empty if there is nothing."""
    title, frontier = "Quality against bytes of cache", read_frontier(directory)
    if frontier is None:
        return Section(title, ())
    caption = f"Quality against the bytes of the cache after {frontier.context:,} tokens. Hollow markers: trained"
    figure = NamedFigure("frontier", caption, frontier_figure(panels(frontier)))
    return Section(title, [figure], [frontier_table(frontier)])


def student_figures(groups: Sequence[Group]) -> list[NamedFigure]:
    """The diagram of the best student."""
    best = best_group(groups, "perplexity", lower_is_better=True)
    if best is None:
        return []
    run = next(run for run in best.runs if run.state == "finished")
    layer_specs = (read_json(run.directory / "config.json") or {}).get("layer_specs", [])
    caption = "The best student: one layer of the teacher and of the student, and what each stage compares"
    return [NamedFigure("student", caption, draw_student(run.recipe, [spec["mixer"] for spec in layer_specs]))]
