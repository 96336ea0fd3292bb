"""Stage 2, hidden-state alignment (MOHAWK, arXiv 2408.10189, section 3.2): the mixer's output is fitted to the
attention's or, with `target: decoder_layer`, the output of each decoder layer to the teacher's.

A layer with near and far has a second term, so that its memory learns whatever share the merge gives it (arXiv
2510.05901 shows that students bypass it):

    far_weight * E |W_o (m* o_far - m* o_far*)|^2

o_far is what the memory gives, m* o_far* what the teacher's attention has of the tokens outside the window, and W_o the
teacher's output projection (`subquad.modeling.outside`)."""

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.config import HiddenStage
from subquad.distill.layerwise import LayerwiseDistillation
from subquad.mixers.norms import upcast
from subquad.modeling.attention.activations import LayerActivations, ModuleAndProjection, layer_path
from subquad.modeling.attention.discovery import attention_modules
from subquad.modeling.attention.scores import replace_mask
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.near_far import NearFarLayer
from subquad.modeling.outside import KeptFarCall, far_target


class HiddenAlignment(LayerwiseDistillation):
    """`target_norms` are the mean squared norms of the teacher's outputs, one for each layer, measured once on
    `scale_ids: [B, T]`. Losses are divided by them."""

    name = "hidden"

    def __init__(self, teacher: PreTrainedModel, stage: HiddenStage, scale_ids: Tensor, **kwargs: Any):
        super().__init__(teacher, stage, scale_ids, **kwargs)
        self.target_norms: dict[int, Tensor] = {}

        def measure(index: int, activations: LayerActivations) -> None:
            self.target_norms[index] = upcast(activations.output).square().sum(-1).mean()

        self.visit(measure, scale_ids)

    def decoder_layers(self, model: PreTrainedModel) -> list[nn.Module]:
        return [model.get_submodule(layer_path(attention.path)) for attention in self.attention_layers]

    def teacher_modules(self) -> list[ModuleAndProjection]:
        if self.stage.target == "decoder_layer":
            return [(layer, None) for layer in self.decoder_layers(self.teacher)]
        return attention_modules(self.attention_layers) if self.stage.far_weight else super().teacher_modules()

    def student_modules(self, student: SubquadForCausalLM) -> list[nn.Module]:
        return list(student.mixer_layers) if self.stage.target == "mixer" else self.decoder_layers(student.base)

    def layer_parameters(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [list(module.parameters()) for module in self.student_modules(student)]

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, activations: LayerActivations, targets: dict[str, Any]
    ) -> Tensor:
        """Squared distance of the outputs, a mean per token, relative to the teacher's: 1 for an output of zeros. Plus
        the term of the memory, relative to the same."""
        module = self.student_modules(student)[index]
        far_distance: Tensor | float = 0.0
        if self.stage.far_weight and isinstance(module, NearFarLayer) and module.has_memory:
            output, far_distance = self.near_far_outputs(module, index, activations, targets["mask"])
        else:
            args, kwargs = replace_mask(module, activations.args, activations.kwargs, targets["mask"])
            output = module(*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        distance = (upcast(output) - upcast(activations.output)).square().sum(-1).mean()
        return (distance + self.stage.far_weight * far_distance) / self.target_norms[index]

    def near_far_outputs(
        self, layer: NearFarLayer, index: int, activations: LayerActivations, mask: Tensor | None
    ) -> tuple[Any, Tensor]:
        """What the layer returns, and the squared distance of its memory's part from the teacher's, a mean per token;
        from one pass through the layer."""
        info = self.attention_layers[index]
        call = KeptFarCall(layer, activations.hidden_states, mask, None)
        kwargs = {name: value for name, value in activations.kwargs.items() if name != "attention_mask"}
        output = layer.forward_local(None, activations.args, kwargs, mask, call)
        share, value = far_target(layer, info, activations, mask)
        error = (share * call.far - value).flatten(-2)
        weight, _ = info.projection_weights("o")
        return output, (error @ upcast(weight).mT).square().sum(-1).mean()
