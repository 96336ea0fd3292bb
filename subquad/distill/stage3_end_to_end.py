"""Stage 3, end to end: the whole student learns from text and from the teacher's distribution.

The loss is in `distillation_loss.py`. If the heads of both models can be read, it is computed by `fused_loss.py`.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.config import EndToEndStage
from subquad.data.packing import IGNORE_INDEX, next_labels
from subquad.distill.distillation_loss import LossOptions, distillation_loss
from subquad.distill.documents import document_ids
from subquad.distill.fused_loss import fused_distillation_loss
from subquad.distill.lm_head import Head, read_head
from subquad.distill.objective import Batch, Objective, StageOutput
from subquad.modeling.modeling_subquad import SubquadForCausalLM


class EndToEndDistillation(Objective):
    name = "end_to_end"

    def __init__(self, teacher: PreTrainedModel, stage: EndToEndStage):
        super().__init__(teacher, stage)
        self.options = LossOptions(
            stage.ce_weight, stage.kl_weight, stage.temperature, stage.divergence, stage.jsd_beta
        )
        self.teacher_head = read_head(teacher)
        self.student_head: tuple[SubquadForCausalLM, Head | None] | None = None

    def head_of(self, student: SubquadForCausalLM) -> Head | None:
        """The student's head. Its form is read once; its weights are the current parameters, which sharding
        replaces."""
        if self.student_head is None or self.student_head[0] is not student:
            with torch.autocast(student.device.type, enabled=False):
                self.student_head = student, read_head(student)
        head, output = self.student_head[1], student.get_output_embeddings()
        return None if head is None else head._replace(weight=output.weight, bias=getattr(output, "bias", None))  # type: ignore[union-attr,arg-type]

    def trained_parameters(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return list(student.parameters())

    def count_tokens(self, batch: Batch) -> Tensor:
        return (next_labels(batch) != IGNORE_INDEX).sum()

    def training_batch(self, batch: Batch) -> Batch:
        return self.generate(batch["input_ids"]) if self.stage.data == "teacher_generated" else batch

    @torch.no_grad()
    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        positions = None if document_ids(batch) is None else batch["position_ids"]
        # not `position_ids`, which would be an argument of the student's forward itself
        targets = {"input_ids": batch["input_ids"], "next_labels": next_labels(batch), "positions": positions}
        if self.stage.kl_weight == 0:
            return targets
        inputs = teacher_inputs(targets)
        if self.teacher_head is None:
            return {**targets, "teacher_logits": self.teacher(**inputs).logits}
        return {**targets, "teacher_hidden": self.teacher.base_model(**inputs).last_hidden_state}

    @torch.no_grad()
    def generate(self, input_ids: Tensor) -> Batch:
        """The first tokens of each row, continued by the teacher by sampling from its distribution, `[B, T]`.

        A row ends with the teacher's end-of-text token. What follows is padding, whose labels are -100.
        """
        T, config = input_ids.shape[1], self.teacher.generation_config
        prompt = input_ids[:, : max(1, round(self.stage.prompt_fraction * T))]
        ends = torch.as_tensor([] if config.eos_token_id is None else config.eos_token_id).flatten()  # type: ignore[union-attr]
        pad = next((x for x in (config.pad_token_id, *ends.tolist()) if x is not None), 0)  # type: ignore[union-attr]
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": pad}
        ids: Tensor = self.teacher.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=T - prompt.shape[1], **sampling
        )
        ids = F.pad(ids, (0, T - ids.shape[1]), value=pad)
        is_end = torch.isin(ids, ends.to(ids))
        is_end[:, : prompt.shape[1]] = False
        return {"input_ids": ids, "labels": ids.masked_fill(is_end.cumsum(1) > is_end, IGNORE_INDEX)}

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> StageOutput:
        labels, positions = targets["next_labels"], targets["positions"]
        head, teacher_hidden = self.head_of(student), targets.get("teacher_hidden")
        if head is None or "teacher_logits" in targets:
            logits = student(input_ids=input_ids, position_ids=positions, use_cache=False).logits
            shifted = F.pad(labels[:, :-1], (1, 0), value=IGNORE_INDEX)
            teacher_logits = self.teacher_logits({"input_ids": input_ids, **targets})
            loss, _, _ = distillation_loss(logits, teacher_logits, shifted, self.options)
            return StageOutput(loss)
        loss, _, _ = fused_distillation_loss(
            student.last_hidden_state(input_ids, positions).flatten(0, 1),
            None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            labels.flatten(),
            head,
            self.teacher_head,
            self.options,
        )
        return StageOutput(loss)

    @torch.no_grad()
    def teacher_logits(self, targets: dict[str, Any]) -> Tensor | None:
        """The teacher's logits for `distillation_loss`; None if the loss has no divergence."""
        if "teacher_hidden" not in targets:
            return targets.get("teacher_logits")
        return self.teacher(**teacher_inputs(targets)).logits


def teacher_inputs(targets: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the teacher's forward."""
    positions = {} if targets["positions"] is None else {"position_ids": targets["positions"]}
    return {"input_ids": targets["input_ids"], "use_cache": False, **positions}
