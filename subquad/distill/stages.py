"""The three stages: what each trains, what it asks of the teacher, and its loss.

An objective is called inside the student's `forward` (`student(input_ids, objective=stage, **stage.targets(...))`), so
that data-parallel wrappers see its gradients. The teacher stays outside the student.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.config import EndToEnd
from subquad.distill.losses import distillation_loss, layerwise, matrix_distance, output_distance
from subquad.modeling.families import AttentionSite, Recording, find_attention, record_attention
from subquad.modeling.hub import SubquadForCausalLM
from subquad.modeling.layers import attention_matrix


class Objective:
    """A stage. `name` is its key in the recipe."""

    name: str

    def trained(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        """The parameters that learn in this stage."""
        raise NotImplementedError

    def targets(self, input_ids: Tensor) -> dict[str, Any]:
        """What the teacher says of a batch `[B, T]`; goes to the student's forward beside it."""
        raise NotImplementedError

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> CausalLMOutputWithPast:
        """The loss of a batch, a mean per token or row."""
        raise NotImplementedError


class Alignment(Objective):
    """Stages 1 and 2: every layer learns alone, from the teacher's input to that layer."""

    def __init__(self, teacher: PreTrainedModel):
        self.teacher = teacher
        self.sites: list[AttentionSite] = find_attention(teacher)

    def targets(self, input_ids: Tensor) -> dict[str, Any]:
        return {"recordings": record_attention(self.teacher, self.sites, input_ids)}

    def trained(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return [p for group in self.groups(student) for p in group]

    def groups(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        raise NotImplementedError

    def layer_loss(self, student: SubquadForCausalLM, index: int, recording: Recording) -> Tensor:
        raise NotImplementedError

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> CausalLMOutputWithPast:
        recordings: list[Recording] = targets["recordings"]
        losses = [lambda i=i, r=r: self.layer_loss(student, i, r) for i, r in enumerate(recordings)]
        loss, _ = layerwise(losses, self.groups(student))
        return CausalLMOutputWithPast(loss=loss)  # type: ignore[arg-type]


class MatrixMixing(Alignment):
    """Stage 1 (MOHAWK, arXiv 2408.10189, section 3.1): each layer's mixing matrix towards the teacher's attention."""

    name = "matrix"

    def groups(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [block.matrix_parameters() for block in student.blocks]

    def layer_loss(self, student: SubquadForCausalLM, index: int, recording: Recording) -> Tensor:
        block, site, given = student.blocks[index], self.sites[index], recording
        with torch.no_grad():
            target = attention_matrix(site.module, site.layout.window, 0, given.args, given.kwargs)
        return matrix_distance(block.matrix(*given.args, **given.kwargs), target, block.matrix_scale_is_free)


class HiddenAlignment(Alignment):
    """Stage 2 (MOHAWK, section 3.2): each layer's output towards that of the teacher's attention.

    `powers` are the mean squares of the teacher's outputs, one a layer, measured once on `calibration: [B, T]`: the
    unit of each layer's loss.
    """

    name = "hidden"

    def __init__(self, teacher: PreTrainedModel, calibration: Tensor):
        super().__init__(teacher)
        recordings = record_attention(teacher, self.sites, calibration.to(teacher.device))
        self.powers = [r.output.float().square().sum(-1).mean() for r in recordings]

    def groups(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [list(block.parameters()) for block in student.blocks]

    def layer_loss(self, student: SubquadForCausalLM, index: int, recording: Recording) -> Tensor:
        given = student.blocks[index](*recording.args, **{**recording.kwargs, "attention_mask": None})
        output = given[0] if isinstance(given, tuple) else given
        return output_distance(output, recording.output, self.powers[index])


class EndToEndDistillation(Objective):
    """Stage 3: the whole student on text, by cross-entropy and the KL divergence from the teacher's distribution."""

    name = "end_to_end"

    def __init__(self, teacher: PreTrainedModel, stage: EndToEnd):
        self.teacher = teacher
        self.weights = {
            "ce_weight": stage.ce_weight,
            "kl_weight": stage.kl_weight,
            "temperature": stage.temperature,
        }

    def trained(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return list(student.parameters())

    @torch.no_grad()
    def targets(self, input_ids: Tensor) -> dict[str, Any]:
        return {"teacher_logits": self.teacher(input_ids=input_ids, use_cache=False).logits}

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> CausalLMOutputWithPast:
        logits = student(input_ids=input_ids, use_cache=False).logits
        loss, _, _ = distillation_loss(logits, targets["teacher_logits"], input_ids, **self.weights)
        return CausalLMOutputWithPast(loss=loss)  # type: ignore[arg-type]
