"""The arguments of a student's backbone, as its layers expect them.

All paths into the decoder layers pass the backbone: the head's, `base_model`, `get_decoder()`. A hook replaces the
arguments of `transformers` (no mask or a mask `[B, S]`, no positions, no cache) by the student's own mask, explicit
positions and cache (`subquad.modeling.masks`).
"""

import inspect
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor

from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.modeling.masks import is_own_mask

if TYPE_CHECKING:
    from subquad.modeling.modeling_subquad import SubquadForCausalLM

PADDING_FREE = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments of padding-free collators; the first has all that is needed."""


def add_hooks(student: "SubquadForCausalLM") -> None:
    """Hooks the backbone of a student, and the decoder in it where that is another module (OPT)."""
    for module in {student.base_model: None, student.get_decoder(): None}:
        hook = BackboneHook(student, inspect.signature(module.forward))
        module.register_forward_pre_hook(hook, with_kwargs=True)


class BackboneHook:
    """Replaces the arguments of a backbone with this signature of `forward`, unless they are the student's own."""

    def __init__(self, student: "SubquadForCausalLM", signature: inspect.Signature):
        self.student, self.signature = student, signature

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if isinstance(mask := kwargs.get("attention_mask"), Tensor) and is_own_mask(mask):
            return args, kwargs
        own = [name for name in self.signature.parameters if name != "self"]
        given = {**dict(zip(own, args, strict=False)), **kwargs}
        cu_seqlens, *_ = [given.pop(name, None) for name in PADDING_FREE]
        caches = [
            given.pop(name, None) for name in (CACHE_ARGUMENT, "past_key_values")
        ]  # one name, or a new and an old
        described = self.student.describe_call(
            given.get("input_ids"),
            given.get("inputs_embeds"),
            given.get("attention_mask"),
            given.get("position_ids"),
            next((cache for cache in caches if cache is not None), None),
            cu_seqlens,
            given.get("use_cache"),
        )
        return (), {**given, **described}
