"""A diagram of a student: a layer of the teacher and of the student, what each stage compares, and all layers."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from subquad.analysis.plot_style import GRAY, NamedFigure, color, mixer_label
from subquad.config import Recipe, Stages
from subquad.study.runs import Run, read_json

PLAIN_FILL, ATTENTION_FILL, INK = "#EEF1F4", "#777777", "#222222"
TEACHER_X, STUDENT_X, MIDDLE_X, BOX_WIDTH, BOX_HEIGHT = 0.3, 5.5, 4.35, 2.9, 0.62


def layer_mixers(run: Run) -> list[str]:
    """The mixer of each layer of a finished run, from its saved configuration; `attention` where it was kept."""
    config = read_json(run.directory / "config.json") or {}
    return [spec["mixer"] for spec in config.get("layer_specs", [])]


def student_figure(run: Run) -> list[NamedFigure]:
    """The diagram of a finished run."""
    figure = draw_student(run.recipe, layer_mixers(run))
    caption = "The best student: one layer of the teacher and of the student, and what each stage compares"
    return [NamedFigure("student", caption, figure)]


def draw_student(recipe: Recipe, layers: Sequence[str]) -> Figure:
    """layers: the mixer of each layer."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 8.7), ylim=(-1.5, 6.2))
    axes.set_axis_off()
    mixer = next((m for m in layers if m != "attention"), recipe.student.name)
    _draw_model(axes, TEACHER_X, "teacher (frozen)", "softmax attention", PLAIN_FILL, INK)
    _draw_model(axes, STUDENT_X, "student", mixer_label(recipe.student.name), color(mixer), "white")
    _draw_stages(axes, recipe.stages)
    copied = "copied" if recipe.student.copy_qkv else "not copied"
    axes.text(MIDDLE_X, 2.12, f"q, k, v, o {copied}", ha="center", va="center", fontsize=7.5, style="italic")
    _draw_layer_strip(axes, layers or [recipe.student.name])
    return figure


def _draw_model(axes: Axes, x: float, title: str, mixer: str, mixer_fill: str, mixer_ink: str) -> None:
    boxes = [
        ("embeddings", 0.1, PLAIN_FILL, INK),
        ("norm", 1.15, PLAIN_FILL, INK),
        (mixer, 2.05, mixer_fill, mixer_ink),
        ("norm, MLP", 3.25, PLAIN_FILL, INK),
        ("norm, LM head", 4.5, PLAIN_FILL, INK),
    ]
    frame = Rectangle((x - 0.2, 0.95), BOX_WIDTH + 0.4, 3.15, fill=False)
    frame.set(edgecolor="#999999", linestyle="--", linewidth=0.8)
    axes.add_patch(frame)
    center = x + BOX_WIDTH / 2
    for (text, y, fill, ink), above in zip(boxes, [*boxes[1:], None], strict=True):
        style = "round,pad=0.02,rounding_size=0.08"
        box = FancyBboxPatch((x, y), BOX_WIDTH, BOX_HEIGHT, boxstyle=style, facecolor=fill)
        box.set(edgecolor=GRAY, linewidth=0.8)
        axes.add_patch(box)
        axes.text(center, y + BOX_HEIGHT / 2, text, ha="center", va="center", color=ink, fontsize=9)
        if above is not None:
            _draw_arrow(axes, (center, y + BOX_HEIGHT), (center, above[1]), "-|>")
    axes.text(center, 5.75, title, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(x + BOX_WIDTH + 0.15, 4.22, "× number of layers", ha="right", va="bottom", fontsize=7, color=GRAY)


def _draw_stages(axes: Axes, stages: Stages) -> None:
    """An arrow between what each stage compares; pale if the stage is skipped."""
    arrows = [
        (stages.matrix, 2.5, "stage 1: mixing matrix"),
        (stages.hidden, 2.86, "stage 2: output"),
        (stages.end_to_end, 4.81, "stage 3: logits"),
    ]
    for stage, y, label in arrows:
        ink = INK if stage is not None else "#BBBBBB"
        _draw_arrow(axes, (TEACHER_X + BOX_WIDTH + 0.02, y), (STUDENT_X - 0.02, y), "<|-|>", ink)
        text = label if stage is not None else f"{label} (skipped)"
        axes.text(MIDDLE_X, y + 0.06, text, ha="center", va="bottom", fontsize=7.5, color=ink)


def _draw_arrow(axes: Axes, start: tuple, end: tuple, style: str, ink: str = GRAY) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=8, color=ink, linewidth=0.9))


def _draw_layer_strip(axes: Axes, layers: Sequence[str]) -> None:
    """A row with one cell for each layer, colored by its mixer."""
    width = 8.1 / len(layers)
    for index, mixer in enumerate(layers):
        fill = ATTENTION_FILL if mixer == "attention" else color(mixer)
        axes.add_patch(Rectangle((TEACHER_X + index * width, -0.85), width * 0.92, 0.42, facecolor=fill))
    title = f"mixers of the {len(layers)} layers, first layer on the left"
    axes.text(TEACHER_X, -0.32, title, fontsize=7.5, va="bottom")
    counts = ", ".join(f"{mixer_label(mixer)} × {layers.count(mixer)}" for mixer in dict.fromkeys(layers))
    axes.text(TEACHER_X, -1.0, counts, fontsize=7.5, va="top", color="#333333")
