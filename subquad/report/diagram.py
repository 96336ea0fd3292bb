"""The student as a picture, drawn from its recipe and its plan: a teacher's layer, the student's beside it, what each
stage compares, and which mixer each layer has."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from subquad.config import Recipe
from subquad.report.style import colour
from subquad.study.runs import Run, read_json

PLAIN, KEPT = "#EEF1F4", "#777777"
LEFT, RIGHT, WIDE, HIGH = 0.3, 5.5, 2.9, 0.62


def layers_of(run: Run) -> list[str]:
    """The mixer of each layer of a finished run, from its saved configuration."""
    config = read_json(run.directory / "config.json") or {}
    return [entry["mixer"] for entry in config.get("layer_specs", [])]


def student_figure(recipe: Recipe, layers: Sequence[str]) -> Figure:
    """`layers`: the mixer of each layer; `attention` where the teacher's is kept."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 8.7), ylim=(-1.5, 6.2))
    axes.set_axis_off()
    name = recipe.student.name.replace("_", " ")
    mixer = next((m for m in layers if m != "attention"), recipe.student.name)
    _column(axes, LEFT, "teacher, frozen", "softmax attention", PLAIN, "#222222")
    _column(axes, RIGHT, "student", name, colour(mixer), "white")
    _between(axes, recipe.stages)
    copied = "copied" if recipe.student.copy_qkv else "not copied"
    axes.text(4.35, 2.12, f"q, k, v, o {copied}", ha="center", va="center", fontsize=7.5, style="italic")
    _strip(axes, layers or [recipe.student.name])
    return figure


def _column(axes: Axes, x: float, title: str, mixer: str, paint: str, ink: str) -> None:
    parts = [
        ("embeddings", 0.1, PLAIN, "#222222"),
        ("norm", 1.15, PLAIN, "#222222"),
        (mixer, 2.05, paint, ink),
        ("norm, MLP", 3.25, PLAIN, "#222222"),
        ("norm, head", 4.5, PLAIN, "#222222"),
    ]
    axes.add_patch(
        Rectangle((x - 0.2, 0.95), WIDE + 0.4, 3.15, fill=False, edgecolor="#999999", linestyle="--", linewidth=0.8)
    )
    for (text, y, fill, color), above in zip(parts, [*parts[1:], None], strict=True):
        box = FancyBboxPatch((x, y), WIDE, HIGH, boxstyle="round,pad=0.02,rounding_size=0.08", facecolor=fill)
        box.set(edgecolor="#555555", linewidth=0.8)
        axes.add_patch(box)
        axes.text(x + WIDE / 2, y + HIGH / 2, text, ha="center", va="center", color=color, fontsize=9)
        if above is not None:
            _arrow(axes, (x + WIDE / 2, y + HIGH), (x + WIDE / 2, above[1]), "-|>")
    axes.text(x + WIDE / 2, 5.75, title, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(x + WIDE + 0.15, 4.22, "x layers", ha="right", va="bottom", fontsize=7, color="#555555")


def _between(axes: Axes, stages: Any) -> None:
    """What each stage compares; pale where it is skipped."""
    known = [
        (stages.matrix, 2.5, "1  mixing matrix"),
        (stages.hidden, 2.86, "2  output"),
        (stages.end_to_end, 4.81, "3  next tokens"),
    ]
    for stage, y, text in known:
        paint = "#222222" if stage is not None else "#BBBBBB"
        _arrow(axes, (LEFT + WIDE + 0.02, y), (RIGHT - 0.02, y), "<|-|>", paint)
        said = text if stage is not None else f"{text}: skipped"
        axes.text(4.35, y + 0.06, said, ha="center", va="bottom", fontsize=7.5, color=paint)


def _arrow(axes: Axes, start: tuple, end: tuple, style: str, paint: str = "#555555") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=8, color=paint, linewidth=0.9))


def _strip(axes: Axes, layers: Sequence[str]) -> None:
    """A cell a layer."""
    width = 8.1 / len(layers)
    for index, mixer in enumerate(layers):
        paint = KEPT if mixer == "attention" else colour(mixer)
        axes.add_patch(Rectangle((LEFT + index * width, -0.85), width * 0.92, 0.42, facecolor=paint))
    axes.text(LEFT, -0.32, f"{len(layers)} layers, the first to the left", fontsize=7.5, va="bottom")
    kinds = list(dict.fromkeys(layers))
    told = ", ".join(f"{kind.replace('_', ' ')} in {layers.count(kind)}" for kind in kinds)
    axes.text(LEFT, -1.0, told, fontsize=7.5, va="top", color="#333333")
