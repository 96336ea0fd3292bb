"""Stage 1, matrix mixing (arXiv 2504.14366; MOHAWK, arXiv 2408.10189, section 3.1, calls it matrix orientation): each
layer's mixing matrix is fitted to the teacher's attention matrix."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from subquad.config import MatrixStage
from subquad.distill.documents import document_slices
from subquad.distill.layerwise import LayerwiseDistillation
from subquad.distill.objective import Batch
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.attention.scores import attention_probabilities, slice_arguments
from subquad.modeling.modeling_subquad import SubquadForCausalLM

MatrixRows = Callable[[slice], Tensor]
"""Maps a slice of rows to these rows of a matrix `[B, H, T, T]`: `[B, H, rows, T]`."""


class MatrixMixing(LayerwiseDistillation):
    name = "matrix"

    def __init__(
        self, teacher: PreTrainedModel, stage: MatrixStage, attention_layers: list[AttentionInfo] | None = None
    ):
        super().__init__(teacher, stage, attention_layers)
        self.row_chunk_size = stage.row_chunk_size
        self.hooked_modules = [(module, None) for module, _ in self.hooked_modules]

    def layer_parameters(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [layer.matrix_parameters() for layer in student.mixer_layers]

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        targets = super().forward_kwargs(batch)
        return {**targets, "documents": document_slices(targets["doc_ids"], *batch["input_ids"].shape)}

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, activations: LayerActivations, targets: dict[str, Any]
    ) -> Tensor:
        B, T, _ = activations.hidden_states.shape
        total = torch.zeros((), device=activations.hidden_states.device)
        for rows, tokens in targets["documents"]:
            args, kwargs = slice_arguments(activations.args, activations.kwargs, tokens, rows)
            count, length = rows.stop - rows.start, tokens.stop - tokens.start
            total = total + length * count * self.document_loss(student, index, args, kwargs, length)
        return total / (B * T)

    def document_loss(
        self, student: SubquadForCausalLM, index: int, args: tuple, kwargs: dict[str, Any], length: int
    ) -> Tensor:
        """The loss of layer `index` on rows that are one document each, of `length` tokens."""
        mixer_layer, attention = student.mixer_layers[index], self.attention_layers[index]

        @torch.no_grad()
        def target(rows: slice) -> Tensor:
            return attention_probabilities(attention.module, attention.spec.window, 0, args, kwargs, rows)

        matrix = mixer_layer.matrix_rows(*args, **kwargs)
        return matrix_distance(matrix, target, length, mixer_layer.scale_invariant, self.row_chunk_size)


def matrix_distance(
    matrix: MatrixRows, target: MatrixRows, length: int, scale_invariant: bool, row_chunk_size: int
) -> Tensor:
    """Squared Frobenius distance per matrix row between two matrices `[B, H, T, T]`, a mean over batch, heads and rows.

    Args:
        length: T.
        scale_invariant: a norm follows the op, so that the scale of a head's matrix has no effect. The matrix is first
            multiplied by the least-squares scale of each sequence and head, <M, A> / <M, M>, at least 0. This scale
            minimizes the distance, so that its own gradient is zero: it is treated as a constant.
        row_chunk_size: the number of rows in memory at a time; if it is less than T, the backward pass recomputes them.
    """
    chunks = [slice(start, min(start + row_chunk_size, length)) for start in range(0, length, row_chunk_size)]
    if len(chunks) == 1:
        M, A = matrix(chunks[0]).float(), target(chunks[0]).float()
        scale = _least_squares_scale(*_inner_products(M.detach(), A)) if scale_invariant else None
        return _squared_distance(M, A, scale) / M[..., 0].numel()
    scale = None
    if scale_invariant:
        with torch.no_grad():
            products = [_inner_products(matrix(chunk).float(), target(chunk).float()) for chunk in chunks]
        scale = _least_squares_scale(*(torch.stack(x).sum(0) for x in zip(*products, strict=True)))

    def distance(chunk: slice) -> tuple[Tensor, Tensor]:
        M = matrix(chunk).float()
        return _squared_distance(M, target(chunk).float(), scale), M.new_tensor(M[..., 0].numel())

    sums = [checkpoint(distance, chunk, use_reentrant=False) for chunk in chunks]
    total, count = (torch.stack(x).sum(0) for x in zip(*sums, strict=True))
    return total / count


def _inner_products(M: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """<M, A> and <M, M>, `[B, H, 1, 1]`."""
    return (M * A).sum((-2, -1), keepdim=True), M.square().sum((-2, -1), keepdim=True)


def _least_squares_scale(product: Tensor, squared_norm: Tensor) -> Tensor:
    return (product / squared_norm.clamp_min(torch.finfo(squared_norm.dtype).tiny)).clamp_min(0)


def _squared_distance(M: Tensor, A: Tensor, scale: Tensor | None) -> Tensor:
    return (M - A if scale is None else torch.addcmul(-A, M, scale)).square().sum()
