"""Stages 1 and 2: every layer learns on its own, from the teacher's input to that layer."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from subquad.config import HiddenStage
from subquad.distill.objective import Batch, KnownGradients, Objective, StageOutput, document_ids, slices
from subquad.modeling.attention.activations import LayerActivations, layer_path, visit_activations
from subquad.modeling.attention.scores import AttentionProbabilities, replace_mask, slice_arguments
from subquad.modeling.modeling_subquad import SubquadForCausalLM

MatrixRows = Callable[[slice], Tensor]
"""Maps a slice of rows to these rows of a matrix `[B, H, T, T]`: `[B, H, rows, T]`."""


class LayerwiseDistillation(Objective):
    """Runs the teacher once on a batch and, as it reaches each layer, compares the student's layer on the same input.

    The loss of a layer depends on `layer_parameters` of this layer alone. It is differentiated at once, so that the
    graph of only one layer is in memory.
    """

    def teacher_modules(self) -> list[nn.Module]:
        """The modules, one for each layer, whose inputs and outputs `layer_loss` gets."""
        return [attention.module for attention in self.attention_layers]

    def layer_parameters(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        """The parameters that this stage trains, a list for each layer."""
        raise NotImplementedError

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, activations: LayerActivations, targets: dict[str, Any]
    ) -> Tensor:
        """The loss of layer `index`, a mean over the tokens of the batch."""
        raise NotImplementedError

    def trained_parameters(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return [p for parameters in self.layer_parameters(student) for p in parameters]

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        doc_ids = document_ids(batch)
        positions, mask = (None, None) if doc_ids is None else (batch["position_ids"], doc_ids[:, None, None, :])
        return {"input_ids": batch["input_ids"], "positions": positions, "mask": mask}

    def visit(
        self, on_output: Callable[[int, LayerActivations], None], input_ids: Tensor, positions: Tensor | None = None
    ) -> None:
        modules = [(module, None) for module in self.teacher_modules()]
        visit_activations(self.teacher, modules, on_output, input_ids, positions)

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> StageOutput:
        differentiate, layers = torch.is_grad_enabled(), self.layer_parameters(student)
        parameters = [[p for p in layer if p.requires_grad and differentiate] for layer in layers]
        losses, gradients = [torch.empty(0)] * len(layers), [list[Tensor]()] * len(layers)

        def add_loss(index: int, activations: LayerActivations) -> None:
            own = parameters[index]
            with torch.set_grad_enabled(bool(own)):
                loss = self.layer_loss(student, index, activations, targets)
            if own:
                # data-parallel wrappers wait for the gradient of an unused parameter
                grads = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
                gradients[index] = [g / len(layers) for g in grads]
            losses[index] = loss.detach()

        self.visit(add_loss, input_ids, targets["positions"])
        layer_losses, flat = torch.stack(losses), itertools.chain.from_iterable
        loss = KnownGradients.apply(layer_losses.mean(), list(flat(gradients)), 1, *flat(parameters))
        return StageOutput(loss, layer_losses)


# ---------------------------------------------------------------------- stage 1


class MatrixMixing(LayerwiseDistillation):
    """Matrix mixing (arXiv 2504.14366; MOHAWK, arXiv 2408.10189, section 3.1, calls it matrix orientation): each
    layer's mixing matrix is fitted to the teacher's attention matrix."""

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
            matrix = layer.matrix_rows(*args, **kwargs)
            target = AttentionProbabilities(attention.module, attention.spec.window, 0, args, kwargs)
            distance = matrix_distance(matrix, target, length, layer.scale_invariant, self.stage.row_chunk_size)
            total = total + length * count * distance
        return total / (B * T)


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
            A = target(rows).float()
        return matrix(rows).float(), A

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


# ---------------------------------------------------------------------- stage 2


class HiddenAlignment(LayerwiseDistillation):
    """Hidden-state alignment (MOHAWK, arXiv 2408.10189, section 3.2): the mixer's output is fitted to the attention's
    or, with `target: decoder_layer`, the output of each decoder layer to the teacher's.

    `target_norms` are the mean squared norms of the teacher's outputs, one for each layer, measured once on
    `scale_ids: [B, T]`. Losses are divided by them.
    """

    name = "hidden"

    def __init__(self, teacher: PreTrainedModel, stage: HiddenStage, scale_ids: Tensor, **kwargs: Any):
        super().__init__(teacher, stage, scale_ids, **kwargs)
        self.target_norms: dict[int, Tensor] = {}

        def measure(index: int, activations: LayerActivations) -> None:
            self.target_norms[index] = activations.output.float().square().sum(-1).mean()

        self.visit(measure, scale_ids)

    def decoder_layers(self, model: PreTrainedModel) -> list[nn.Module]:
        return [model.get_submodule(layer_path(attention.path)) for attention in self.attention_layers]

    def teacher_modules(self) -> list[nn.Module]:
        return super().teacher_modules() if self.stage.target == "mixer" else self.decoder_layers(self.teacher)

    def student_modules(self, student: SubquadForCausalLM) -> list[nn.Module]:
        return list(student.mixer_layers) if self.stage.target == "mixer" else self.decoder_layers(student.base)

    def layer_parameters(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [list(module.parameters()) for module in self.student_modules(student)]

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, activations: LayerActivations, targets: dict[str, Any]
    ) -> Tensor:
        """Squared distance of the outputs, a mean per token, relative to the teacher's: 1 for an output of zeros."""
        module = self.student_modules(student)[index]
        args, kwargs = replace_mask(module, activations.args, activations.kwargs, targets["mask"])
        output = module(*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        distance = (output.float() - activations.output.float()).square().sum(-1).mean()
        return distance / self.target_norms[index]
