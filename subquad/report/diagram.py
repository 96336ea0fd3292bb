"""A diagram of a student: a layer of the teacher and of the student, what each stage compares, and all layers."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from subquad.analysis.plot_style import GRAY, color, mixer_label, new_figure
from subquad.config import Recipe

PLAIN_FILL, ATTENTION_FILL, INK = "#EEF1F4", "#777777", "#222222"
TEACHER_X, STUDENT_X, MIDDLE_X, BOX_WIDTH, BOX_HEIGHT = 0.3, 5.5, 4.35, 2.9, 0.62


def draw_student(recipe: Recipe, layers: Sequence[str]) -> Figure:
    """The student of `recipe`. layers: the mixer of each layer; `attention` where it was kept."""
    figure, axes = new_figure(6.4, 5.2)
    axes.set(xlim=(0, 8.7), ylim=(-1.5, 6.2))
    axes.set_axis_off()
    name, layers = recipe.student.name, layers or [recipe.student.name]
    mixer = next((m for m in layers if m != "attention"), name)
    _draw_model(axes, TEACHER_X, "teacher (frozen)", "softmax attention", PLAIN_FILL, INK)
    _draw_model(axes, STUDENT_X, "student", mixer_label(name), color(mixer), "white")
    # between what each stage compares; pale if the stage is skipped
    for stage, y, label in (
        (recipe.stages.matrix, 2.5, "stage 1: mixing matrix"),
        (recipe.stages.hidden, 2.86, "stage 2: output"),
        (recipe.stages.end_to_end, 4.81, "stage 3: logits"),
    ):
        ink, text = (INK, label) if stage is not None else ("#BBBBBB", f"{label} (skipped)")
        _draw_arrow(axes, (TEACHER_X + BOX_WIDTH + 0.02, y), (STUDENT_X - 0.02, y), "<|-|>", ink)
        axes.text(MIDDLE_X, y + 0.06, text, ha="center", va="bottom", fontsize=7.5, color=ink)
    copied = "copied" if recipe.student.copy_qkv else "not copied"
    axes.text(MIDDLE_X, 2.12, f"q, k, v, o {copied}", ha="center", va="center", fontsize=7.5, style="italic")
    width = 8.1 / len(layers)
    for index, layer in enumerate(layers):
        fill = ATTENTION_FILL if layer == "attention" else color(layer)
        axes.add_patch(Rectangle((TEACHER_X + index * width, -0.85), width * 0.92, 0.42, facecolor=fill))
    title = f"mixers of the {len(layers)} layers, first layer on the left"
    axes.text(TEACHER_X, -0.32, title, fontsize=7.5, va="bottom")
    counts = ", ".join(f"{mixer_label(layer)} × {layers.count(layer)}" for layer in dict.fromkeys(layers))
    axes.text(TEACHER_X, -1.0, counts, fontsize=7.5, va="top", color="#333333")
    return figure


def _draw_model(axes: Axes, x: float, title: str, mixer: str, mixer_fill: str, mixer_ink: str) -> None:
    frame = Rectangle((x - 0.2, 0.95), BOX_WIDTH + 0.4, 3.15, fill=False)
    frame.set(edgecolor="#999999", linestyle="--", linewidth=0.8)
    axes.add_patch(frame)
    center, top = x + BOX_WIDTH / 2, None
    for text, y, fill, ink in (
        ("embeddings", 0.1, PLAIN_FILL, INK),
        ("norm", 1.15, PLAIN_FILL, INK),
        (mixer, 2.05, mixer_fill, mixer_ink),
        ("norm, MLP", 3.25, PLAIN_FILL, INK),
        ("norm, LM head", 4.5, PLAIN_FILL, INK),
    ):
        box = FancyBboxPatch((x, y), BOX_WIDTH, BOX_HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.08")
        box.set(facecolor=fill, edgecolor=GRAY, linewidth=0.8)
        axes.add_patch(box)
        axes.text(center, y + BOX_HEIGHT / 2, text, ha="center", va="center", color=ink, fontsize=9)
        if top is not None:
            _draw_arrow(axes, (center, top), (center, y), "-|>")
        top = y + BOX_HEIGHT
    axes.text(center, 5.75, title, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(x + BOX_WIDTH + 0.15, 4.22, "× number of layers", ha="right", va="bottom", fontsize=7, color=GRAY)


def _draw_arrow(axes: Axes, start: tuple, end: tuple, style: str, ink: str = GRAY) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=8, color=ink, linewidth=0.9))
