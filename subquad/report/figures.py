"""The figures of a report, each from results alone: training and quality of runs (this file), what evaluations measured
(`measured.py`), and what a student is (`diagram.py`)."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from subquad.distill.metrics import read_jsonl
from subquad.report.style import TEACHER, colour, marker, mixer_legend, ordered, panel, plain_log
from subquad.study.aggregate import Group

TITLES = {"matrix": "stage 1: matrix mixing", "hidden": "stage 2: hidden states", "end_to_end": "stage 3: end to end"}
LOSSES = {
    "matrix": "squared distance, a matrix row",
    "hidden": "relative squared distance",
    "end_to_end": "loss, nats a token",
}


def stage_sets(groups: Sequence[Group]) -> list[str]:
    """The most stages first."""
    return sorted({group.stages for group in groups}, key=lambda text: (-len(text), text))


def recovered_figure(groups: Sequence[Group]) -> Figure | None:
    """The recovered share of every mixer, a mark for each stage set, hollow without copied projections."""
    shown = [(group, mean) for group in groups if (mean := group.mean("recovered_share")) is not None]
    if not shown:
        return None
    mixers, sets = ordered(group.mixer for group, _ in shown), stage_sets(groups)
    figure, axes = panel(6.0, 0.9 + 0.46 * len(mixers) + 0.3 * (len(sets) > 3))
    shapes = dict(zip(sets, "osD^vPX", strict=False))
    for group, mean in shown:
        place = mixers.index(group.mixer) + 0.18 * (sets.index(group.stages) - (len(sets) - 1) / 2)
        paint = colour(group.mixer)
        if mean.low is not None:
            axes.plot([100 * mean.low, 100 * (mean.high or 0)], [place, place], color=paint, linewidth=1)
        filled = paint if group.copy_qkv else "white"
        axes.plot(100 * mean.value, place, shapes.get(group.stages, "o"), color=paint, markerfacecolor=filled)
    axes.set_yticks(range(len(mixers)), [name.replace("_", " ") for name in mixers])
    axes.set_ylim(len(mixers) - 0.5, -0.5)
    axes.set_xlabel("recovered, % (0: token frequencies, 100: the teacher)")
    axes.axvline(100, color=TEACHER, linewidth=0.8)
    keys = [Line2D([], [], color="#555555", marker=shapes.get(s, "o"), linestyle="", label=f"stages {s}") for s in sets]
    if len({group.copy_qkv for group, _ in shown}) > 1:
        for label, filled in (("q, k, v, o copied", "#555555"), ("not copied", "white")):
            keys.append(Line2D([], [], color="#555555", marker="o", markerfacecolor=filled, linestyle="", label=label))
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure


def loss_figures(groups: Sequence[Group]) -> dict[str, Figure]:
    """A figure for each stage of each stage set: the loss of every run against its tokens."""
    found = {}
    for stages in stage_sets(groups):
        own = [group for group in groups if group.stages == stages]
        curves = {run.name: read_jsonl(run.directory / "metrics.jsonl") for group in own for run in group.runs}
        for stage in TITLES:
            if any(row["stage"] == stage and "loss" in row for rows in curves.values() for row in rows):
                found[f"loss-{stages.replace('+', '')}-{stage}"] = _loss(own, curves, stages, stage)
    return found


def _loss(groups: Sequence[Group], curves: dict[str, list[dict]], stages: str, stage: str) -> Figure:
    figure, axes = panel()
    several = len({group.copy_qkv for group in groups}) > 1
    drawn = set()
    for group in groups:
        for run in group.runs:
            points = [(r["tokens"], r["loss"]) for r in curves[run.name] if r["stage"] == stage and "loss" in r]
            if points:
                dash = "--" if several and not group.copy_qkv else "-"
                axes.plot(*zip(*points, strict=True), color=colour(group.mixer), linestyle=dash, linewidth=1.1)
                axes.plot(*points[-1], marker(group.mixer), color=colour(group.mixer), markersize=4)
                drawn.add(group.mixer)
    axes.set(title=f"stages {stages}, {TITLES[stage]}", xlabel="tokens", ylabel=LOSSES[stage])
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    plain_log(axes.yaxis, [r["loss"] for rows in curves.values() for r in rows if r["stage"] == stage and "loss" in r])
    extra = [Line2D([], [], color="#555555", linestyle="--", label="not copied")] if several else []
    mixer_legend(figure, ordered(drawn), extra)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of those points (cost, error) that no other beats in both, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def cost_figure(points: Sequence[tuple[str, str, float, float]], xlabel: str, teacher: float) -> Figure:
    """Quality against the cost of decoding: (label, mixer, seconds a token, perplexity) each, and the front of those
    that nothing beats in both.

    teacher: its perplexity.
    """
    figure, axes = panel(6.0, 4.6)
    front = pareto([(seconds, perplexity) for _, _, seconds, perplexity in points])
    for index, (_, mixer, seconds, perplexity) in enumerate(points):
        axes.plot(1e3 * seconds, perplexity, marker(mixer), color=colour(mixer), alpha=1 if index in front else 0.6)
        if index in front:
            number = f"{front.index(index) + 1}"
            axes.annotate(number, (1e3 * seconds, perplexity), xytext=(5, 4), textcoords="offset points", fontsize=8)
    line = [points[i] for i in front]
    axes.step([1e3 * p[2] for p in line], [p[3] for p in line], where="post", color="#999999", linewidth=0.9)
    axes.axhline(teacher, color=TEACHER, linewidth=0.9)
    extra = [
        Line2D([], [], color="#999999", linewidth=0.9, label="none better and faster"),
        Line2D([], [], color=TEACHER, linewidth=0.9, label="teacher's perplexity"),
    ]
    axes.set(xlabel=xlabel, ylabel="held-out perplexity", yscale="log")
    plain_log(axes.yaxis, [teacher, *(point[3] for point in points)])
    keys = [
        Line2D(
            [], [], color=colour(points[i][1]), marker=marker(points[i][1]), linestyle="", label=f"{n} {points[i][0]}"
        )
        for n, i in enumerate(front, 1)
    ]
    axes.legend(handles=keys, loc="best", handletextpad=0.2)
    mixer_legend(figure, ordered(point[1] for point in points), extra)
    return figure
