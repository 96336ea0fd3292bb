"""What stages 1 and 2 share: every layer learns on its own, from the teacher's input to that layer."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from subquad.distill.layer_parallel import LayerParallel
from subquad.distill.objective import Batch, KnownGradients, Objective, StageOutput, document_ids
from subquad.distill.sharding import gathered, reduce_gradients
from subquad.modeling.attention.activations import LayerActivations, ModuleAndProjection, visit_activations
from subquad.modeling.modeling_subquad import SubquadForCausalLM


class LayerwiseDistillation(Objective):
    """Runs the teacher once on a batch and, as it reaches each layer, compares the student's layer on the same input.

    The loss of a layer depends on `layer_parameters` of this layer alone. It is differentiated at once, so that the
    graph of only one layer is in memory.
    """

    layer_parallel: LayerParallel | None = None
    """How the layers are spread over the processes. Each computes the losses of its own layers on the rows of all; the
    result has those of all layers."""

    def teacher_modules(self) -> list[ModuleAndProjection]:
        """The modules, one for each layer, whose inputs and outputs `layer_loss` gets."""
        return [(attention.module, None) for attention in self.attention_layers]

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
        visit_activations(self.teacher, self.teacher_modules(), on_output, input_ids, positions)

    def __call__(
        self,
        student: SubquadForCausalLM,
        input_ids: Tensor,
        of_processes: Sequence[dict[str, Any]] | None = None,
        **targets: Any,
    ) -> StageOutput:
        """of_processes: layer-parallel, `targets` for the rows of each process; those of this one are among them."""
        differentiate, layers = torch.is_grad_enabled(), self.layer_parameters(student)
        parameters = [[p for p in layer if p.requires_grad and differentiate] for layer in layers]
        losses, gradients = [torch.zeros((), device=input_ids.device)] * len(layers), [list[Tensor]()] * len(layers)
        targets_of_parts = of_processes or [targets]

        def add_loss(index: int, parts: Iterable[LayerActivations]) -> None:
            own = parameters[index]
            with gathered(student, index) as is_sharded, torch.set_grad_enabled(bool(own)):
                current = self.layer_parameters(student)[index] if is_sharded else own
                whole = [p for p in current if p.requires_grad]
                for activations, targets in zip(parts, targets_of_parts, strict=True):
                    loss = self.layer_loss(student, index, activations, targets) / len(targets_of_parts)
                    losses[index] = losses[index] + loss.detach()
                    if own:
                        # data-parallel wrappers wait for the gradient of an unused parameter
                        grads = torch.autograd.grad(loss, whole, allow_unused=True, materialize_grads=True)
                        shares = [g / len(layers) for g in grads]
                        before = gradients[index] or map(torch.zeros_like, shares)
                        gradients[index] = [x.add_(share) for x, share in zip(before, shares, strict=True)]
                gradients[index] = reduce_gradients(gradients[index], own)

        if self.layer_parallel is None:
            self.visit(lambda index, activations: add_loss(index, [activations]), input_ids, targets["positions"])
        else:
            with self.layer_parallel.to_owners(add_loss) as collect:
                self.visit(collect, input_ids, targets["positions"])
        layer_losses, flat = torch.stack(losses), itertools.chain.from_iterable
        if self.layer_parallel is not None:
            layer_losses = self.layer_parallel.sum(layer_losses)
        loss = KnownGradients.apply(layer_losses.mean(), list(flat(gradients)), 1, *flat(parameters))
        return StageOutput(loss, layer_losses)
