"""Stage 2, hidden-state alignment (MOHAWK, arXiv 2408.10189, section 3.2): the mixer's output is fitted to the
attention's or, with `target: decoder_layer`, the output of each decoder layer to the teacher's."""

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.config import HiddenStage
from subquad.distill.layerwise import LayerwiseDistillation
from subquad.modeling.attention.activations import LayerActivations, layer_path
from subquad.modeling.attention.scores import replace_mask
from subquad.modeling.modeling_subquad import SubquadForCausalLM


class HiddenAlignment(LayerwiseDistillation):
    """`target_norms` are the mean squared norms of the teacher's outputs, one for each layer, measured once on
    `scale_ids: [B, T]`. Losses are divided by them."""

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
