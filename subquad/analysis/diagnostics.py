"""Why a student keeps what it keeps: its mixing matrices, alone and beside its teacher's attention, exactly.

Matrices are made and read in blocks of rows, one layer of one text at a time, so that 4,096 tokens fit in memory. What
each number means stands in `matrices.py`, `states.py`, `decays.py` and `origins.py`, and in docs/explain.md.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.half_life import half_lives
from subquad.analysis.hidden_states import hidden_state_results
from subquad.analysis.layer_access import LayerAccess, stacks
from subquad.analysis.layer_errors import layer_error_results
from subquad.analysis.mixing_matrices import MatrixComparison, MatrixStats, distance_bins
from subquad.evaluate.results import Result
from subquad.modeling.attention.activations import LayerActivations
from subquad.utils import UserError, eval_mode

BLOCK_ENTRIES = 2**22
"""Entries of a block of matrix rows, over all heads: 34 MB in float64, of which a handful exist at a time."""


def diagnostics_results(
    model: PreTrainedModel, rows: Tensor, teacher: PreTrainedModel | None = None, top: int = 8, block: int | None = None
) -> list[Result]:
    """Everything that is known of a model's inside on texts `rows: [N, T]`, without padding.

    model: a student, or a plain transformer whose attention can be read.
    teacher: what it is compared with, where there is one.
    top, block: as in `comparison_rows`.

    Raises:
        UserError: attention that cannot be read; layers that do not correspond; texts that are too short.
    """
    found = matrix_results(model, rows, block) + half_life_results(model, rows)
    if teacher is not None:
        found += comparison_results(model, teacher, rows, top, block)
        found += hidden_state_results(model, teacher, rows) + layer_error_results(model, teacher, rows)
    return found


@torch.no_grad()
def matrix_results(model: PreTrainedModel, rows: Tensor, block: int | None = None) -> list[Result]:
    """Of each head of each layer of a model run by itself: `entropy` (nats), `memory_length` (tokens), `mass_0`,
    `mass_1`, `mass_2_3` ... (by distance); of each layer `diversity`. Means over heads and layers have none named."""
    stack = LayerAccess(model)
    T = rows.shape[1]
    profiles = [MatrixStats(b.spec.num_heads, T, model.device) for b in stack.mixer_layers]
    with eval_mode(model):
        for ids in rows.split(1):
            for index, recording in enumerate(stack.record(stack.mixing, ids)):
                for first, M in blocks(
                    matrix_of(stack, index, recording), stack.mixer_layers[index].spec.num_heads, T, block
                ):
                    profiles[index].add(M, first)
    found = by_head("entropy", [p.entropy() for p in profiles], T, rows.numel())
    found += by_head("memory_length", [p.memory_length() for p in profiles], T, rows.numel())
    masses = [p.mass() for p in profiles]
    for low, high in distance_bins(T):
        name = f"mass_{low}" if low == high else f"mass_{low}_{high}"
        found += by_head(name, [mass[:, low : high + 1].sum(-1) for mass in masses], T, rows.numel())
    apart = [(index, p.diversity()) for index, p in enumerate(profiles)]
    known = [(index, value) for index, value in apart if value is not None]
    if known:
        row = partial(Result, task="matrices", metric="diversity", length=T, n=rows.numel())
        found.append(row(value=sum(value for _, value in known) / len(known)))
        found += [row(value=value, layer=index) for index, value in known]
    return found


def half_life_results(model: PreTrainedModel, rows: Tensor) -> list[Result]:
    """`half_life` (tokens) of each head that has a decay: the median of its channels; without head, the median of a
    layer; without layer, of all."""
    spectrum = [
        (i, h.view(len(h), -1).median(-1).values) for i, h in enumerate(half_lives(model, rows)) if h is not None
    ]
    row = partial(Result, task="decays", metric="half_life", n=rows.numel())
    if not spectrum:
        return []
    found = [row(value=torch.cat([values for _, values in spectrum]).median().item())]
    for index, values in spectrum:
        found.append(row(value=values.median().item(), layer=index))
        found += [row(value=value, layer=index, head=h) for h, value in enumerate(values.tolist())]
    return found


@torch.no_grad()
def comparison_results(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor, top: int = 8, block: int | None = None
) -> list[Result]:
    """Of each head of each layer `overlap`, `overlap_chance`, `frobenius` and `row_cosine` (see `Comparison`) between
    the student's mixing matrix and the teacher's attention, both from the teacher's input to that layer.

    top: how many tokens of each row count as attended to most.
    block: rows of a matrix that exist at a time; by default what makes `BLOCK_ENTRIES`.

    Raises:
        UserError: layers or heads that do not correspond; texts of no more than `top` tokens.
    """
    T = rows.shape[1]
    if not 0 < top < T:
        raise UserError(f"top: got {top} for texts of {T} tokens, expected 1 to {T - 1}")
    ours, theirs = stacks(student, teacher)
    heads = [b.spec.num_heads for b in ours.mixer_layers]
    found = [MatrixComparison(H, top, student.device) for H in heads]
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.split(1):
            for index, recording in enumerate(theirs.record(theirs.mixing, ids)):
                A = matrix_of(theirs, index, recording)
                for first, M in blocks(matrix_of(ours, index, recording), heads[index], T, block):
                    found[index].add(M, A(slice(first, first + M.shape[1])), first)
    n = rows.numel()
    out = by_head("overlap", [c.topk_mass_overlap() for c in found], T, n)
    out.append(Result(task="matrices", metric="overlap_chance", value=found[0].chance(), n=n, length=T))
    out += by_head("frobenius", [c.frobenius() for c in found], T, n)
    return out + by_head("row_cosine", [c.row_cosine() for c in found], T, n)


def matrix_of(stack: LayerAccess, index: int, recording: LayerActivations) -> Callable[[slice], Tensor]:
    """Gives rows of the mixing matrix of layer `index` of one text, `[H, rows, T]`, on what a layer was given: its own,
    or that of the model that it is compared with."""
    rows_of = stack.mixer_layers[index].matrix_rows(*recording.args, **recording.kwargs)
    return lambda rows: rows_of(rows)[0]


def blocks(
    matrix: Callable[[slice], Tensor], heads: int, T: int, block: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """The rows of a matrix, some at a time, each time with the number of the first."""
    size = block or max(16, BLOCK_ENTRIES // (heads * T))
    for first in range(0, T, size):
        yield first, matrix(slice(first, min(first + size, T)))


@torch.no_grad()
def matrices_beside(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    """The student's mixing matrix and the teacher's attention in one layer, both `[H, T, T]`, on the teacher's input to
    it, for a text `ids: [T]`: what pictures show. Negative layers count from the last."""
    ours, theirs = stacks(student, teacher)
    if not -len(ours) <= layer < len(ours):
        raise UserError(f"layer: got {layer}, expected 0 to {len(ours) - 1}")
    with eval_mode(student), eval_mode(teacher):
        recording = theirs.record([theirs.mixing[layer]], ids.view(1, -1))[0]
        return tuple(matrix_of(stack, layer, recording)(slice(None)) for stack in (ours, theirs))  # type: ignore[return-value]


def by_head(metric: str, values: Sequence[Tensor], length: int, n: int) -> list[Result]:
    """Rows of one metric from `[H]` a layer: the mean of all (neither layer nor head), of each layer, each head's."""
    row = partial(Result, task="matrices", metric=metric, length=length, n=n)
    found = [row(value=torch.stack([v.double().mean() for v in values]).mean().item())]
    for index, layer in enumerate(values):
        found.append(row(value=layer.double().mean().item(), layer=index))
        found += [row(value=value, layer=index, head=h) for h, value in enumerate(layer.tolist())]
    return found
