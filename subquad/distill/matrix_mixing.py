"""Stage 1, matrix mixing: each layer's mixing matrix is fitted to the teacher's attention matrix (arXiv 2504.14366;
MOHAWK, arXiv 2408.10189, section 3.1, calls it matrix orientation). Of a layer with near and far, the memory's part is
fitted to the columns of the tokens outside the window."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.distill.layerwise import LayerwiseDistillation
from subquad.distill.objective import Batch, slices
from subquad.mixers.norms import upcast
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.scores import AttentionProbabilities, slice_arguments
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.near_far_matrix import NearFarMatrix

MatrixRows = Callable[[slice], Tensor]
"""Maps a slice of rows to these rows of a matrix `[B, H, T, T]`: `[B, H, rows, T]`."""


class MatrixMixing(LayerwiseDistillation):
    name = "matrix"

    def layer_parameters(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [layer.matrix_parameters() for layer in student.mixer_layers]

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        targets = super().forward_kwargs(batch)
        return {**targets, "documents": document_slices(targets["mask"], *batch["input_ids"].shape)}

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, activations: LayerActivations, targets: dict[str, Any]
    ) -> Tensor:
        B, T, _ = activations.hidden_states.shape
        total = torch.zeros((), device=activations.hidden_states.device)
        layer, attention = student.mixer_layers[index], self.attention_layers[index]
        for rows, tokens in targets["documents"]:
            args, kwargs = slice_arguments(activations.args, activations.kwargs, tokens, rows)
            count, length = rows.stop - rows.start, tokens.stop - tokens.start
            matrix: MatrixRows = layer.matrix_rows(*args, **kwargs)
            target: MatrixRows = AttentionProbabilities(attention.module, attention.spec.window, 0, args, kwargs)
            if isinstance(matrix, NearFarMatrix) and layer.has_memory:
                matrix, target = outside_parts(matrix, target)
            distance = matrix_distance(matrix, target, length, layer.scale_invariant, self.stage.row_chunk_size)
            total = total + length * count * distance
        return total / (B * T)


def outside_parts(matrix: NearFarMatrix, target: MatrixRows) -> tuple[MatrixRows, MatrixRows]:
    """Both matrices in the columns of the tokens that have left the window, sinks excluded."""

    def target_outside(rows: slice) -> Tensor:
        return target(rows).masked_fill(~matrix.outside_columns(rows), 0)

    return matrix.outside, target_outside


def document_slices(mask: Tensor | None, B: int, T: int) -> list[tuple[slice, slice]]:
    """Rows and tokens of each document of a mask `[B, 1, 1, T]`; one slice of the whole batch if it is None."""
    if mask is None:
        return [(slice(0, B), slice(0, T))]
    doc_ids = mask[:, 0, 0]
    is_first = doc_ids != F.pad(doc_ids[:, :-1], (1, 0), value=-1)
    starts = is_first.flatten().nonzero().flatten().tolist()
    return [
        (slice(start // T, start // T + 1), slice(start % T, start % T + end - start))
        for start, end in itertools.pairwise([*starts, B * T])
    ]


def matrix_distance(
    matrix: MatrixRows, target: MatrixRows, length: int, scale_invariant: bool, row_chunk_size: int
) -> Tensor:
    """Squared Frobenius distance per matrix row between two matrices `[B, H, T, T]`, a mean over batch, heads and rows.
    `target` gets no gradient.

    Args:
        length: T.
        scale_invariant: a norm follows the op, so that the scale of a head's matrix has no effect. The matrix is first
            multiplied by the least-squares scale of each sequence and head, <M, A> / <M, M>, at least 0. This scale
            minimizes the distance, so that its own gradient is zero: it is treated as a constant.
        row_chunk_size: the number of rows in memory at a time; if it is less than T, the backward pass recomputes them.
    """

    def both(rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            A = upcast(target(rows))
        return upcast(matrix(rows)), A

    chunks = list(slices(length, row_chunk_size))
    if len(chunks) == 1:
        M, A = both(chunks[0])
        return _squared_distance(M, A, _least_squares_scale([(M, A)]) if scale_invariant else None) / M[..., 0].numel()
    scale = _least_squares_scale(map(both, chunks)) if scale_invariant else None

    def distance(rows: slice) -> tuple[Tensor, Tensor]:
        M, A = both(rows)
        return _squared_distance(M, A, scale), M.new_tensor(M[..., 0].numel())

    sums = [checkpoint(distance, chunk, use_reentrant=False) for chunk in chunks]
    total, count = (torch.stack(x).sum(0) for x in zip(*sums, strict=True))
    return total / count


@torch.no_grad()
def _least_squares_scale(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """<M, A> / <M, M> over the rows of all pairs, at least 0: `[B, H, 1, 1]`."""
    sums = [[(M * X).sum((-2, -1), keepdim=True) for X in (A, M)] for M, A in pairs]
    product, squared_norm = (torch.stack(x).sum(0) for x in zip(*sums, strict=True))
    return (product / squared_norm.clamp_min(torch.finfo(squared_norm.dtype).tiny)).clamp_min(0)


def _squared_distance(M: Tensor, A: Tensor, scale: Tensor | None) -> Tensor:
    return (M - A if scale is None else torch.addcmul(-A, M, scale)).square().sum()
