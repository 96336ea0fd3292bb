"""Cheap alternatives to a student, as baselines: the teacher in int8, and the teacher with a sliding window."""

import copy

import torch.nn as nn
from transformers import PreTrainedModel

from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import needs_extra

WINDOW, SINKS = 512, 4


def int8_teacher(teacher: PreTrainedModel) -> PreTrainedModel:
    """A copy with int8 weights in its linear layers, one scale per row (torchao, weight-only).

    Raises:
        UserError: torchao is not installed.
    """
    with needs_extra("the teacher in int8", "eval"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantized = copy.deepcopy(teacher)
    head = quantized.get_output_embeddings()
    if head is not None:  # a tied head must not quantize the embedding
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    quantize_(quantized, Int8WeightOnlyConfig(version=2))
    return quantized


def windowed_teacher(teacher: PreTrainedModel, window: int = WINDOW, sinks: int = SINKS) -> SubquadForCausalLM:
    """The teacher with all attention limited to the last `window` tokens and the first `sinks` (arXiv 2309.17453)."""
    return linearize(teacher, layer_types={"default": {"mixer": "attention", "window": window, "sinks": sinks}}).eval()
