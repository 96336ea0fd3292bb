"""Plots of evaluation results against context length, layer, head and depth."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from subquad.evaluate.results import Result
from subquad.report import style
from subquad.report.style import ReportFigure

COSTS = {
    "seconds_per_token": ("Decoding time per token", "milliseconds per decoded token", 1e3),
    "prefill_seconds": ("Time of a prefill", "seconds per prefill", 1.0),
    "cache_bytes": ("Cache size", "cache per sequence, MiB", 2.0**-20),
    "peak_bytes": ("Peak memory of a prefill", "peak memory of a prefill, MiB", 2.0**-20),
}
"""Caption, axis label and unit of a metric."""
LONG_CONTEXT = {
    "perplexity": ("Perplexity of the first tokens of a document", "perplexity of the first tokens"),
    "perplexity_by_position": ("Perplexity by position in a document", "perplexity at the position"),
}
DIAGNOSTICS = {
    "topk_mass_overlap": "top-k mass overlap with the attention",
    "cka": "CKA with the teacher",
    "diversity": "diversity of heads",
    "memory_length": "memory length, tokens",
    "half_life": "half-life, tokens",
    "mixer_error": "error of the mixer output",
}
MAX_HEAT_MAPS = 12
"""Heat maps in one figure."""
BEST_STUDENTS = "Best student of each mixer; models that are not students in black"


@dataclass(frozen=True)
class PlotModel:
    """An evaluated model: name, label, and the mixer that determines its color (None: not a student)."""

    name: str
    label: str
    mixer: str | None


def cost_figures(results: Sequence[Result], models: Sequence[PlotModel]) -> list[ReportFigure]:
    """Time and memory against context length."""
    drawn = []
    for metric, (title, ylabel, scale) in COSTS.items():
        figure = length_figure(results, models, metric, ylabel, scale)
        if figure is not None:
            drawn.append(ReportFigure(f"cost-{metric}", f"{title} by context length. {BEST_STUDENTS}", figure))
    return drawn


def long_context_figures(results: Sequence[Result], models: Sequence[PlotModel]) -> list[ReportFigure]:
    """Perplexity against context length."""
    drawn = []
    for metric, (title, ylabel) in LONG_CONTEXT.items():
        figure = length_figure(results, models, metric, ylabel)
        if figure is not None:
            drawn.append(ReportFigure(metric.replace("_", "-"), f"{title}. {BEST_STUDENTS}", figure))
    return drawn


def recall_figures(results: Sequence[Result], models: Sequence[PlotModel]) -> list[ReportFigure]:
    """Recall accuracy by depth and context length, one figure for each task and one heat map for each model."""
    drawn = []
    cells = [r for r in results if r.metric == "acc" and r.length is not None and r.depth is not None]
    for task in dict.fromkeys(r.task for r in cells):
        own = [r for r in cells if r.task == task]
        axis_labels = ("depth of the answer in the context", "tokens of context")
        figure = heat_maps(own, models, lambda r: (r.depth, r.length), axis_labels, "accuracy", (0.0, 1.0))
        if figure is not None:
            name = "".join(c if c.isalnum() else "-" for c in task)
            caption = f"Accuracy in the recall task {task}. Best student of each mixer, one seed"
            drawn.append(ReportFigure(f"recall-{name}", caption, figure))
    return drawn


def diagnostic_figures(
    results: Sequence[Result], models: Sequence[PlotModel], one_seed_models: Sequence[PlotModel]
) -> list[ReportFigure]:
    """Each diagnostic by layer, for `models`, and by layer and head, a heat map for each of `one_seed_models`."""
    lines, maps = [], []
    for metric, label in DIAGNOSTICS.items():
        title = label[0].upper() + label[1:]
        cells = [r for r in results if r.metric == metric and r.layer is not None and r.head is not None]
        figure = layer_figure(results, models, metric)
        if figure is not None:
            mean = ", mean over heads" if cells else ""
            caption = f"{title}: by layer{mean}. Best student of each mixer"
            lines.append(ReportFigure(f"{metric}-layers", caption, figure))
        figure = heat_maps(cells, one_seed_models, lambda r: (r.layer, r.head), ("layer", "head"), label)
        if figure is not None:
            caption = f"{title}: by layer and head. Best student of each mixer, one seed"
            maps.append(ReportFigure(f"{metric}-heads", caption, figure))
    return lines + maps


def length_figure(
    results: Sequence[Result], models: Sequence[PlotModel], metric: str, ylabel: str, scale: float = 1.0
) -> Figure | None:
    """A metric against context length, one line for each model; None if it was not measured."""
    lines = {}
    for model in models:
        own = [r for r in results if r.model == model.name and r.metric == metric and r.length and r.batch in (None, 1)]
        if own:
            lines[model] = sorted((r.length or 0, scale * r.value) for r in own)
    if not lines:
        return None
    figure, axes = style.new_figure()
    draw_lines(figure, axes, lines)
    axes.set(xlabel="tokens of context", ylabel=ylabel, xscale="log", yscale="log")
    style.format_log_axis(axes.xaxis, [], sorted({x for points in lines.values() for x, _ in points}))
    style.format_log_axis(axes.yaxis, [y for points in lines.values() for _, y in points])
    return figure


def layer_figure(results: Sequence[Result], models: Sequence[PlotModel], metric: str) -> Figure | None:
    """A diagnostic against the layer (mean over heads), one line for each model; None if it was not measured."""
    lines = {}
    for model in models:
        own = [r for r in results if r.model == model.name and r.metric == metric and r.layer is not None]
        per_layer = [r for r in own if r.head is None] or own
        layers = sorted({r.layer for r in per_layer if r.layer is not None})
        if layers:
            lines[model] = [(i, float(np.mean([r.value for r in per_layer if r.layer == i]))) for i in layers]
    if not lines:
        return None
    figure, axes = style.new_figure()
    draw_lines(figure, axes, lines)
    axes.set(xlabel="layer", ylabel=DIAGNOSTICS[metric])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_lines(figure: Figure, axes: Axes, lines: dict[PlotModel, list[tuple[int, float]]]) -> None:
    """Draws a line for each model and the legend; models that are not students are black with different dashes."""
    extra: list[Line2D] = []
    for model, points in lines.items():
        x, y = zip(*points, strict=True)
        if model.mixer is None:
            dash = ("-", "--", ":")[len(extra[:2])]
            look: dict[str, Any] = {"color": style.TEACHER_COLOR, "marker": ".", "linestyle": dash}
            axes.plot(x, y, zorder=3, **look)
            extra.append(style.legend_line(model.label, **look))
        else:
            axes.plot(x, y, color=style.color(model.mixer), marker=style.marker(model.mixer), markersize=4, alpha=0.85)
    style.add_mixer_legend(figure, style.sort_mixers(model.mixer for model in lines if model.mixer is not None), extra)


def heat_maps(
    results: Sequence[Result],
    models: Sequence[PlotModel],
    coordinates: Callable[[Result], tuple],
    axis_labels: tuple[str, str],
    label: str,
    limits: tuple[float, float] | None = None,
) -> Figure | None:
    """One heat map for each model; None if none was measured.

    coordinates: (row, column) of a result. limits: values at the ends of the color scale.
    """
    shown = [model for model in models if any(r.model == model.name for r in results)][:MAX_HEAT_MAPS]
    if not shown:
        return None
    row_values, column_values = (sorted({coordinates(r)[axis] for r in results}) for axis in (0, 1))
    low, high = limits or (min(r.value for r in results), max(r.value for r in results))
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1.2 + 2.1 * columns, 0.8 + 1.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for axes, model in zip(panels.flat, shown, strict=False):
        grid = np.full((len(row_values), len(column_values)), np.nan)
        for result in results:
            if result.model == model.name:
                row, column = coordinates(result)
                grid[row_values.index(row), column_values.index(column)] = result.value
        image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set_title(textwrap.fill(model.label, 24), fontsize=8)
        axes.grid(False)
        rotation = 90 if len(column_values) > 5 else 0
        axes.set_xticks(range(len(column_values)), [style.format_tick(v) for v in column_values], rotation=rotation)
        axes.set_yticks(range(len(row_values)), [style.format_tick(v) for v in row_values])
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel(axis_labels[1], fontsize=9)
    figure.supylabel(axis_labels[0], fontsize=9)
    figure.colorbar(image, ax=panels, label=label, shrink=0.8)
    return figure
