"""Figures of a study: recovered share, perplexity against decoding time, training loss, and evaluation results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from subquad.analysis import plot_style as style
from subquad.analysis.plots import heat_maps
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.recipe_stages import recipe_stages
from subquad.evaluate.results import Result, select
from subquad.study.aggregate import Group, group_labels
from subquad.study.runs import METRICS

STAGES = {
    "matrix": ("stage 1: mixing matrices", "squared distance per matrix row"),
    "hidden": ("stage 2: hidden states", "relative squared error"),
    "end_to_end": ("stage 3: end to end", "loss, nats per token"),
}
"""Title and loss of a stage."""
STAGE_MARKERS = "osD^vPX"
COSTS = {
    "seconds_per_token": ("Decoding time per token by context length", "milliseconds per decoded token", 1e3),
    "prefill_seconds": ("Time of a prefill by context length", "seconds per prefill", 1.0),
    "cache_bytes": ("Cache size by context length", "cache per sequence, MB", 1e-6),
    "peak_bytes": ("Peak memory of a prefill by context length", "peak memory of a prefill, MB", 1e-6),
}
"""Caption, axis label and unit of a metric."""
LONG_CONTEXT = {
    "perplexity": ("Perplexity of the first tokens of a document", "perplexity of the first tokens", 1.0),
    "perplexity_by_position": ("Perplexity by position in a document", "perplexity at the position", 1.0),
}
DIAGNOSTICS = {
    "topk_mass_overlap": "top-k mass overlap with the attention",
    "cka": "CKA with the teacher",
    "diversity": "diversity of heads",
    "memory_length": "memory length, tokens",
    "half_life": "half-life, tokens",
    "mixer_error": "error of the mixer output",
}
MAX_HEAT_MAPS = 18
"""Heat maps in one figure."""


@dataclass(frozen=True)
class NamedFigure:
    """A figure with the stem of its file names and its caption, which ends without a period."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class PlotModel:
    """An evaluated model: name, label, and the mixer that determines its color (None: not a student)."""

    name: str
    label: str
    mixer: str | None


# ---------------------------------------------------------------------- what runs measure


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
    axes.set(ylim=(len(mixers) - 0.5, -0.5), xlabel="recovered share, % (0: unigram model, 100: teacher)")
    axes.axvline(100, color=style.TEACHER_COLOR, linewidth=0.8)
    entries = [style.legend_line(f"stages {s}", marker=shapes.get(s, "o"), linestyle="") for s in combinations]
    if len({group.copy_qkv for group, _ in measured}) > 1:
        for label, fill in (("filled: q, k, v, o copied", style.GRAY), ("hollow: not copied", "white")):
            entries.append(style.legend_line(label, marker="o", markerfacecolor=fill, linestyle=""))
    style.add_legend(figure, (), entries)
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
    measured = []
    for group in groups:
        speed, perplexity = group.mean("decode_tokens_per_second"), group.mean("perplexity")
        if speed is not None and perplexity is not None:
            measured.append((group, (1e3 / speed.value, perplexity.value)))
    if not measured:
        return []
    labels, teacher = group_labels(groups), measured[0][0].results[0]["teacher_perplexity"]
    figure, axes = style.new_figure(6.0, 4.6)
    points = [point for _, point in measured]
    front = pareto_front(points)
    for index, (group, point) in enumerate(measured):
        look: dict[str, Any] = {**style.look(group.mixer), "linestyle": ""}
        axes.plot(*point, alpha=1 if index in front else 0.6, zorder=3, **look)
    times, perplexities = zip(*(points[i] for i in front), strict=True)
    axes.step(times, perplexities, where="post", color="#999999", linewidth=0.9)
    axes.axhline(teacher, color=style.TEACHER_COLOR, linewidth=0.9)
    axes.set(xlabel="milliseconds per decoded token, batch size 1", ylabel="validation perplexity", yscale="log")
    style.format_log_axis(axes.yaxis, [teacher, *(y for _, (_, y) in measured)])
    style.label_points(axes, points, {index: str(number) for number, index in enumerate(front, 1)})
    extra = [
        style.legend_line("Pareto front", color="#999999", linewidth=0.9),
        style.legend_line("teacher's perplexity", color=style.TEACHER_COLOR, linewidth=0.9),
    ]
    style.add_legend(figure, (group.mixer for group, _ in measured), extra)
    names = ", ".join(f"{number} {labels[measured[index][0].name]}" for number, index in enumerate(front, 1))
    caption = (
        f"Validation perplexity against decoding time, both measured at the end of each run. Pareto front: {names}"
    )
    return [NamedFigure("pareto", caption, figure)]


def loss_figures(groups: Sequence[Group]) -> list[NamedFigure]:
    """One figure for each stage of each stage combination: the training loss of every run against its tokens."""
    drawn = []
    for stages in stage_sets(groups):
        members = [group for group in groups if group.stages == stages]
        logs = [(group, read_jsonl(run.directory / METRICS)) for group in members for run in group.runs]
        for stage in recipe_stages(members[0].recipe):
            curves = []
            for group, log in logs:
                points = [(line["tokens"], line["loss"]) for line in log if line["stage"] == stage and "loss" in line]
                curves += [(group, points)] if points else []
            if curves:
                title, loss = STAGES.get(stage, (f"stage {stage}", "loss"))
                figure = _loss_figure(curves, f"stages {stages}, {title}", loss)
                caption = f"Training loss of every run with stages {stages} in {title}"
                drawn.append(NamedFigure(f"loss-{stages.replace('+', '')}-{stage}", caption, figure))
    return drawn


def _loss_figure(curves: Sequence[tuple[Group, Sequence[tuple[int, float]]]], title: str, ylabel: str) -> Figure:
    figure, axes = style.new_figure()
    both = len({group.copy_qkv for group, _ in curves}) > 1
    for group, points in curves:
        dash = "--" if both and not group.copy_qkv else "-"
        look = {**style.look(group.mixer), "markersize": 4, "linestyle": dash, "linewidth": 1.1}
        axes.plot(*zip(*points, strict=True), markevery=[-1], **look)
    axes.set(title=title, xlabel="tokens", ylabel=ylabel, yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    style.format_log_axis(axes.yaxis, [loss for _, points in curves for _, loss in points])
    extra = [style.legend_line("not copied", linestyle="--")] if both else []
    style.add_legend(figure, (group.mixer for group, _ in curves), extra)
    return figure


# ---------------------------------------------------------------------- what evaluations measure


def length_figures(
    results: Sequence[Result],
    models: Sequence[PlotModel],
    metrics: Mapping[str, tuple[str, str, float]],
    prefix: str = "",
) -> list[NamedFigure]:
    """Each of `metrics` (`COSTS`, `LONG_CONTEXT`) that was measured against context length."""
    drawn = []
    for metric, (title, ylabel, scale) in metrics.items():
        own = [replace(r, value=scale * r.value) for r in select(results, metric=metric) if r.batch in (None, 1)]
        caption = f"{title}. Best student of each mixer; models that are not students in black"
        drawn += line_figures(f"{prefix}{metric}", caption, own, models, "length", ylabel)
    return drawn


def recall_figures(results: Sequence[Result], models: Sequence[PlotModel]) -> list[NamedFigure]:
    """Recall accuracy by depth and context length, one figure for each task and one heat map for each model."""
    drawn = []
    cells = [r for r in select(results, metric="acc") if r.length is not None and r.depth is not None]
    labels = ("depth of the answer in the context", "tokens of context", "accuracy")
    for task in dict.fromkeys(r.task for r in cells):
        caption = f"Accuracy in the recall task {task}. Best student of each mixer, one seed"
        own = select(cells, task=task)
        drawn += model_maps(f"recall-{file_name(task)}", caption, own, models, ("depth", "length"), labels, (0.0, 1.0))
    return drawn


def diagnostic_figures(
    results: Sequence[Result], models: Sequence[PlotModel], one_seed_models: Sequence[PlotModel]
) -> list[NamedFigure]:
    """Each diagnostic by layer, for `models`, and by layer and head, a heat map for each of `one_seed_models`."""
    lines, maps = [], []
    for metric, label in DIAGNOSTICS.items():
        title = label[0].upper() + label[1:]
        own = [r for r in select(results, metric=metric) if r.layer is not None]
        cells = [r for r in own if r.head is not None]
        mean = ", mean over heads" if cells else ""
        caption = f"{title}: by layer{mean}. Best student of each mixer"
        lines += line_figures(f"{metric}-layers", caption, own, models, "layer", label)
        caption = f"{title}: by layer and head. Best student of each mixer, one seed"
        labels = "layer", "head", label
        maps += model_maps(f"{metric}-heads", caption, cells, one_seed_models, ("layer", "head"), labels)
    return lines + maps


def line_figures(
    name: str, caption: str, results: Sequence[Result], models: Sequence[PlotModel], field: str, ylabel: str
) -> list[NamedFigure]:
    """Results by `field`, layer or length, a line for each model; no figure if none was measured. Models that are not
    students are black with different dashes."""
    lines = [(m, points) for m in models if (points := style.points_by(field, select(results, model=m.name)))]
    if not lines:
        return []
    figure, axes = style.new_figure(width=4.6)
    extra: list[Line2D] = []
    for model, points in lines:
        if model.mixer is None:
            dash = ("-", "--", ":", "-.")[min(len(extra), 3)]
            look: dict[str, Any] = {"color": style.TEACHER_COLOR, "marker": ".", "linestyle": dash, "zorder": 3}
            extra.append(style.legend_line(model.label, **look))
        else:
            look = {**style.look(model.mixer), "markersize": 4, "alpha": 0.85}
        axes.plot(*zip(*points, strict=True), **look)
    axes.set(xlabel=field, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if field == "length":
        x, y = zip(*(point for _, points in lines for point in points), strict=True)
        axes.set(xlabel="tokens of context", xscale="log", yscale="log")
        style.format_log_axis(axes.xaxis, x, sorted(set(x)))
        style.format_log_axis(axes.yaxis, y)
    style.add_legend(figure, (model.mixer for model, _ in lines if model.mixer is not None), extra)
    return [NamedFigure(name, caption, figure)]


def model_maps(
    name: str,
    caption: str,
    results: Sequence[Result],
    models: Sequence[PlotModel],
    fields: tuple[str, str],
    labels: tuple[str, str, str],
    limits: tuple[float, float] | None = None,
) -> list[NamedFigure]:
    """`heat_maps` with one for each model, at most `MAX_HEAT_MAPS`; no figure if none was measured."""
    panels = [(model.label, own) for model in models if (own := select(results, model=model.name))][:MAX_HEAT_MAPS]
    if not panels:
        return []
    return [NamedFigure(name, caption, heat_maps(dict(panels), fields, labels, limits, shared=True))]


def file_name(text: str) -> str:
    """`text` with `-` for each character that is not a letter or digit."""
    return "".join(c if c.isalnum() else "-" for c in text)
