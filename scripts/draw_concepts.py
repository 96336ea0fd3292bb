"""Draws the figures of docs/concepts.md to docs/figures.

python scripts/draw_concepts.py
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

import subquad
from subquad.analysis.diagnostics import sample_matrix_pairs
from subquad.analysis.plot_style import RC_PARAMS, color, mixer_label, new_figure, save_figure
from subquad.config import Recipe
from subquad.data.corpora import documents
from subquad.report.diagram import draw_student

TARGET = Path(__file__).parents[1] / "docs" / "figures"
TOKENS, LAYER = 48, 2
MIXERS = ("retnet", "gla", "gated_deltanet")
NEAR, FAR, SINK = "#4477AA", "#CCBB44", "#228833"


def box(axes, x: float, y: float, text: str, fill: str = "#EEF1F4", width: float = 1.5) -> None:
    patch = FancyBboxPatch((x, y), width, 0.7, boxstyle="round,pad=0.02,rounding_size=0.08")
    axes.add_patch(patch)
    patch.set(facecolor=fill, edgecolor="#777777", linewidth=0.8)
    axes.text(x + width / 2, y + 0.35, text, ha="center", va="center", fontsize=9)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="#222222", linewidth=0.9))
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.08, label, ha="center", va="bottom", fontsize=8)


def draw_recurrence() -> Figure:
    figure, axes = new_figure(6.4, 2.9)
    axes.set(xlim=(-0.4, 10.4), ylim=(-0.2, 4.2))
    axes.set_axis_off()
    for index, t in enumerate(("t - 1", "t", "t + 1")):
        x = 1.4 + 3 * index
        box(axes, x, 1.7, f"S, K × V\n(token {t})", color("gated_deltanet") + "55")
        box(axes, x, 0.1, "k, v, g, β")
        box(axes, x, 3.3, "o = S$^T$q / √K")
        arrow(axes, (x + 0.75, 0.84), (x + 0.75, 1.66))
        axes.text(x + 0.85, 1.25, "write", fontsize=8, va="center")
        arrow(axes, (x + 0.75, 2.44), (x + 0.75, 3.26))
        axes.text(x + 0.85, 2.85, "read", fontsize=8, va="center")
        arrow(axes, (x - 1.45, 2.05), (x - 0.04, 2.05), "decay" if index else "")
    arrow(axes, (8.94, 2.05), (10.2, 2.05))
    return figure


@torch.no_grad()
def draw_matrices() -> Figure:
    teacher, tokenizer = subquad.load_teacher("nano")
    text = next(iter(documents("python-stdlib", "validation")))
    ids = torch.tensor([tokenizer(text[:2000])["input_ids"][:TOKENS]])
    training = next(iter(documents("python-stdlib", "train")))
    rows = torch.tensor(tokenizer(training[:6000])["input_ids"][: 2 * 256]).view(2, 256)
    figure = Figure(figsize=(6.6, 2.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(MIXERS))
    matrices = {}
    for mixer in MIXERS:
        student = subquad.linearize(teacher, mixer, calibration_ids=rows)
        of_student, of_teacher = sample_matrix_pairs(student, teacher, ids)[LAYER, 0]
        matrices |= {"softmax attention": of_teacher, mixer_label(mixer): of_student}
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        size = matrix.abs()
        ax.imshow(size / size.amax(-1, keepdim=True).clamp_min(1e-9), cmap="Blues", vmin=0, vmax=1)
        ax.set_title(title, fontsize=8)
        ax.set(xticks=[], yticks=[])
    axes[0].set_ylabel("query", fontsize=8)
    for ax in axes:
        ax.set_xlabel("key", fontsize=8)
    return figure


def draw_near_far(window: int = 6, sinks: int = 2, tokens: int = 20) -> Figure:
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    part = torch.where(i - j < window, 3, torch.where(j < sinks, 1, 2)).masked_fill(j > i, 0)
    figure, axes = new_figure(3.6, 3.6)
    axes.imshow(part, cmap=ListedColormap(["white", SINK, FAR, NEAR]))
    axes.set(xlabel="key, token j", ylabel="query, token i")
    names = {"first tokens (sinks)": SINK, "memory": FAR, "window": NEAR}
    handles = [Patch(facecolor=fill, label=name) for name, fill in names.items()]
    axes.legend(handles=handles, loc="upper right", fontsize=8)
    return figure


def draw_stages() -> Figure:
    stage = {"tokens": 1000, "lr": 1e-3}
    recipe = Recipe.model_validate(
        {
            "teacher": "nano",
            "data": {"source": "python-stdlib"},
            "student": {"mixer": "gated_deltanet"},
            "stages": {"matrix": stage, "hidden": stage, "end_to_end": stage},
        }
    )
    return draw_student(recipe, ["gated_deltanet"] * 6)


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    with matplotlib.rc_context(RC_PARAMS):
        for name, draw in {
            "recurrence": draw_recurrence,
            "mixing_matrices": draw_matrices,
            "stages": draw_stages,
            "near_far": draw_near_far,
        }.items():
            save_figure(draw(), TARGET / name, "svg")


if __name__ == "__main__":
    main()
