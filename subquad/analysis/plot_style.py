"""The look of all figures: a color and a marker for each mixer, distinguishable without color vision; saving."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from subquad.evaluate.results import Result

# The colors of Okabe and Ito, with a darker yellow for white paper and a brown; markers separate similar colors.
MIXER_STYLES = {
    "linear_attention": ("#E69F00", "o"),
    "retnet": ("#56B4E9", "s"),
    "mamba2": ("#009E73", "^"),
    "gla": ("#0072B2", "D"),
    "metala": ("#B8A500", "v"),
    "deltanet": ("#CC79A7", "P"),
    "gated_deltanet": ("#D55E00", "X"),
    "xlstm": ("#7A3E00", "*"),
    "kda": ("#6B5BD2", "p"),
    "hgrn2": ("#5E7F24", "h"),
    "softmax": ("#777777", "d"),
}
OTHER_STYLE = "#444444", "8"
"""Of hybrids."""
TEACHER_COLOR = "#000000"
GRAY = "#555555"
KEY_COLUMNS = 5
"""Of a key that several figures share."""
LABEL_OFFSETS = ((8, 6), (8, -6), (-8, 6), (-8, -6), (0, 9), (0, -9), (10, 0), (-10, 0))
"""Places of a label beside its point, in points of 1/72 inch."""
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
    "png": {"metadata": {"Software": None}, "dpi": 150},
}
"""By file format; without times and versions, so that equal figures give equal files."""
RC_PARAMS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.facecolor": "white",
    "svg.hashsalt": "subquad",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}


def color(mixer: str) -> str:
    return MIXER_STYLES.get(mixer, OTHER_STYLE)[0]


def look(mixer: str) -> dict[str, Any]:
    """Properties of a line."""
    return dict(zip(("color", "marker"), MIXER_STYLES.get(mixer, OTHER_STYLE), strict=True))


def mixer_label(mixer: str) -> str:
    return mixer.replace("_", " ")


def sort_mixers(mixers: Iterable[str]) -> list[str]:
    """The distinct mixers in the order of `MIXER_STYLES`, then the others by name."""
    distinct = set(mixers)
    return [name for name in MIXER_STYLES if name in distinct] + sorted(distinct - set(MIXER_STYLES))


def new_figure(width: float = 3.95, height: float = 3.4) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def legend_line(label: str, **style: Any) -> Line2D:
    """A legend entry, gray unless `style` has a color."""
    return Line2D([], [], label=label, **{"color": GRAY, **style})


def legend_figure(legend: Legend) -> Figure:
    """A figure with nothing but the entries of `legend`."""
    handles, labels = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
    rows = -(-len(labels) // KEY_COLUMNS)
    figure = Figure(figsize=(7.0, 0.1 + 0.2 * rows))
    figure.legend(handles=handles, labels=labels, loc="center left", ncols=KEY_COLUMNS, handlelength=2.4)
    return figure


def add_legend(figure: Figure, mixers: Iterable[str], extra: Iterable[Line2D] = ()) -> None:
    """Adds a legend below the axes: the distinct mixers, then `extra` entries."""
    handles = [legend_line(mixer_label(name), **look(name)) for name in sort_mixers(mixers)]
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=3, handlelength=2.4)


def label_points(axes: Axes, points: Sequence[tuple[float, float]], labels: Mapping[int, str]) -> None:
    """Writes the labels of some points beside them, each on the side on which the other points and labels are farthest.
    The limits and the scales of the axes must be final."""
    axes.autoscale_view()
    width, height = axes.figure.get_size_inches() * 72  # type: ignore[union-attr]
    to_axes = axes.transData + axes.transAxes.inverted()
    taken = [tuple(place * (width, height)) for place in to_axes.transform(points)]
    for index, label in labels.items():
        x, y = taken[index]

        def distance(offset: tuple[float, float], x: float = x, y: float = y) -> float:
            return min(math.dist((x + offset[0], y + offset[1]), place) for place in taken)

        best = max(LABEL_OFFSETS, key=distance)
        taken.append((x + best[0], y + best[1]))
        place: dict[str, Any] = {"xytext": best, "textcoords": "offset points", "ha": "center", "va": "center"}
        axes.annotate(label, points[index], fontsize=8, **place)


def points_by(field: str, results: Iterable[Result]) -> list[tuple[float, float]]:
    """(x, value) with x the layer or length of results, by increasing x; the mean where several have one x. Results of
    heads count only if there are no others."""
    values: dict[float, list[float]] = {}
    found = [result for result in results if getattr(result, field) is not None]
    for result in [result for result in found if result.head is None] or found:
        values.setdefault(getattr(result, field), []).append(result.value)
    return [(x, statistics.fmean(own)) for x, own in sorted(values.items())]


def format_log_axis(axis: Axis, values: Sequence[float], ticks: Sequence[float] | None = None) -> None:
    """Labels a logarithmic axis with plain numbers, at `ticks` or at a density that suits the range of `values`."""
    decades = math.log10(max(values) / min(values)) if values and min(values) > 0 else 3
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1.5 else (1.0, 3.0) if decades < 3.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs) if ticks is None else FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axis.set_minor_locator(NullLocator())


def format_tick(value: float) -> str:
    """`512`, `2k` (also for 2,048), `16k`, `0.05`."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def save_figure(figure: Figure, stem: Path, *formats: str) -> list[Path]:
    """Writes `stem`.svg and the like, byte for byte the same for equal figures, and returns the paths.

    formats: keys of `SAVE_OPTIONS`.
    """
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    with matplotlib.rc_context(RC_PARAMS):
        for path, suffix in zip(paths, formats, strict=True):
            figure.savefig(path, format=suffix, **SAVE_OPTIONS[suffix])
    return paths
