"""Plots of evaluation results against context length, layer, head and depth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from subquad.analysis import plot_style as style
from subquad.analysis.plot_style import NamedFigure
from subquad.analysis.plots import heat_maps
from subquad.evaluate.results import Result

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


def cost_figures(results: Sequence[Result], models: Sequence[PlotModel]) -> list[NamedFigure]:
    """Time and memory against context length."""
    drawn = []
    for metric, (title, ylabel, scale) in COSTS.items():
        figure = length_figure(results, models, metric, ylabel, scale)
        if figure is not None:
            drawn.append(NamedFigure(f"cost-{metric}", f"{title} by context length. {BEST_STUDENTS}", figure))
    return drawn


def long_context_figures(results: Sequence[Result], models: Sequence[PlotModel]) -> list[NamedFigure]:
    """Perplexity against context length."""
    drawn = []
    for metric, (title, ylabel) in LONG_CONTEXT.items():
        figure = length_figure(results, models, metric, ylabel)
        if figure is not None:
            drawn.append(NamedFigure(metric.replace("_", "-"), f"{title}. {BEST_STUDENTS}", figure))
    return drawn


def recall_figures(results: Sequence[Result], models: Sequence[PlotModel]) -> list[NamedFigure]:
    """Recall accuracy by depth and context length, one figure for each task and one heat map for each model."""
    drawn = []
    cells = [r for r in results if r.metric == "acc" and r.length is not None and r.depth is not None]
    for task in dict.fromkeys(r.task for r in cells):
        own = [r for r in cells if r.task == task]
        axis_labels = ("depth of the answer in the context", "tokens of context")
        figure = model_maps(own, models, lambda r: (r.depth, r.length), axis_labels, "accuracy", (0.0, 1.0))
        if figure is not None:
            name = "".join(c if c.isalnum() else "-" for c in task)
            caption = f"Accuracy in the recall task {task}. Best student of each mixer, one seed"
            drawn.append(NamedFigure(f"recall-{name}", caption, figure))
    return drawn


def diagnostic_figures(
    results: Sequence[Result], models: Sequence[PlotModel], one_seed_models: Sequence[PlotModel]
) -> list[NamedFigure]:
    """Each diagnostic by layer, for `models`, and by layer and head, a heat map for each of `one_seed_models`."""
    lines, maps = [], []
    for metric, label in DIAGNOSTICS.items():
        title = label[0].upper() + label[1:]
        cells = [r for r in results if r.metric == metric and r.layer is not None and r.head is not None]
        figure = layer_figure(results, models, metric)
        if figure is not None:
            mean = ", mean over heads" if cells else ""
            caption = f"{title}: by layer{mean}. Best student of each mixer"
            lines.append(NamedFigure(f"{metric}-layers", caption, figure))
        figure = model_maps(cells, one_seed_models, lambda r: (r.layer, r.head), ("layer", "head"), label)
        if figure is not None:
            caption = f"{title}: by layer and head. Best student of each mixer, one seed"
            maps.append(NamedFigure(f"{metric}-heads", caption, figure))
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


def model_maps(
    results: Sequence[Result],
    models: Sequence[PlotModel],
    coordinates: Callable[[Result], tuple],
    axis_labels: tuple[str, str],
    label: str,
    limits: tuple[float, float] | None = None,
) -> Figure | None:
    """`heat_maps` with one for each model, at most `MAX_HEAT_MAPS`; None if none was measured."""
    panels = {model.label: [r for r in results if r.model == model.name] for model in models}
    measured = [(title, own) for title, own in panels.items() if own][:MAX_HEAT_MAPS]
    return heat_maps(dict(measured), coordinates, axis_labels, label, limits, shared=True) if measured else None
