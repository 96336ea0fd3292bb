"""Plots of what runs measure themselves: recovered share, perplexity against decoding time, and training loss."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from subquad.analysis import plot_style as style
from subquad.analysis.plot_style import NamedFigure
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.recipe_stages import recipe_stages
from subquad.study.aggregate import Group, group_labels
from subquad.study.runs import METRICS

STAGE_TITLES = {
    "matrix": "stage 1: mixing matrices",
    "hidden": "stage 2: hidden states",
    "end_to_end": "stage 3: end to end",
}
STAGE_LOSSES = {
    "matrix": "squared distance per matrix row",
    "hidden": "relative squared error",
    "end_to_end": "loss, nats per token",
}
STAGE_MARKERS = "osD^vPX"


def stage_sets(groups: Sequence[Group]) -> list[str]:
    """The distinct stage combinations (`1+2+3`), those with the most stages first."""
    return sorted({group.stages for group in groups}, key=lambda text: (-len(text), text))


def recovered_figure(groups: Sequence[Group]) -> list[NamedFigure]:
    """The recovered share by mixer: one marker shape for each stage combination, hollow without copied projections."""
    measured = [(group, mean) for group in groups if (mean := group.mean("recovered_share")) is not None]
    if not measured:
        return []
    mixers, combinations = style.sort_mixers(group.mixer for group, _ in measured), stage_sets(groups)
    figure, axes = style.new_figure(6.0, 0.9 + 0.46 * len(mixers) + 0.3 * (len(combinations) > 3))
    shapes = dict(zip(combinations, STAGE_MARKERS, strict=False))
    for group, mean in measured:
        offset = 0.18 * (combinations.index(group.stages) - (len(combinations) - 1) / 2)
        y, color = mixers.index(group.mixer) + offset, style.color(group.mixer)
        if mean.low is not None:
            axes.plot([100 * mean.low, 100 * (mean.high or 0)], [y, y], color=color, linewidth=1)
        fill = color if group.copy_qkv else "white"
        axes.plot(100 * mean.value, y, shapes.get(group.stages, "o"), color=color, markerfacecolor=fill)
    axes.set_yticks(range(len(mixers)), [style.mixer_label(name) for name in mixers])
    axes.set_ylim(len(mixers) - 0.5, -0.5)
    axes.set_xlabel("recovered share, % (0: unigram model, 100: teacher)")
    axes.axvline(100, color=style.TEACHER_COLOR, linewidth=0.8)
    entries = [style.legend_line(f"stages {s}", marker=shapes.get(s, "o"), linestyle="") for s in combinations]
    if len({group.copy_qkv for group, _ in measured}) > 1:
        for label, fill in (("filled: q, k, v, o copied", style.GRAY), ("hollow: not copied", "white")):
            entries.append(style.legend_line(label, marker="o", markerfacecolor=fill, linestyle=""))
    figure.legend(handles=entries, loc="outside lower center", ncols=3)
    caption = "Recovered share by mixer, stages and copying. Lines are 95% intervals over seeds"
    return [NamedFigure("recovered", caption, figure)]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, error) that no other point beats in both, by increasing cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def pareto_figure(groups: Sequence[Group]) -> list[NamedFigure]:
    """Validation perplexity against decoding time per token, with the Pareto front of the groups."""
    labels, points = group_labels(groups), []
    for group in groups:
        speed, perplexity = group.mean("decode_tokens_per_second"), group.mean("perplexity")
        if speed is not None and perplexity is not None:
            points.append((labels[group.name], group.mixer, 1e3 / speed.value, perplexity.value))
    if not points:
        return []
    teacher = next(group.results for group in groups if group.results)[0]["teacher_perplexity"]
    figure, axes = style.new_figure(6.0, 4.6)
    front = pareto_front([point[2:] for point in points])
    for index, (_, mixer, x, y) in enumerate(points):
        axes.plot(x, y, style.marker(mixer), color=style.color(mixer), alpha=1 if index in front else 0.6)
        if index in front:
            number = f"{front.index(index) + 1}"
            axes.annotate(number, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    steps = [points[i] for i in front]
    axes.step([p[2] for p in steps], [p[3] for p in steps], where="post", color="#999999", linewidth=0.9)
    axes.axhline(teacher, color=style.TEACHER_COLOR, linewidth=0.9)
    axes.set(xlabel="milliseconds per decoded token, batch size 1", ylabel="validation perplexity", yscale="log")
    style.format_log_axis(axes.yaxis, [teacher, *(point[3] for point in points)])
    entries = [
        style.legend_line(f"{number} {label}", color=style.color(mixer), marker=style.marker(mixer), linestyle="")
        for number, (label, mixer, _, _) in enumerate(steps, 1)
    ]
    axes.legend(handles=entries, loc="best", handletextpad=0.2)
    extra = [
        style.legend_line("Pareto front", color="#999999", linewidth=0.9),
        style.legend_line("teacher's perplexity", color=style.TEACHER_COLOR, linewidth=0.9),
    ]
    style.add_mixer_legend(figure, style.sort_mixers(point[1] for point in points), extra)
    caption = (
        "Validation perplexity against decoding time, both measured at the end of each run. Numbered: Pareto front"
    )
    return [NamedFigure("pareto", caption, figure)]


def loss_figures(groups: Sequence[Group]) -> list[NamedFigure]:
    """One figure for each stage of each stage combination: the training loss of every run against its tokens."""
    drawn = []
    for stages in stage_sets(groups):
        members = [group for group in groups if group.stages == stages]
        lines = {run.name: read_jsonl(run.directory / METRICS) for group in members for run in group.runs}
        for stage in recipe_stages(members[0].recipe):
            curves = {
                name: [(line["tokens"], line["loss"]) for line in own if line["stage"] == stage and "loss" in line]
                for name, own in lines.items()
            }
            if any(curves.values()):
                title = STAGE_TITLES.get(stage, f"stage {stage}")
                loss = STAGE_LOSSES.get(stage, "loss")
                figure = _loss_figure(members, curves, f"stages {stages}, {title}", loss)
                caption = f"Training loss of every run with stages {stages} in {title}"
                drawn.append(NamedFigure(f"loss-{stages.replace('+', '')}-{stage}", caption, figure))
    return drawn


def _loss_figure(
    groups: Sequence[Group], curves: dict[str, list[tuple[int, float]]], title: str, ylabel: str
) -> Figure:
    figure, axes = style.new_figure()
    both = len({group.copy_qkv for group in groups}) > 1
    drawn = set()
    for group in groups:
        for run in group.runs:
            if curves[run.name]:
                dash = "--" if both and not group.copy_qkv else "-"
                x, y = zip(*curves[run.name], strict=True)
                axes.plot(x, y, color=style.color(group.mixer), linestyle=dash, linewidth=1.1)
                axes.plot(x[-1], y[-1], style.marker(group.mixer), color=style.color(group.mixer), markersize=4)
                drawn.add(group.mixer)
    axes.set(title=title, xlabel="tokens", ylabel=ylabel)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    style.format_log_axis(axes.yaxis, [loss for points in curves.values() for _, loss in points])
    extra = [style.legend_line("not copied", linestyle="--")] if both else []
    style.add_mixer_legend(figure, style.sort_mixers(drawn), extra)
    return figure
