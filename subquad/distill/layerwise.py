"""What stages 1 and 2 share: every layer learns on its own, from the teacher's input to that layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.distill.documents import document_ids
from subquad.distill.objective import Batch, Objective, StageOutput
from subquad.modeling.attention.activations import LayerActivations, attention_modules, collect_activations
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.modeling_subquad import SubquadForCausalLM


class LayerwiseDistillation(Objective):
    """Runs the teacher once on a batch and compares each student layer with the teacher's on the same input.

    attention_layers: `discover_attention(teacher)`, if the caller has it already.
    """

    def __init__(self, teacher: PreTrainedModel, attention_layers: list[AttentionInfo] | None = None):
        self.teacher = teacher
        self.attention_layers = attention_layers or discover_attention(teacher)
        self.hooked_modules = attention_modules(self.attention_layers)

    def targets(self, batch: Batch) -> dict[str, Any]:
        input_ids, doc_ids = batch["input_ids"], document_ids(batch)
        positions = None if doc_ids is None else batch["position_ids"]
        activations = collect_activations(self.teacher, self.hooked_modules, input_ids, positions)
        return {"input_ids": input_ids, "activations": activations, "doc_ids": doc_ids}

    def trained_parameters(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return [p for parameters in self.layer_parameters(student) for p in parameters]

    def layer_parameters(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        """The parameters that this stage trains, a list for each layer."""
        raise NotImplementedError

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, activations: LayerActivations, doc_ids: Tensor | None
    ) -> Tensor:
        """The loss of layer `index`, a mean over the tokens of the batch."""
        raise NotImplementedError

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> StageOutput:
        activations, doc_ids = targets["activations"], targets["doc_ids"]
        losses = [lambda i=i, a=a: self.layer_loss(student, i, a, doc_ids) for i, a in enumerate(activations)]
        return StageOutput(*layerwise_loss(losses, self.layer_parameters(student)))


def layerwise_loss(
    losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns the mean of independent losses, one for each layer, and their values, `[layers]`.

    `losses[i]()` depends on `parameters[i]` alone. Each loss is differentiated as soon as it is computed, so that the
    graph of only one layer is in memory. The returned mean passes these gradients on when it is differentiated, so
    that whatever wraps the model (accumulation, DDP, a gradient scaler) sees an ordinary loss. An unused parameter
    gets a gradient of zero, for which data-parallel wrappers wait.
    """
    flat = [p for layer in parameters for p in layer if p.requires_grad]
    differentiate = torch.is_grad_enabled() and bool(flat)
    values, gradients = [], []
    for loss, layer in zip(losses, parameters, strict=True):
        trainable = [p for p in layer if p.requires_grad]
        with torch.set_grad_enabled(differentiate and bool(trainable)):
            value = loss()
        if differentiate and trainable:
            grads = torch.autograd.grad(value, trainable, allow_unused=True, materialize_grads=True)
            gradients += [g / len(losses) for g in grads]
        values.append(value.detach())
    per_layer = torch.stack(values)
    if not differentiate:
        return per_layer.mean(), per_layer
    return _PrecomputedGrads.apply(per_layer.mean(), gradients, *flat), per_layer


class _PrecomputedGrads(torch.autograd.Function):
    """A value whose gradients with respect to `parameters` are already known."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, *[g * grad.to(g.dtype) for g in ctx.gradients]
