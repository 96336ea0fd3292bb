"""What stages 1 and 2 share: every layer learns on its own, from the teacher's input to that layer."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.distill.documents import document_ids
from subquad.distill.objective import Batch, Objective, StageOutput
from subquad.modeling.attention.activations import LayerActivations, visit_activations
from subquad.modeling.attention.discovery import AttentionInfo, attention_modules, discover_attention
from subquad.modeling.modeling_subquad import SubquadForCausalLM

if TYPE_CHECKING:
    from subquad.distill.run import DistillationRun


class LayerwiseDistillation(Objective):
    """Runs the teacher once on a batch and, as it reaches each layer, compares the student's layer on the same input.

    attention_layers: `discover_attention(teacher)`, if the caller has it already.
    """

    def __init__(self, teacher: PreTrainedModel, stage: Any, attention_layers: list[AttentionInfo] | None = None):
        super().__init__(teacher, stage)
        self.attention_layers = attention_layers or discover_attention(teacher)
        self.hooked_modules = attention_modules(self.attention_layers)

    @classmethod
    def for_run(cls, run: "DistillationRun") -> Self:
        return cls(run.teacher, getattr(run.recipe.stages, cls.name), attention_layers=run.attention_layers)

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        doc_ids = document_ids(batch)
        positions = None if doc_ids is None else batch["position_ids"]
        return {"input_ids": batch["input_ids"], "doc_ids": doc_ids, "positions": positions}

    def trained_parameters(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return [p for parameters in self.layer_parameters(student) for p in parameters]

    def layer_parameters(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        """The parameters that this stage trains, a list for each layer."""
        raise NotImplementedError

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, activations: LayerActivations, targets: dict[str, Any]
    ) -> Tensor:
        """The loss of layer `index`, a mean over the tokens of the batch."""
        raise NotImplementedError

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> StageOutput:
        losses = LayerLosses(self.layer_parameters(student))

        def add_loss(index: int, activations: LayerActivations) -> None:
            losses.add(index, lambda: self.layer_loss(student, index, activations, targets))

        visit_activations(self.teacher, self.hooked_modules, add_loss, input_ids, targets["positions"])
        return StageOutput(*losses.mean())


class LayerLosses:
    """Independent losses, one for each layer; that of layer i depends on `parameters[i]` alone.

    Each loss is differentiated as soon as it is added, so that the graph of only one layer is in memory. The mean
    passes these gradients on when it is differentiated, so that whatever wraps the model (accumulation, DDP, a gradient
    scaler) sees an ordinary loss. An unused parameter gets a gradient of zero, for which data-parallel wrappers wait.
    Gradients are computed if they are enabled here, where the losses may be added while they are not.
    """

    def __init__(self, parameters: Sequence[Sequence[Tensor]]):
        self.parameters = [[p for p in layer if p.requires_grad] for layer in parameters]
        self.differentiate = torch.is_grad_enabled() and any(self.parameters)
        self.values: dict[int, Tensor] = {}
        self.gradients: dict[int, list[Tensor]] = {}

    def add(self, index: int, loss: Callable[[], Tensor]) -> None:
        trainable = self.parameters[index] if self.differentiate else []
        with torch.set_grad_enabled(bool(trainable)):
            value = loss()
        if trainable:
            grads = torch.autograd.grad(value, trainable, allow_unused=True, materialize_grads=True)
            self.gradients[index] = [g / len(self.parameters) for g in grads]
        self.values[index] = value.detach()

    def mean(self) -> tuple[Tensor, Tensor]:
        """The mean of the losses, and their values, `[layers]`."""
        layers = range(len(self.parameters))
        per_layer = torch.stack([self.values[i] for i in layers])
        if not self.differentiate:
            return per_layer.mean(), per_layer
        gradients = [g for i in layers for g in self.gradients.get(i, [])]
        flat = [p for layer in self.parameters for p in layer]
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
