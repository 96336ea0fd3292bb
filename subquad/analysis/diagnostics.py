"""Diagnostics of a student: exact mixing matrices, half-lives, hidden states and layer errors, alone and against its
teacher.

Matrices are computed in chunks of rows, one layer and one text at a time, so that 4,096 tokens fit in memory.
docs/analysis.md defines the metrics.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.half_life import half_lives
from subquad.analysis.hidden_states import hidden_state_results
from subquad.analysis.layer_access import LayerAccess, layer_access_pair
from subquad.analysis.layer_errors import layer_error_results
from subquad.analysis.mixing_matrices import (
    MatrixComparison,
    MatrixPairs,
    MatrixStats,
    distance_bins,
    normalized_abs_rows,
)
from subquad.evaluate.results import Result
from subquad.modeling.attention.activations import LayerActivations
from subquad.utils import UserError, eval_mode

CHUNK_ENTRIES = 2**22
"""Entries of a chunk of matrix rows over all heads: 34 MB in float64, of which a few exist at a time."""
SAMPLE_TOKENS = 96
"""Size of sample matrices; entries of larger ones are too small to be seen."""


def diagnostics_results(
    model: PreTrainedModel,
    rows: Tensor,
    teacher: PreTrainedModel | None = None,
    top: int = 8,
    row_chunk_size: int | None = None,
) -> list[Result]:
    """All diagnostics of a student or transformer on texts `rows: [N, T]` of token ids without padding.

    With a teacher also those that compare both. top, row_chunk_size: see `comparison_results`.

    Raises:
        UserError: attention that cannot be discovered; layers that do not correspond; texts that are too short.
    """
    results = matrix_results(model, rows, row_chunk_size) + half_life_results(model, rows)
    if teacher is not None:
        results += comparison_results(model, teacher, rows, top, row_chunk_size)
        results += hidden_state_results(model, teacher, rows) + layer_error_results(model, teacher, rows)
    return results


@torch.no_grad()
def matrix_results(model: PreTrainedModel, rows: Tensor, row_chunk_size: int | None = None) -> list[Result]:
    """`entropy` (nats), `memory_length` (tokens) and `mass_0`, `mass_1`, `mass_2_3` ... (by distance) of each head, and
    `diversity` of each layer. Results without head are means over heads, those without layer means over all."""
    access = LayerAccess(model)
    T = rows.shape[1]
    heads = [layer.spec.num_heads for layer in access.mixer_layers]
    stats = [MatrixStats(H, T, model.device) for H in heads]
    with eval_mode(model):
        for ids in rows.split(1):
            for index, recorded in enumerate(access.record(access.mixing_modules, ids)):
                for first, M in row_chunks(matrix_rows(access, index, recorded), heads[index], T, row_chunk_size):
                    stats[index].add(M, first)
    results = results_by_head("entropy", [s.entropy() for s in stats], T, rows.numel())
    results += results_by_head("memory_length", [s.memory_length() for s in stats], T, rows.numel())
    masses = [s.mass() for s in stats]
    for low, high in distance_bins(T):
        name = f"mass_{low}" if low == high else f"mass_{low}_{high}"
        results += results_by_head(name, [mass[:, low : high + 1].sum(-1) for mass in masses], T, rows.numel())
    diversity = [(index, value) for index, s in enumerate(stats) if (value := s.diversity()) is not None]
    if diversity:
        make = partial(Result, task="matrices", metric="diversity", length=T, n=rows.numel())
        results.append(make(value=sum(value for _, value in diversity) / len(diversity)))
        results += [make(value=value, layer=index) for index, value in diversity]
    return results


def half_life_results(model: PreTrainedModel, rows: Tensor) -> list[Result]:
    """`half_life` (tokens): the median over the channels of each head; without head the median over a layer's heads;
    without layer over all heads. Empty without decays."""
    layers = [(i, h.view(len(h), -1).median(-1).values) for i, h in enumerate(half_lives(model, rows)) if h is not None]
    make = partial(Result, task="decays", metric="half_life", n=rows.numel())
    if not layers:
        return []
    results = [make(value=torch.cat([values for _, values in layers]).median().item())]
    for index, values in layers:
        results.append(make(value=values.median().item(), layer=index))
        results += [make(value=value, layer=index, head=h) for h, value in enumerate(values.tolist())]
    return results


@torch.no_grad()
def comparison_results(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Tensor,
    top: int = 8,
    row_chunk_size: int | None = None,
) -> list[Result]:
    """`topk_mass_overlap`, `topk_mass_overlap_chance`, `frobenius` and `row_cosine` (see `MatrixComparison`) between
    the student's mixing matrix and the teacher's attention, both on the teacher's input to the layer.

    Args:
        top: k of the top-k overlap.
        row_chunk_size: rows of a matrix in memory at a time; default: about `CHUNK_ENTRIES` entries.

    Raises:
        UserError: layers or heads that do not correspond; texts of at most `top` tokens.
    """
    T = rows.shape[1]
    if not 0 < top < T:
        raise UserError(f"top: got {top} for texts of {T} tokens, expected 1 to {T - 1}")
    student_layers, teacher_layers = layer_access_pair(student, teacher)
    heads = [layer.spec.num_heads for layer in student_layers.mixer_layers]
    layers = [MatrixComparison(H, top, student.device) for H in heads]
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.split(1):
            for index, recorded in enumerate(teacher_layers.record(teacher_layers.mixing_modules, ids)):
                A = matrix_rows(teacher_layers, index, recorded)
                student_rows = matrix_rows(student_layers, index, recorded)
                for first, M in row_chunks(student_rows, heads[index], T, row_chunk_size):
                    layers[index].add(M, A(slice(first, first + M.shape[1])), first)
    n = rows.numel()
    results = results_by_head("topk_mass_overlap", [c.topk_mass_overlap() for c in layers], T, n)
    chance = layers[0].chance_overlap()
    results.append(Result(task="matrices", metric="topk_mass_overlap_chance", value=chance, n=n, length=T))
    results += results_by_head("frobenius", [c.frobenius() for c in layers], T, n)
    return results + results_by_head("row_cosine", [c.row_cosine() for c in layers], T, n)


def matrix_rows(access: LayerAccess, index: int, recorded: LayerActivations) -> Callable[[slice], Tensor]:
    """A function that computes a slice of rows, `[H, rows, T]`, of the mixing matrix of layer `index` on the recorded
    inputs of one text."""
    rows_of = access.mixer_layers[index].matrix_rows(*recorded.args, **recorded.kwargs)
    return lambda rows: rows_of(rows)[0]


def row_chunks(
    matrix: Callable[[slice], Tensor], heads: int, T: int, row_chunk_size: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """All rows of a matrix in chunks `[H, rows, T]`, each with the index of its first row."""
    size = row_chunk_size or max(16, CHUNK_ENTRIES // (heads * T))
    for first in range(0, T, size):
        yield first, matrix(slice(first, min(first + size, T)))


@torch.no_grad()
def matrix_pair(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The student's mixing matrix and the teacher's attention in one layer, `[H, T, T]` each, on the teacher's input.

    ids: `[T]`. layer: negative layers count from the last.
    """
    pair = layer_access_pair(student, teacher)
    teacher_layers = pair[1]
    if not -len(teacher_layers) <= layer < len(teacher_layers):
        raise UserError(f"layer: got {layer}, expected {-len(teacher_layers)} to {len(teacher_layers) - 1}")
    with eval_mode(student), eval_mode(teacher):
        recorded = teacher_layers.record([teacher_layers.mixing_modules[layer]], ids.view(1, -1))[0]
        return tuple(matrix_rows(access, layer, recorded)(slice(None)) for access in pair)  # type: ignore[return-value]


def sample_matrix_pairs(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> MatrixPairs:
    """Matrices to look at: the first head of the first, a middle and the last layer on the first `SAMPLE_TOKENS` tokens
    of `rows: [N, T]`. The choice is the same for all students of a teacher."""
    last = len(LayerAccess(student)) - 1
    pairs = {}
    for layer in sorted({0, last // 2, last}):
        M, A = matrix_pair(student, teacher, rows[0, :SAMPLE_TOKENS], layer)
        pairs[layer, 0] = normalized_abs_rows(M[0]).cpu(), normalized_abs_rows(A[0]).cpu()
    return pairs


def results_by_head(metric: str, values: Sequence[Tensor], length: int, n: int) -> list[Result]:
    """Results from `[H]` per layer: the mean over all (no layer, no head), then each layer's mean and its heads."""
    make = partial(Result, task="matrices", metric=metric, length=length, n=n)
    results = [make(value=torch.stack([v.double().mean() for v in values]).mean().item())]
    for index, layer in enumerate(values):
        results.append(make(value=layer.double().mean().item(), layer=index))
        results += [make(value=value, layer=index, head=h) for h, value in enumerate(layer.tolist())]
    return results
