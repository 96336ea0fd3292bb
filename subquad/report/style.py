"""How figures look: one colour and marker for each mixer throughout, told apart without colour vision; and files."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Okabe and Ito's colours, their yellow darkened for white paper, and a brown; markers tell apart what is near.
MIXERS = {
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
OTHER = "#444444", "8"
"""Hybrids."""
TEACHER = "#000000"
RULES: dict[Any, Any] = {
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


def colour(mixer: str) -> str:
    return MIXERS.get(mixer, OTHER)[0]


def marker(mixer: str) -> str:
    return MIXERS.get(mixer, OTHER)[1]


def panel(width: float = 3.95, height: float = 3.4) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def plain_log(axis: Axis, values: Sequence[float], ticks: Sequence[float] | None = None) -> None:
    """Numbers of a logarithmic axis as they are spoken, so many of them as its range needs.

    ticks: those, in place of chosen ones.
    """
    decades = math.log10(max(values) / min(values)) if values and min(values) > 0 else 3
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1.5 else (1.0, 3.0) if decades < 3.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs) if ticks is None else FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: spoken(value)))
    axis.set_minor_locator(NullLocator())


def spoken(value: float) -> str:
    """`512`, `2k` (2,048 too), `16k`, `0.05`"""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:g}"


def mixer_legend(figure: Figure, mixers: Iterable[str], extra: Iterable[Line2D] = ()) -> None:
    """Below the axes, so that it hides nothing."""
    handles = [
        Line2D([], [], color=colour(name), marker=marker(name), linestyle="-", label=name.replace("_", " "))
        for name in mixers
    ]
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=3, handlelength=2.4)


def ordered(mixers: Iterable[str]) -> list[str]:
    """Each once, in the order of the table above."""
    found = set(mixers)
    return [name for name in MIXERS if name in found] + sorted(found - set(MIXERS))


def save(figure: Figure, stem: Path) -> str:
    """Writes `stem`.svg and `stem`.pdf, the same bytes for the same numbers; returns the SVG."""
    text = io.StringIO()
    with matplotlib.rc_context(RULES):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
        FigureCanvasPdf(figure).print_pdf(f"{stem}.pdf", metadata={"CreationDate": None})
    Path(f"{stem}.svg").write_text(text.getvalue())
    return text.getvalue()


def data_uri(svg: str) -> str:
    """An image that lies in the page itself, its names apart from those of others."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
