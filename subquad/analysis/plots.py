"""Figures of mixing matrices, half-lives, recall and hidden states, as SVG and PNG."""

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis import plot_style as style
from subquad.analysis.diagnostics import half_lives, sample_matrix_pairs
from subquad.analysis.mixing_matrices import MatrixPairs, normalized_abs_rows
from subquad.data.recall_tasks import NUM_DISTRACTORS, TASKS
from subquad.evaluate.results import Result, select

FILES = "svg", "png"
MIN_SHARE = 1e-3
"""Smaller shares of a row have the same color."""
MAX_CELLS_ACROSS = 8
"""Columns of a heat map up to which values are written into the cells."""


def matrices_figure(pairs: MatrixPairs, title: str) -> Figure:
    """For each (layer, head) the teacher's attention above the student's mixing matrix: |M|, each row divided by its
    sum."""
    figure = Figure(figsize=(1.6 + 2.3 * len(pairs), 5.2), layout="constrained")
    panels = figure.subplots(2, len(pairs), squeeze=False, sharex=True, sharey=True)
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    shown: Any = None
    for column, ((layer, head), pair) in zip(panels.T, pairs.items(), strict=True):
        for axes, M in zip(column, reversed(pair), strict=True):
            shares = normalized_abs_rows(M.detach().cpu().double()).clamp_min(MIN_SHARE)
            shares[torch.ones_like(shares, dtype=torch.bool).triu(1)] = torch.nan
            shown = axes.imshow(shares.numpy(), cmap=colors, norm=LogNorm(MIN_SHARE, 1.0), interpolation="nearest")
            axes.grid(False)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        column[0].set_title(f"layer {layer}, head {head}")
        column[1].set_xlabel("key")
    for axes, side in zip(panels[:, 0], ("teacher", "student"), strict=True):
        axes.set_ylabel(f"{side}\nquery")
    figure.suptitle(title, fontsize=10)
    figure.colorbar(shown, ax=panels, label="share of the row", extend="min", shrink=0.8)
    return figure


def half_life_figure(layers: Sequence[Tensor | None], title: str) -> Figure:
    """Half-lives by layer (`half_lives`), at least one of which has a decay: a point per channel and a line at the
    median of each head."""
    figure, axes = style.new_figure(1.8 + 0.8 * len(layers), 3.6)
    channels, medians = [], []
    for index, layer in enumerate(layers):
        axes.axvline(index + 0.5, color="0.85", linewidth=0.6)
        if layer is None:
            axes.axvspan(index - 0.45, index + 0.45, color="0.92")
            continue
        heads = layer.detach().cpu().double().view(len(layer), -1)
        for number, values in enumerate(heads):
            x = index + 0.8 * ((number + 0.5) / len(heads) - 0.5)
            medians.append((x, values.median().item()))
            channels += [(x, value) for value in values.tolist() if len(values) > 1]
    look: dict[str, Any] = {"color": style.color("gla"), "alpha": 0.25, "markersize": 4}
    axes.plot(*np.array(channels).reshape(-1, 2).T, ".", label="channel", **look)
    look = {"color": style.color("gated_deltanet"), "markersize": 8, "markeredgewidth": 2}
    axes.plot(*np.array(medians).T, "_", label="median of a head", **look)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
    axes.set(xlabel="layer (heads side by side; gray: no decay)", ylabel="half-life (tokens)", title=title)
    axes.set_xticks(range(len(layers)))
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.grid(axis="x", visible=False)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    legend.legend_handles[0].set_alpha(1)  # type: ignore[union-attr]
    return figure


def recall_figure(results: Sequence[Result], title: str) -> Figure:
    """Heat maps of the accuracy in recall tasks: length across, depth down (one row for tasks without depths)."""
    panels = {}
    for task in dict.fromkeys(result.task for result in results):
        own = select(results, task=task, metric="acc")
        panels[task] = [result for result in own if result.depth is not None] or own
    labels = ("depth of the answer", "tokens of context", f"acc (chance: {1 / (1 + NUM_DISTRACTORS):g})")
    figure = heat_maps(panels, ("depth", "length"), labels, (0.0, 1.0), columns=5)
    figure.suptitle(title, fontsize=10)
    return figure


def heat_maps(
    panels: Mapping[str, Sequence[Result]],
    fields: tuple[str, str],
    labels: tuple[str, str, str],
    limits: tuple[float, float] | None = None,
    columns: int = 3,
    shared: bool = False,
) -> Figure:
    """One heat map for each title and its results.

    Args:
        fields: of a result, by which it is in a row and column; a row of None has no label.
        labels: of rows, columns and the color bar.
        limits: values at the ends of the color scale, which are then written into the cells; by default the extremes.
        columns: heat maps side by side.
        shared: all heat maps have the same rows and columns, empty where there is no result.
    """
    coordinates = attrgetter(*fields)
    everything = [result for own in panels.values() for result in own]
    low, high = limits or (min(r.value for r in everything), max(r.value for r in everything))
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 2.1 * columns, 0.8 + 1.9 * lines), layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False, sharex=shared, sharey=shared).flatten()
    image: Any = None
    for axes, (title, own) in zip(all_axes, panels.items(), strict=False):
        cells = {coordinates(result): result.value for result in own}
        places = map(coordinates, everything) if shared else cells
        down, across = (sorted(set(values)) for values in zip(*places, strict=True))
        grid = np.array([[cells.get((y, x), np.nan) for x in across] for y in down])
        image = axes.imshow(grid, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        for (i, j), value in np.ndenumerate(grid):
            if limits and len(across) <= MAX_CELLS_ACROSS and not np.isnan(value):
                ink = "w" if value < low + 0.6 * (high - low) else "k"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
        axes.set_title(textwrap.fill(title, 24), fontsize=8)
        axes.grid(False)
        axes.set_xticks(range(len(across)), map(style.format_tick, across), rotation=90 if len(across) > 5 else 0)
        axes.set_yticks(range(len(down)), ["" if y is None else style.format_tick(y) for y in down])
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel(labels[0], fontsize=9)
    figure.supxlabel(labels[1], fontsize=9)
    figure.colorbar(image, ax=all_axes, label=labels[2], shrink=0.8)
    return figure


def windows_figure(windows: Sequence[Sequence[int | None]], title: str) -> Figure:
    """A heat map of the windows of all key/value heads by layer; None, all tokens, is written as "all"."""
    heads = max(map(len, windows))
    grid = np.array(
        [[(own[head] or np.inf) if head < len(own) else np.nan for own in windows] for head in range(heads)]
    )
    finite = grid[np.isfinite(grid)]
    figure = Figure(figsize=(1.8 + 0.26 * len(windows), 1.1 + 0.3 * heads), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="white", over="#D55E00")
    low, high = (finite.min(), finite.max()) if finite.size else (1, 2)
    norm = LogNorm(low, 1.001 * max(high, low + 1))  # the largest window is not over the scale
    colored = np.where(np.isinf(grid), 10 * high, grid)  # matplotlib leaves out infinite numbers
    image = axes.imshow(colored, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    for (head, layer), window in np.ndenumerate(grid):
        if not np.isnan(window):
            ink = "w" if norm(window) < 0.6 or np.isinf(window) else "k"
            text = "all" if np.isinf(window) else f"{window:.0f}"
            axes.text(layer, head, text, ha="center", va="center", fontsize=5, color=ink)
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(heads))
    axes.set(xlabel="layer", ylabel="key/value head", title=title)
    ticks = sorted({float(low), float(np.median(finite)) if finite.size else low, float(high)})
    bar = figure.colorbar(image, ax=axes, label="window (tokens)", ticks=ticks, format="%d")
    bar.minorticks_off()
    return figure


def cka_figure(results: Sequence[Result]) -> Figure:
    """Linear CKA by layer, a line for each model. results: those of single layers."""
    figure, axes = style.new_figure(5.6, 3.6)
    entries = []
    names = dict.fromkeys(result.model for result in results)
    for name, (ink, marker) in zip(names, itertools.cycle(style.MIXER_STYLES.values()), strict=False):
        x, y = zip(*style.points_by("layer", select(results, model=name)), strict=True)
        axes.plot(x, y, marker=marker, color=ink)
        entries.append(style.legend_line(name, marker=marker, color=ink))
    axes.set(xlabel="layer", ylabel="cka", title="Linear CKA of hidden states with the teacher")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.add_legend(figure, (), entries)
    return figure


FRONTIER_STYLES = {
    "uniform window": ("#000000", "o"),
    "windows by error": ("#D55E00", "X"),
    "streaming heads": ("#0072B2", "D"),
    "TOVA": ("#009E73", "^"),
    "4-bit cache": ("#CC79A7", "P"),
    "recipe": ("#E69F00", "s"),
}
"""Color and marker of each method but the teacher, which is a horizontal line."""


def frontier_figure(panels: Mapping[str, Sequence[tuple[str, bool, float, float]]]) -> Figure:
    """Quality against bytes of cache, a panel for each title: method, whether it is trained, bytes and value of each
    point. Uniform windows are a line; what is trained is hollow."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.7 + 2.5 * lines), layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    shown: dict[tuple[str, bool], Line2D] = {}
    for axes, (title, points) in zip(all_axes, panels.items(), strict=False):
        sizes = [size / 1e6 for method, _, size, _ in points if method in FRONTIER_STYLES]
        for method, trained in dict.fromkeys(point[:2] for point in points):
            own = sorted((size / 1e6, value) for *key, size, value in points if key == [method, trained])
            if method not in FRONTIER_STYLES:
                axes.axhline(own[0][1], color=style.GRAY, linewidth=1, linestyle=":")
                shown[method, trained] = style.legend_line(method, linewidth=1, linestyle=":")
                continue
            ink, marker = FRONTIER_STYLES[method]
            look: dict[str, Any] = {"color": ink, "marker": marker, "linestyle": "", "zorder": 3}
            if method == "uniform window":
                look |= {"linestyle": "--" if trained else "-", "markersize": 4, "zorder": 2}
            look |= {"markerfacecolor": "white"} if trained else {}
            axes.plot(*zip(*own, strict=True), **look)
            label = f"{method}, trained" if trained else method
            shown[method, trained] = style.legend_line(label, **look)
        axes.set(ylabel=title, xlabel="cache of one sequence, MB", xscale="log")
        style.format_log_axis(axes.xaxis, sizes)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    style.add_legend(figure, (), shown.values())
    return figure


# ---------------------------------------------------------------------- files


def file_stem(name: str) -> str:
    """The name of a model without characters that are unusual in file names."""
    return re.sub(r"[^\w.=-]+", "-", name)


@matplotlib.rc_context(style.RC_PARAMS)
def draw_student(
    name: str, model: PreTrainedModel, teacher: PreTrainedModel | None, rows: Tensor, directory: Path
) -> None:
    """Draws mixing matrices with the teacher's attention, and half-lives, on texts `rows: [N, T]` of token ids."""
    stem = file_stem(name)
    if teacher is not None:
        pairs = sample_matrix_pairs(model, teacher, rows)
        style.save_figure(matrices_figure(pairs, f"{name}: mixing matrices"), directory / f"{stem}-matrices", *FILES)
    layers = half_lives(model, rows)
    if any(layer is not None for layer in layers):
        style.save_figure(half_life_figure(layers, f"{name}: half-lives"), directory / f"{stem}-decays", *FILES)


@matplotlib.rc_context(style.RC_PARAMS)
def draw_windows(windows: Sequence[Sequence[int | None]], title: str, directory: Path) -> None:
    """Draws the windows of all key/value heads of a student with local attention."""
    style.save_figure(windows_figure(windows, title), directory / "windows", *FILES)


@matplotlib.rc_context(style.RC_PARAMS)
def draw_recall(results: Sequence[Result], directory: Path) -> None:
    """Draws the recall results of each model."""
    recall = [result for result in results if result.task in TASKS]
    for name in dict.fromkeys(result.model for result in recall):
        figure = recall_figure(select(recall, model=name), f"{name}: recall")
        style.save_figure(figure, directory / f"{file_stem(name)}-recall", *FILES)


@matplotlib.rc_context(style.RC_PARAMS)
def draw_cka(results: Sequence[Result], directory: Path) -> None:
    """Draws linear CKA by layer, all models in one figure."""
    by_layer = [result for result in results if result.metric == "cka" and result.layer is not None]
    if by_layer:
        style.save_figure(cka_figure(by_layer), directory / "cka", *FILES)


@matplotlib.rc_context(style.RC_PARAMS)
def draw_frontier(panels: Mapping[str, Sequence[tuple[str, bool, float, float]]], stem: Path) -> None:
    style.save_figure(frontier_figure(panels), stem, *FILES)
