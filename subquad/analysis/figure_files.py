"""The pictures of an evaluation: a student's mixing matrices beside its teacher's attention, its decays, what it
recalls, and how alike hidden states are, layer by layer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.half_life import half_lives
from subquad.analysis.plots import decay_figure, layers_figure, matrices_figure, recall_figure, save
from subquad.analysis.recall_tasks import TASKS
from subquad.analysis.saved_matrices import chosen_matrices
from subquad.evaluate.results import Result, select


def draw_student(
    name: str, model: PreTrainedModel, teacher: PreTrainedModel | None, texts: Tensor, directory: Path
) -> list[Path]:
    """Matrices of one head in the first, a middle and the last layer, and the half-lives of all; SVG and PNG.

    texts: `[N, T]`; the matrices are those of the first one's beginning.
    """
    paths = []
    stem = name.replace("/", "-")
    if teacher is not None:
        beside = chosen_matrices(model, teacher, texts)
        paths += save(matrices_figure(beside, f"{name}: what each token attends to"), directory / f"{stem}-matrices")
    decays = half_lives(model, texts)
    if any(layer is not None for layer in decays):
        paths += save(decay_figure(decays, f"{name}: half-lives"), directory / f"{stem}-decays")
    return paths


def draw_rows(rows: Sequence[Result], directory: Path) -> list[Path]:
    """Of each model what it recalls, and of all of them the likeness of their hidden states with the teacher's."""
    paths = []
    names = list(dict.fromkeys(row.model for row in rows))
    for name in names:
        found = [row for row in select(rows, model=name) if row.task in TASKS]
        if found:
            figure = recall_figure(found, f"{name}: recall")
            paths += save(figure, directory / f"{name.replace('/', '-')}-recall")
    series = {name: select(rows, model=name, metric="cka") for name in names}
    series = {name: found for name, found in series.items() if any(row.layer is not None for row in found)}
    if series:
        figure = layers_figure(series, "cka", "Likeness of hidden states with the teacher's (linear CKA)")
        paths += save(figure, directory / "cka")
    return paths


@torch.no_grad()
def draw(
    models: Sequence[tuple[str, PreTrainedModel]],
    teacher: PreTrainedModel | None,
    texts: Tensor,
    rows: Sequence[Result],
    directory: Path,
) -> list[Path]:
    """All pictures of models, by name, and of their rows of results, into `directory`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [path for name, model in models for path in draw_student(name, model, teacher, texts, directory)]
    return paths + draw_rows(rows, directory)
