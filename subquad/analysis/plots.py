"""Figures of mixing matrices, half-lives, recall and hidden states, as SVG and PNG."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.diagnostics import half_lives, sample_matrix_pairs
from subquad.analysis.mixing_matrices import MatrixPairs, normalized_abs_rows
from subquad.analysis.plot_style import MIXER_STYLES, color, format_tick, save_figure
from subquad.analysis.recall_tasks import TASKS
from subquad.evaluate.results import Result, select
from subquad.utils import UserError

FILES = "svg", "png"
MIN_SHARE = 1e-3
"""Smaller shares of a row have the same color."""
MAX_CELLS_ACROSS = 8
"""Columns of a heat map up to which values are written into the cells."""


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
                axes.plot([x] * len(channels), channels.numpy(), ".", color=color("gla"), alpha=0.25, markersize=4)
            axes.plot(
                [x], [channels.median().item()], "_", color=color("gated_deltanet"), markersize=8, markeredgewidth=2
            )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
    # the legend, whichever layers there are
    axes.plot([], [], ".", color=color("gla"), markersize=4, label="channel")
    axes.plot([], [], "_", color=color("gated_deltanet"), markersize=8, markeredgewidth=2, label="median of a head")
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
    tasks: dict[str, list[Result]] = {}
    for result in select(results, metric=metric):
        tasks.setdefault(result.task, []).append(result)
    if not tasks:
        raise UserError(f"results: got none with metric {metric!r}, expected some of recall_results")
    by_depth = {task: [r for r in own if r.depth is not None] or own for task, own in tasks.items()}
    label = colorbar_label(results, metric)
    axis_labels = ("depth of the answer", "tokens of context")
    figure = heat_maps(by_depth, lambda r: (r.depth, r.length), axis_labels, label, (0.0, 1.0), columns=5)
    figure.suptitle(title, fontsize=10)
    return figure


def colorbar_label(results: Sequence[Result], metric: str) -> str:
    """The metric's name, with the accuracy of guessing if that is the same for all results."""
    chance = {result.value for result in select(results, metric="chance")}
    name = metric.replace("_", " ")
    return f"{name} (chance: {chance.pop():g})" if metric == "acc" and len(chance) == 1 else name


def heat_maps(
    panels: Mapping[str, Sequence[Result]],
    coordinates: Callable[[Result], tuple],
    axis_labels: tuple[str, str],
    label: str,
    limits: tuple[float, float] | None = None,
    columns: int = 3,
    shared: bool = False,
) -> Figure:
    """One heat map for each title and its results.

    Args:
        coordinates: (row, column) of a result; a row of None has no label.
        axis_labels: of rows and columns.
        label: of the color bar.
        limits: values at the ends of the color scale, which are then written into the cells; by default the extremes.
        columns: heat maps side by side.
        shared: all heat maps have the same rows and columns, empty where there is no result.
    """
    everything = [result for own in panels.values() for result in own]
    low, high = limits or (min(r.value for r in everything), max(r.value for r in everything))
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 2.1 * columns, 0.8 + 1.9 * lines), layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False, sharex=shared, sharey=shared).flatten()
    image: Any = None
    for axes, (title, own) in zip(all_axes, panels.items(), strict=False):
        cells = {coordinates(result): result.value for result in own}
        places = [coordinates(result) for result in (everything if shared else own)]
        across, down = (sorted({place[axis] for place in places}) for axis in (1, 0))
        grid = np.array([[cells.get((y, x), np.nan) for x in across] for y in down])
        image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        for (i, j), value in np.ndenumerate(grid):
            if limits and len(across) <= MAX_CELLS_ACROSS and not np.isnan(value):
                ink = "w" if value < low + 0.6 * (high - low) else "k"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
        axes.set_title(textwrap.fill(title, 24), fontsize=8)
        axes.grid(False)
        axes.set_xticks(range(len(across)), map(format_tick, across), rotation=90 if len(across) > 5 else 0)
        axes.set_yticks(range(len(down)), ["" if y is None else format_tick(y) for y in down])
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(axis_labels[1], fontsize=9)
    figure.supylabel(axis_labels[0], fontsize=9)
    figure.colorbar(image, ax=all_axes, label=label, shrink=0.8)
    return figure


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
        ink, marker = list(MIXER_STYLES.values())[number % len(MIXER_STYLES)]
        axes.plot(*zip(*points, strict=True), marker, ls="-", color=ink, label=name, linewidth=1.2, markersize=4)
    axes.set(xlabel="layer", ylabel=metric, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# ---------------------------------------------------------------------- files


def draw_student(
    name: str, model: PreTrainedModel, teacher: PreTrainedModel | None, rows: Tensor, directory: Path
) -> None:
    """Draws mixing matrices with the teacher's attention, and half-lives, on texts `rows: [N, T]` of token ids."""
    stem = name.replace("/", "-")
    if teacher is not None:
        pairs = sample_matrix_pairs(model, teacher, rows)
        save_figure(matrices_figure(pairs, f"{name}: mixing matrices"), directory / f"{stem}-matrices", *FILES)
    layers = half_lives(model, rows)
    if any(layer is not None for layer in layers):
        save_figure(half_life_figure(layers, f"{name}: half-lives"), directory / f"{stem}-decays", *FILES)


def draw_recall(results: Sequence[Result], directory: Path) -> None:
    """Draws the recall results of each model."""
    recall = [result for result in results if result.task in TASKS]
    for name in dict.fromkeys(result.model for result in recall):
        figure = recall_figure(select(recall, model=name), f"{name}: recall")
        save_figure(figure, directory / f"{name.replace('/', '-')}-recall", *FILES)


def draw_cka(results: Sequence[Result], directory: Path) -> None:
    """Draws linear CKA by layer, all models in one figure."""
    by_layer = [result for result in select(results, metric="cka") if result.layer is not None]
    series = {name: select(by_layer, model=name) for name in dict.fromkeys(result.model for result in by_layer)}
    if series:
        figure = layers_figure(series, "cka", "Linear CKA of hidden states with the teacher")
        save_figure(figure, directory / "cka", *FILES)
