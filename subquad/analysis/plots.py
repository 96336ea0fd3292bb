"""Figures of mixing matrices, half-lives, recall and hidden states, as SVG and PNG.

Amounts are in viridis. Series have the colors of Okabe and Ito (gray instead of their yellow) and a marker each, which
tells them apart without color.
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
from transformers import PreTrainedModel

from subquad.analysis.diagnostics import sample_matrix_pairs
from subquad.analysis.half_life import half_lives
from subquad.analysis.mixing_matrices import MatrixPairs, normalized_abs_rows
from subquad.analysis.recall_tasks import TASKS
from subquad.evaluate.results import Result, select
from subquad.utils import UserError

COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"
MARKERS = "o", "s", "^", "D", "v", "P", "X", "*"
MIN_SHARE = 1e-3
"""Smaller shares of a row have the same color."""
MAX_COLUMNS = 5
"""Heat maps side by side."""


def matrices_figure(pairs: MatrixPairs, title: str) -> Figure:
    """For each (layer, head) the teacher's attention above the student's mixing matrix: |M|, each row divided by its
    sum.

    Raises:
        UserError: no pairs.
    """
    if not pairs:
        raise UserError("pairs: got none, expected at least one (layer, head)")
    figure = Figure(figsize=(1.6 + 2.3 * len(pairs), 5.2), layout="constrained")
    panels = figure.subplots(2, len(pairs), squeeze=False, sharex=True, sharey=True)
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    shown: Any = None
    for column, ((layer, head), pair) in enumerate(pairs.items()):
        for row, (side, M) in enumerate(zip(("teacher", "student"), reversed(pair), strict=True)):
            axes = panels[row][column]
            shares = normalized_abs_rows(M.detach().cpu().double()).clamp_min(MIN_SHARE)
            shares[torch.ones_like(shares, dtype=torch.bool).triu(1)] = torch.nan
            norm = LogNorm(MIN_SHARE, 1.0)
            shown = axes.imshow(shares.numpy(), cmap=colors, norm=norm, interpolation="nearest")
            axes.grid(False)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4, integer=True))
            if row == 0:
                axes.set_title(f"layer {layer}, head {head}", fontsize=9)
            else:
                axes.set_xlabel("key")
            if column == 0:
                axes.set_ylabel(f"{side}\nquery")
    figure.colorbar(shown, ax=panels, label="share of the row", shrink=0.8, extend="min")
    figure.suptitle(title, fontsize=10)
    return figure


def half_life_figure(layers: Sequence[Tensor | None], title: str) -> Figure:
    """Half-lives in tokens by layer, as `half_lives` gives them: a point per channel, a bar at each head's median.

    Raises:
        UserError: no layer has a decay.
    """
    if all(layer is None for layer in layers):
        raise UserError("half-lives: no layer has a decay, expected at least one")
    figure = Figure(figsize=(1.8 + 0.8 * len(layers), 3.6), layout="constrained")
    axes = figure.subplots()
    for index, layer in enumerate(layers):
        axes.axvline(index + 0.5, color="0.85", linewidth=0.6)
        if layer is None:
            axes.axvspan(index - 0.45, index + 0.45, color="0.92")
            continue
        heads = layer.detach().cpu().double().view(len(layer), -1)
        for number, channels in enumerate(heads):
            x = index + 0.8 * ((number + 0.5) / len(heads) - 0.5)
            if len(channels) > 1:
                axes.plot([x] * len(channels), channels.numpy(), ".", color=COLORS[0], alpha=0.25, markersize=4)
            axes.plot([x], [channels.median().item()], "_", color=COLORS[1], markersize=8, markeredgewidth=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
    # the legend, whichever layers there are
    axes.plot([], [], ".", color=COLORS[0], markersize=4, label="channel")
    axes.plot([], [], "_", color=COLORS[1], markersize=8, markeredgewidth=2, label="median of a head")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xlabel="layer (heads side by side; gray: no decay)", ylabel="half-life (tokens)", title=title)
    axes.set_xticks(range(len(layers)))
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.grid(axis="y", alpha=0.3)
    return figure


def recall_figure(results: Sequence[Result], title: str, metric: str = "acc") -> Figure:
    """Heat maps of recall results: one per task, length across, depth down (one row for tasks without depths).

    Raises:
        UserError: no result with this metric.
    """
    chosen = select(results, metric=metric)
    tasks = list(dict.fromkeys(result.task for result in chosen))
    if not tasks:
        raise UserError(f"results: got none with metric {metric!r}, expected some of recall_results")
    down = -(-len(tasks) // MAX_COLUMNS)
    across = min(MAX_COLUMNS, len(tasks))
    figure = Figure(figsize=(1.5 + 2.3 * across, 0.6 + 2.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    shown: Any = None
    for axes, task in zip(panels, tasks, strict=False):
        of_task = select(chosen, task=task)
        shown = heat_map(axes, [result for result in of_task if result.depth is not None] or of_task)
        axes.set_title(task, fontsize=9)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    figure.colorbar(shown, ax=panels, label=colorbar_label(results, metric), shrink=0.8)
    figure.suptitle(title, fontsize=10)
    return figure


def colorbar_label(results: Sequence[Result], metric: str) -> str:
    """The metric's name, with the accuracy of guessing if that is the same for all results."""
    chance = {result.value for result in select(results, metric="chance")}
    name = metric.replace("_", " ")
    return f"{name} (chance: {chance.pop():g})" if metric == "acc" and len(chance) == 1 else name


def heat_map(axes: Any, results: Sequence[Result]) -> Any:
    """Draws values from 0 to 1 by depth and length, and writes them into their cells. Returns the image."""
    lengths = sorted({result.length or 0 for result in results})
    depths = sorted({-1.0 if result.depth is None else result.depth for result in results})
    values = np.full((len(depths), len(lengths)), np.nan)
    for result in results:
        depth = -1.0 if result.depth is None else result.depth
        values[depths.index(depth), lengths.index(result.length or 0)] = result.value
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
    """A metric by layer, a line per model. series: results by model name; those of single heads are not drawn.

    Raises:
        UserError: a model without such results.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, results) in enumerate(series.items()):
        points = sorted((r.layer, r.value) for r in select(results, metric=metric, head=None) if r.layer is not None)
        if not points:
            raise UserError(f"{name}: got no results with metric {metric!r} by layer")
        color = COLORS[number % len(COLORS)]
        marker = MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), marker, ls="-", color=color, label=name, linewidth=1.2, markersize=4)
    axes.set(xlabel="layer", ylabel=metric, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# ---------------------------------------------------------------------- files


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes `stem`.svg and `stem`.png, byte for byte the same for equal figures. Returns both paths."""
    svg, png = stem.with_name(stem.name + ".svg"), stem.with_name(stem.name + ".png")
    with matplotlib.rc_context({"svg.hashsalt": "subquad"}):
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return [svg, png]


def draw_student(
    name: str, model: PreTrainedModel, teacher: PreTrainedModel | None, rows: Tensor, directory: Path
) -> None:
    """Draws mixing matrices with the teacher's attention, and half-lives, on texts `rows: [N, T]` of token ids."""
    stem = name.replace("/", "-")
    if teacher is not None:
        pairs = sample_matrix_pairs(model, teacher, rows)
        save_figure(matrices_figure(pairs, f"{name}: mixing matrices"), directory / f"{stem}-matrices")
    layers = half_lives(model, rows)
    if any(layer is not None for layer in layers):
        save_figure(half_life_figure(layers, f"{name}: half-lives"), directory / f"{stem}-decays")


def draw_recall(results: Sequence[Result], directory: Path) -> None:
    """Draws the recall results of each model."""
    recall = [result for result in results if result.task in TASKS]
    for name in dict.fromkeys(result.model for result in recall):
        figure = recall_figure(select(recall, model=name), f"{name}: recall")
        save_figure(figure, directory / f"{name.replace('/', '-')}-recall")


def draw_cka(results: Sequence[Result], directory: Path) -> None:
    """Draws linear CKA by layer, all models in one figure."""
    by_layer = [result for result in select(results, metric="cka") if result.layer is not None]
    series = {name: select(by_layer, model=name) for name in dict.fromkeys(result.model for result in by_layer)}
    if series:
        figure = layers_figure(series, "cka", "Linear CKA of hidden states with the teacher")
        save_figure(figure, directory / "cka")
