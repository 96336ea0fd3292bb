"""What needs no training: the teacher in int8, and the teacher behind the uniform window of a student's bytes."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from transformers import PreTrainedModel

from subquad.mixers import ATTENTION
from subquad.modeling.budget import SINKS
from subquad.modeling.cache import cached_numbers, head_groups
from subquad.modeling.layer_types import LayerType
from subquad.modeling.layers import AttentionLayer
from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.summary import cache_sizes, meta_model
from subquad.utils import needs_extra

CONTEXT = 4096
"""Tokens after which caches are compared."""


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


def uniform_window(window: int) -> dict[str, Any]:
    """The layer spec of attention to the last `window` tokens and the first `SINKS`."""
    return {"mixer": ATTENTION, "window": window, "sinks": SINKS}


def windowed_teacher(teacher: PreTrainedModel, window: int) -> SubquadForCausalLM:
    """The teacher, its weights shared, with all attention limited to the last `window` tokens and the first `SINKS`."""
    return kept_attention(teacher, {"default": uniform_window(window)})


def kept_attention(teacher: PreTrainedModel, layer_types: Mapping[str, LayerType]) -> SubquadForCausalLM:
    """The teacher, its weights shared, with windows: a student without mixers."""
    one_token = torch.zeros(1, 1, dtype=torch.long)  # there is no mixer whose scale would be measured
    return share_weights(linearize(teacher, layer_types=layer_types, scale_ids=one_token), teacher).eval()


def share_weights(student: SubquadForCausalLM, teacher: PreTrainedModel) -> SubquadForCausalLM:
    """Replaces what an untrained student copied from its teacher by the teacher's own parameters, to save memory."""
    pairs: list[tuple[nn.Module, nn.Module]] = [(student.base, teacher)]
    for spec, layer in zip(student.config.attention_specs, student.mixer_layers, strict=True):
        if isinstance(layer, AttentionLayer):
            pairs.append((layer.attention, teacher.get_submodule(spec["path"])))
    for copied, original in pairs:
        parameters = dict(original.named_parameters(remove_duplicate=False))
        for name, _ in list(copied.named_parameters(remove_duplicate=False)):
            if name in parameters:
                module, _, attribute = name.rpartition(".")
                setattr(copied.get_submodule(module), attribute, parameters[name])
    return student


class EqualBytes(NamedTuple):
    """Bytes of the caches of a student and its teacher after `CONTEXT` tokens of one sequence, and the largest uniform
    window whose cache is not larger than the student's."""

    student: int
    teacher: int
    window: int | None
    """None if the student's cache is not smaller than the teacher's, or the student is a uniform window."""


def equal_bytes(student: SubquadForCausalLM) -> EqualBytes:
    meta = meta_model(student.config).to(student.dtype)  # type: ignore[arg-type]
    own, whole = cache_sizes(meta, CONTEXT)
    layer_specs = student.config.layer_specs
    if own >= whole or all(spec == uniform_window(layer_specs[0].get("window", 0)) for spec in layer_specs):
        return EqualBytes(own, whole, None)
    specs = [layer.spec for layer in meta.mixer_layers]

    def window_bytes(window: int) -> int:
        layers = ((spec, head_groups((window,) * spec.num_kv_heads, SINKS, spec.window)) for spec in specs)
        return sum(cached_numbers(spec, groups, CONTEXT) for spec, groups in layers) * student.dtype.itemsize

    # not by bisection: near a teacher's own window, sinks may make a smaller window's cache larger
    fitting = (window for window in range(CONTEXT, 0, -1) if window_bytes(window) <= own)
    return EqualBytes(own, whole, next(fitting, None))
