"""What the trainer and the student's `forward` need of a stage: its parameters, its targets and its loss."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, default_data_collator
from transformers.utils import ModelOutput

from subquad.config import Stage
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.modeling_subquad import SubquadForCausalLM

Batch = dict[str, Tensor]
"""Rows of `subquad.data.PackedDataset`: `input_ids`, and where rows have several documents or some tokens are ignored,
`position_ids` and `labels`, all `[B, T]`."""


@dataclass
class StageOutput(ModelOutput):
    """The loss of a batch. Stages 1 and 2 also give the loss of each layer, `[layers]`, detached."""

    loss: Tensor | None = None
    layer_losses: Tensor | None = None


class Objective:
    """What a stage minimizes.

    The student calls it inside its own `forward`, so that data-parallel wrappers synchronize the gradients:
    `student(objective=objective, **objective.forward_kwargs(batch))`. The teacher is not a submodule of the student.
    """

    name: ClassVar[str]
    """The stage's key in the recipe."""
    Options: ClassVar[type[Stage]] = Stage
    """The schema of the stage's section in the recipe; not read of built-in stages."""
    position: ClassVar[float] = 4
    """Stages run in this order, those of equal position by name. matrix has 1, hidden 2, end_to_end 3."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        stage: Any,
        scale_ids: Tensor | None = None,
        attention_layers: list[AttentionInfo] | None = None,
    ):
        """A run gives all four.

        stage: the section of the recipe. scale_ids: training tokens `[B, T]` on which a stage may measure the scale of
        its targets. attention_layers: `discover_attention(teacher)`.
        """
        self.teacher, self.stage = teacher, stage
        if attention_layers is not None:
            self.attention_layers = attention_layers

    @functools.cached_property
    def attention_layers(self) -> list[AttentionInfo]:
        return discover_attention(self.teacher)

    def trained_parameters(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        """The parameters that this stage trains."""
        raise NotImplementedError

    def before_sharding(self, student: SubquadForCausalLM) -> None:
        """Called with the whole student before a copy of it is sharded and trained (FSDP): reads what needs whole
        parameters."""

    def prepare(self, rows: Dataset) -> None:
        """Called before the first step with all rows that the stage will read, unless they are streamed: in the first
        process before the others, under the autocast of the stage."""

    def training_batch(self, batch: Batch) -> Batch:
        """The batch on which the loss is computed: `batch`, or one made from it (rows continued by the teacher).

        `count_tokens` and `forward_kwargs` receive it.
        """
        return batch

    def forward_kwargs(self, batch: Batch) -> dict[str, Any]:
        """The keyword arguments of the student's forward: `input_ids` and what the teacher computed from them."""
        raise NotImplementedError

    def count_tokens(self, batch: Batch) -> Tensor:
        """The number of tokens over which the loss of a batch is averaged, on the device of the batch."""
        ids = batch["input_ids"]
        return torch.full((), ids.numel(), device=ids.device)

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> StageOutput:
        raise NotImplementedError


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients with respect to `inputs` are known already: `gradients`, to be divided by `divisor`.

    The backward pass gives them away without a copy: it raises RuntimeError when it runs a second time (`retain_graph`)
    and with `create_graph`.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], divisor: int, *inputs: Tensor) -> Tensor:
        ctx.gradients, ctx.divisor = gradients, divisor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # autograd would take the gradients for constants
            raise RuntimeError("the loss has no second derivative (create_graph=True)")
        if ctx.gradients is None:
            raise RuntimeError("the loss gives its gradients only once (retain_graph=True); compute it again")
        # the receiver (a parameter's `grad`) may keep them without a copy
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad / ctx.divisor
        return None, None, None, *(g.mul_(scale.to(g.dtype)) for g in gradients)


def document_ids(batch: Batch) -> Tensor | None:
    """The number of each token's document in its row, `[B, T]`, from 1; None without `position_ids`."""
    positions = batch.get("position_ids")
    if positions is None:
        return None
    doc_ids = torch.ones_like(positions)
    doc_ids[:, 1:] += (positions[:, 1:] == 0).cumsum(1)
    return doc_ids


def collate(rows: list[Batch]) -> Batch:
    """The batch of some rows, without `position_ids` if every row is one document. The device would have to be waited
    for to know."""
    batch = default_data_collator(rows)
    if "position_ids" in batch and not (batch["position_ids"][:, 1:] == 0).any():
        del batch["position_ids"]
    return batch


def slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
