"""Figures of what evaluations measured, over context length, layer, head and depth: of long-form rows alone."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from subquad.evaluate.results import Result
from subquad.report.style import TEACHER, colour, marker, mixer_legend, ordered, panel, plain_log

COSTS = {
    "seconds_per_token": ("milliseconds a decoded token", 1e3),
    "prefill_seconds": ("seconds of a prefill", 1.0),
    "cache_bytes": ("MiB held for a sequence", 2.0**-20),
    "peak_bytes": ("peak MiB of a prefill", 2.0**-20),
}
BY_LAYER = {
    "overlap": "overlap with the attention",
    "cka": "CKA with the teacher",
    "diversity": "diversity of heads",
    "memory_length": "memory, tokens",
    "half_life": "half-life, tokens",
    "mixer_error": "error of the mixer's output",
}
MOST = 12
"""Heat maps of one kind."""


@dataclass(frozen=True)
class PlotModel:
    """A model of an evaluation: its name, how to call it, and the mixer that colours it (None: not a student)."""

    name: str
    label: str
    mixer: str | None


def length_figure(
    rows: Sequence[Result], who: Sequence[PlotModel], metric: str, ylabel: str, scale: float = 1.0
) -> Figure | None:
    """A metric against the tokens of context, a line a student (and seed), the teacher in black."""
    lines = {}
    for model in who:
        own = [r for r in rows if r.model == model.name and r.metric == metric and r.length and r.batch in (None, 1)]
        if own:
            lines[model] = sorted((r.length or 0, scale * r.value) for r in own)
    if not lines:
        return None
    figure, axes = panel()
    extra: list[Line2D] = []
    for model, points in lines.items():
        x, y = zip(*points, strict=True)
        if model.mixer is None:
            dash: Any = "-" if not extra else "--" if len(extra) == 1 else ":"
            axes.plot(x, y, color=TEACHER, linestyle=dash, marker=".", zorder=3)
            extra.append(Line2D([], [], color=TEACHER, linestyle=dash, marker=".", label=model.label))
        else:
            axes.plot(x, y, color=colour(model.mixer), marker=marker(model.mixer), markersize=4, alpha=0.85)
    axes.set(xlabel="tokens of context", ylabel=ylabel, xscale="log", yscale="log")
    plain_log(axes.xaxis, [], sorted({x for points in lines.values() for x, _ in points}))
    plain_log(axes.yaxis, [y for points in lines.values() for _, y in points])
    mixer_legend(figure, ordered(model.mixer for model in lines if model.mixer is not None), extra)
    return figure


def layer_figure(rows: Sequence[Result], who: Sequence[PlotModel], metric: str) -> Figure | None:
    """A diagnostic against the layer (means over heads)."""
    lines = {}
    for model in who:
        own = [r for r in rows if r.model == model.name and r.metric == metric and r.layer is not None]
        whole = [r for r in own if r.head is None] or own
        layers = sorted({r.layer for r in whole if r.layer is not None})
        if layers:
            lines[model] = [(i, float(np.mean([r.value for r in whole if r.layer == i]))) for i in layers]
    if not lines:
        return None
    figure, axes = panel()
    extra = []
    for model, points in lines.items():
        paint = TEACHER if model.mixer is None else colour(model.mixer)
        axes.plot(*zip(*points, strict=True), color=paint, marker="." if model.mixer is None else marker(model.mixer))
        if model.mixer is None:
            extra.append(Line2D([], [], color=TEACHER, marker=".", label=model.label))
    axes.set(xlabel="layer", ylabel=BY_LAYER.get(metric, metric.replace("_", " ")))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    mixer_legend(figure, ordered(model.mixer for model in lines if model.mixer is not None), extra)
    return figure


def head_maps(rows: Sequence[Result], who: Sequence[PlotModel], metric: str) -> Figure | None:
    """Layer by head, a map a model."""
    return _maps(
        [r for r in rows if r.metric == metric and r.layer is not None and r.head is not None],
        who,
        lambda r: (r.layer, r.head),
        ("layer", "head"),
        BY_LAYER.get(metric, metric.replace("_", " ")),
        str,
    )


def recall_maps(rows: Sequence[Result], who: Sequence[PlotModel], task: str) -> Figure | None:
    """Accuracy by depth and length, a map a model."""
    return _maps(
        [r for r in rows if r.task == task and r.metric == "acc" and r.length is not None and r.depth is not None],
        who,
        lambda r: (r.depth, r.length),
        ("depth of the answer", "tokens of context"),
        "answered rightly",
        lambda value: f"{value:g}",
        (0.0, 1.0),
    )


def _maps(
    rows: Sequence[Result],
    who: Sequence[PlotModel],
    place: Callable[[Result], tuple],
    names: tuple[str, str],
    label: str,
    say: Callable,
    limits: tuple[float, float] | None = None,
) -> Figure | None:
    known = [model for model in who if any(r.model == model.name for r in rows)][:MOST]
    if not known:
        return None
    down = sorted({place(r)[0] for r in rows})
    across = sorted({place(r)[1] for r in rows})
    low, high = limits or (min(r.value for r in rows), max(r.value for r in rows))
    columns = min(3, len(known))
    lines = -(-len(known) // columns)
    figure = Figure(figsize=(1.2 + 2.1 * columns, 0.8 + 1.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes, model in zip(panels.flat, known, strict=False):
        grid = np.full((len(down), len(across)), np.nan)
        for r in rows:
            if r.model == model.name:
                row, column = place(r)
                grid[down.index(row), across.index(column)] = r.value
        image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        axes.set_title(textwrap.fill(model.label, 24), fontsize=8)
        axes.grid(False)
        axes.set_xticks(range(len(across)), [say(v) for v in across], rotation=90 if len(across) > 5 else 0)
        axes.set_yticks(range(len(down)), [say(v) for v in down])
    for axes in list(panels.flat)[len(known) :]:
        axes.set_visible(False)
    figure.supxlabel(names[1], fontsize=9)
    figure.supylabel(names[0], fontsize=9)
    figure.colorbar(image, ax=panels, label=label, shrink=0.8)  # type: ignore[arg-type]
    return figure


def cost_figures(rows: Sequence[Result], who: Sequence[PlotModel]) -> dict[str, Figure]:
    """Time and memory against length."""
    drawn = {m: length_figure(rows, who, m, label, scale) for m, (label, scale) in COSTS.items()}
    return {f"cost-{metric}": figure for metric, figure in drawn.items() if figure is not None}


def recall_tasks(rows: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.task for r in rows if r.metric == "acc" and r.depth is not None))


def diagnostic_figures(
    rows: Sequence[Result], who: Sequence[PlotModel], once: Sequence[PlotModel]
) -> dict[str, Figure]:
    """`who` in lines by layer, `once` in a map each."""
    drawn = {f"{metric}-layers": layer_figure(rows, who, metric) for metric in BY_LAYER}
    drawn.update({f"{metric}-heads": head_maps(rows, once, metric) for metric in BY_LAYER})
    return {name: figure for name, figure in drawn.items() if figure is not None}
