"""Stage 3, end to end: the whole student learns from text and from the teacher's distribution.

The loss is computed from the last hidden states of a model whose head can be read, otherwise from its logits.
"""

import functools
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from subquad.data.packing import IGNORE_INDEX, next_labels
from subquad.distill.distillation_loss import distillation_loss
from subquad.distill.lm_head import Head, last_outputs, read_head
from subquad.distill.objective import Batch, Objective, StageOutput
from subquad.distill.target_cache import TargetCache
from subquad.distill.teacher_targets import SparseTargets
from subquad.modeling.modeling_subquad import SubquadForCausalLM


class EndToEndDistillation(Objective):
    name = "end_to_end"

    student_head: tuple[Head | None] | None = None
    """The head of the student, if it has been read."""

    @functools.cached_property
    def teacher_head(self) -> Head | None:
        return read_head(self.teacher)

    def head_of(self, student: SubquadForCausalLM) -> Head | None:
        """The student's head. Its form is read once, of the first student; its weights are the current parameters,
        which sharding replaces."""
        if self.student_head is None:
            self.student_head = (read_head(student),)
        head, output = self.student_head[0], student.get_output_embeddings()
        return None if head is None else head._replace(weight=output.weight, bias=getattr(output, "bias", None))  # type: ignore[union-attr,arg-type]

    def trained_parameters(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return list(student.parameters())

    def before_sharding(self, student: SubquadForCausalLM) -> None:
        self.head_of(student)

    def count_tokens(self, batch: Batch) -> Tensor:
        return (next_labels(batch) != IGNORE_INDEX).sum()

    @functools.cached_property
    def target_cache(self) -> TargetCache:
        """Of sparse `teacher_targets`."""
        return TargetCache(self.teacher, self.teacher_head, self.stage)

    def prepare(self, rows: Dataset) -> None:
        if self.stage.teacher_targets != "full":
            self.target_rows = self.target_cache.fill(rows)

    def training_batch(self, batch: Batch) -> Batch:
        return self.generate(batch["input_ids"]) if self.stage.data == "teacher_generated" else batch

    @torch.no_grad()
    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        ids, positions = batch["input_ids"], batch.get("position_ids")
        teacher: Tensor | SparseTargets | None = None
        if self.stage.teacher_targets != "full":
            teacher = self.target_cache(batch)
        elif self.stage.kl_weight > 0:
            teacher = last_outputs(self.teacher, self.teacher_head, ids, positions).flatten(0, 1)
        # not `position_ids`, which would be an argument of the student's forward itself
        targets = {"input_ids": ids, "positions": positions, "next_labels": next_labels(batch), "teacher": teacher}
        return {**targets, "counted": None if "labels" in batch else before_last(ids)}

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
        head = self.head_of(student)
        outputs = last_outputs(student, head, input_ids, targets["positions"])
        labels = targets["next_labels"].flatten()
        loss, _, _ = distillation_loss(
            outputs.flatten(0, 1),
            targets["teacher"],
            labels,
            head,
            self.teacher_head,
            self.stage,
            counted=targets["counted"],
        )
        return StageOutput(loss)


def before_last(ids: Tensor) -> Tensor:
    """The indices of all tokens of `ids: [B, T]` but the last of each row, `[B * (T - 1)]`."""
    return torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, :-1].flatten()
