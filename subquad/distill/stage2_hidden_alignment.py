"""Stage 2, hidden-state alignment (MOHAWK, arXiv 2408.10189, section 3.2): each layer's output is fitted to the
teacher's."""

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.config import HiddenStage
from subquad.distill.layerwise import LayerwiseDistillation
from subquad.distill.objective import Batch
from subquad.modeling.attention.activations import LayerActivations, layer_path, visit_activations
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.attention.scores import replace_mask
from subquad.modeling.modeling_subquad import SubquadForCausalLM


class HiddenAlignment(LayerwiseDistillation):
    """Compares the mixer's output with the attention's or, with `target: decoder_layer`, outputs of decoder layers.

    `target_norms` are the mean squared norms of the teacher's outputs, one for each layer, measured once on
    `scale_ids: [B, T]`. Losses are divided by them.
    """

    name = "hidden"

    def __init__(
        self,
        teacher: PreTrainedModel,
        stage: HiddenStage,
        scale_ids: Tensor,
        attention_layers: list[AttentionInfo] | None = None,
    ):
        super().__init__(teacher, stage, attention_layers=attention_layers)
        self.paths = [layer_path(attention.path) for attention in self.attention_layers]
        if stage.target == "decoder_layer":
            self.teacher_modules = [teacher.get_submodule(path) for path in self.paths]
        self.target_norms: dict[int, Tensor] = {}

        def measure(index: int, activations: LayerActivations) -> None:
            self.target_norms[index] = activations.output.float().square().sum(-1).mean()

        modules = [(module, None) for module in self.teacher_modules]
        visit_activations(teacher, modules, measure, scale_ids)

    def modules(self, student: SubquadForCausalLM) -> list[nn.Module]:
        """The student's modules whose outputs are compared."""
        if self.stage.target == "mixer":
            return list(student.mixer_layers)
        return [student.base.get_submodule(path) for path in self.paths]

    def layer_parameters(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [list(module.parameters()) for module in self.modules(student)]

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        targets = super().forward_kwargs(batch)
        doc_ids = targets["doc_ids"]
        return {**targets, "mask": None if doc_ids is None else doc_ids[:, None, None, :]}

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, activations: LayerActivations, targets: dict[str, Any]
    ) -> Tensor:
        """Squared distance of the outputs, a mean per token, relative to the teacher's: 1 for an output of zeros."""
        module = self.modules(student)[index]
        args, kwargs = replace_mask(module, activations.args, activations.kwargs, targets["mask"])
        output = module(*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        distance = (output.float() - activations.output.float()).square().sum(-1).mean()
        return distance / self.target_norms[index]
