"""Pictures of what the diagnostics found, as SVG and PNG. Takes numbers, knows nothing of models.

Amounts are in viridis, series in the colours of Okabe and Ito (grey for their yellow) with a marker each: both are told
apart without colour vision, and in print.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from subquad.analysis.mixing_matrices import normalized_abs_rows
from subquad.evaluate.results import Result, select
from subquad.utils import UserError

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"
MARKERS = "o", "s", "^", "D", "v", "P", "X", "*"
FAINTEST = 1e-3
"""Share of a row below which entries of a matrix look alike."""
ACROSS = 5


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes `stem`.svg and `stem`.png, the same bytes for the same numbers; returns both paths."""
    svg, png = stem.with_name(stem.name + ".svg"), stem.with_name(stem.name + ".png")
    with matplotlib.rc_context({"svg.hashsalt": "subquad"}):
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return [svg, png]


def matrices_figure(beside: Mapping[tuple[int, int], tuple[Tensor, Tensor]], title: str) -> Figure:
    """Of each (layer, head), the teacher's attention above and the student's mixing matrix below it, each `[T, T]`
    (a mapping to student's, teacher's): the size of each entry as a share of its row."""
    if not beside:
        raise UserError("no heads to draw; expected at least one (layer, head)")
    figure = Figure(figsize=(1.6 + 2.3 * len(beside), 5.2), layout="constrained")
    panels = figure.subplots(2, len(beside), squeeze=False, sharex=True, sharey=True)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    shown: Any = None
    for column, ((layer, head), pair) in enumerate(beside.items()):
        for row, (who, M) in enumerate(zip(("teacher", "student"), reversed(pair), strict=True)):
            axes = panels[row][column]
            shares = normalized_abs_rows(M.detach().cpu().double()).clamp_min(FAINTEST)
            shares[torch.ones_like(shares, dtype=torch.bool).triu(1)] = torch.nan
            norm = LogNorm(FAINTEST, 1.0)
            shown = axes.imshow(shares.numpy(), cmap=colours, norm=norm, interpolation="nearest")
            axes.grid(False)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4, integer=True))
            if row == 0:
                axes.set_title(f"layer {layer}, head {head}", fontsize=9)
            else:
                axes.set_xlabel("token attended to")
            if column == 0:
                axes.set_ylabel(f"{who}\ntoken that attends")
    figure.colorbar(shown, ax=panels, label="share of the row", shrink=0.8, extend="min")
    figure.suptitle(title, fontsize=10)
    return figure


def decay_figure(half_lives: Sequence[Tensor | None], title: str) -> Figure:
    """Half-lives in tokens, `[H]` or `[H, K]` a layer (None: no decay), as `decays.half_lives` gives them: a point a
    channel, a bar for the median of each head."""
    if all(layer is None for layer in half_lives):
        raise UserError("no layer has a decay; expected half-lives of at least one")
    figure = Figure(figsize=(1.8 + 0.8 * len(half_lives), 3.6), layout="constrained")
    axes = figure.subplots()
    for index, layer in enumerate(half_lives):
        axes.axvline(index + 0.5, color="0.85", linewidth=0.6)
        if layer is None:
            axes.axvspan(index - 0.45, index + 0.45, color="0.92")
            continue
        heads = layer.detach().cpu().double().view(len(layer), -1)
        for number, channels in enumerate(heads):
            x = index + 0.8 * ((number + 0.5) / len(heads) - 0.5)
            if len(channels) > 1:
                axes.plot([x] * len(channels), channels.numpy(), ".", color=COLOURS[0], alpha=0.25, markersize=4)
            axes.plot([x], [channels.median().item()], "_", color=COLOURS[1], markersize=8, markeredgewidth=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
    # Named once, whichever layers there are.
    axes.plot([], [], ".", color=COLOURS[0], markersize=4, label="a channel")
    axes.plot([], [], "_", color=COLOURS[1], markersize=8, markeredgewidth=2, label="median of a head")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="layer (its heads side by side; grey: no decay)", ylabel="half-life (tokens)", title=title)
    axes.set_xticks(range(len(half_lives)))
    axes.set_xlim(-0.6, len(half_lives) - 0.4)
    axes.grid(axis="y", alpha=0.3)
    return figure


def recall_figure(rows: Sequence[Result], title: str, metric: str = "acc") -> Figure:
    """A heat map a task, length across and depth down, from `recall_rows`; a task without depths has one row."""
    wanted = select(rows, metric=metric)
    tasks = list(dict.fromkeys(row.task for row in wanted))
    if not tasks:
        raise UserError(f"no rows with metric {metric!r}; expected some of recall_rows")
    down = -(-len(tasks) // ACROSS)
    across = min(ACROSS, len(tasks))
    figure = Figure(figsize=(1.5 + 2.3 * across, 0.6 + 2.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    shown: Any = None
    for axes, task in zip(panels, tasks, strict=False):
        own = select(wanted, task=task)
        shown = heat_map(axes, [row for row in own if row.depth is not None] or own)
        axes.set_title(task, fontsize=9)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    figure.colorbar(shown, ax=panels, label=label(rows, metric), shrink=0.8)
    figure.suptitle(title, fontsize=10)
    return figure


def label(rows: Sequence[Result], metric: str) -> str:
    """The name of a metric, with what guessing gives, where that is known and one number."""
    chance = {row.value for row in select(rows, metric="chance")}
    name = metric.replace("_", " ")
    return f"{name} (chance: {chance.pop():g})" if metric == "acc" and len(chance) == 1 else name


def heat_map(axes: Any, rows: Sequence[Result]) -> Any:
    """Values from 0 to 1 of rows with lengths and depths, written into their cells."""
    lengths = sorted({row.length or 0 for row in rows})
    depths = sorted({-1.0 if row.depth is None else row.depth for row in rows})
    values = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        depth = -1.0 if row.depth is None else row.depth
        values[depths.index(depth), lengths.index(row.length or 0)] = row.value
    shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), ["" if depth < 0 else f"{depth:g}" for depth in depths], fontsize=8)
    axes.set_xlabel("length (tokens)", fontsize=8)
    if depths[0] >= 0:
        axes.set_ylabel("depth", fontsize=8)
    return shown


def layers_figure(series: Mapping[str, Sequence[Result]], metric: str, title: str) -> Figure:
    """A metric by layer, such as `cka`, a line for each model: a mapping from its name to rows, of which those of whole
    layers are drawn."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, rows) in enumerate(series.items()):
        found = [row for row in select(rows, metric=metric, head=None) if row.layer is not None]
        if not found:
            raise UserError(f"no rows of {name!r} have metric {metric!r} by layer")
        points = sorted((row.layer, row.value) for row in found if row.layer is not None)
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), marker, ls="-", color=colour, label=name, linewidth=1.2, markersize=4)
    axes.set(xlabel="layer", ylabel=metric, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
