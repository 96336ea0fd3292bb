"""What stages 1 and 2 share: every layer learns on its own, from the teacher's input to that layer."""

import itertools
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.distill.documents import document_ids
from subquad.distill.objective import Batch, KnownGradients, Objective, StageOutput
from subquad.modeling.attention.activations import LayerActivations, visit_activations
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.modeling_subquad import SubquadForCausalLM


class LayerwiseDistillation(Objective):
    """Runs the teacher once on a batch and, as it reaches each layer, compares the student's layer on the same input.

    The loss of a layer depends on `layer_parameters` of this layer alone. It is differentiated at once, so that the
    graph of only one layer is in memory.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        stage: Any,
        scale_ids: Tensor | None = None,
        attention_layers: list[AttentionInfo] | None = None,
    ):
        super().__init__(teacher, stage)
        self.attention_layers = attention_layers or discover_attention(teacher)
        self.teacher_modules: list[nn.Module] = [attention.module for attention in self.attention_layers]
        """Those whose inputs and outputs `layer_loss` gets."""

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
        differentiate = torch.is_grad_enabled()
        layers = self.layer_parameters(student)
        parameters = [[p for p in layer if p.requires_grad and differentiate] for layer in layers]
        losses, gradients = [torch.empty(0)] * len(parameters), [list[Tensor]()] * len(parameters)

        def add_loss(index: int, activations: LayerActivations) -> None:
            own = parameters[index]
            with torch.set_grad_enabled(bool(own)):
                loss = self.layer_loss(student, index, activations, targets)
            if own:
                # data-parallel wrappers wait for the gradient of an unused parameter
                grads = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
                gradients[index] = [g / len(parameters) for g in grads]
            losses[index] = loss.detach()

        modules = [(module, None) for module in self.teacher_modules]
        visit_activations(self.teacher, modules, add_loss, input_ids, targets["positions"])
        layer_losses = torch.stack(losses)
        flat = itertools.chain.from_iterable
        loss = KnownGradients.apply(layer_losses.mean(), list(flat(gradients)), 1, *flat(parameters))
        return StageOutput(loss, layer_losses)
