"""The decode step of a student without attention as one compiled graph, `generate(..., compile_config=...)`; on a
GPU one CUDA graph with the mode "reduce-overhead", the default of `CompileConfig`.

The graph maps tokens, positions and states to logits and new states. How many tokens the cache has seen is no part of
it, so that it is compiled once for each batch size and dtype, and no tensor in it grows with the context.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.mixers.states import State
from subquad.modeling.cache import CACHE_ARGUMENT, RecurrentCacheLayer, SubquadCache

if TYPE_CHECKING:
    from subquad.modeling.modeling_subquad import SubquadForCausalLM

WITHOUT_EFFECT = ("return_dict", "logits_to_keep", "use_cache")
"""Arguments of `forward` that change nothing in a step of one token with a cache."""


class CompiledStep:
    """Called as the student, with the same results. Compiles and runs the graph where a call gives one new token a row
    and a cache that is not empty; other calls, such as that of the prompt, are the student's own."""

    def __init__(self, student: "SubquadForCausalLM", config: CompileConfig):
        self.student, self.config = student, config
        self.graph = torch.compile(self.run, **config.to_dict())

    def __call__(
        self,
        input_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if cache is None else cache
        kwargs |= {"input_ids": input_ids, CACHE_ARGUMENT: cache}
        if not self.is_step(kwargs):
            return self.student(**kwargs)
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        described = self.student.describe_call(input_ids, None, mask, position_ids, cache)
        mask, position_ids = described["attention_mask"], described["position_ids"]
        if mask.dtype == torch.bool and mask.shape[-1]:
            return self.student(**kwargs)  # padding among the new tokens
        torch.compiler.cudagraph_mark_step_begin()
        logits, states = self.graph(
            kwargs["input_ids"], mask, position_ids, contiguous(layer.states for layer in cache.layers)
        )
        if logits.is_cuda:  # the next run of a CUDA graph overwrites what this one returns
            logits, states = logits.clone(), copied(states)
        for layer, state in zip(cache.layers, states, strict=True):
            layer.update_states(state, 1)
        return CausalLMOutputWithPast(logits=logits, **{CACHE_ARGUMENT: cache})

    def is_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether the arguments of a call are those of a step that the graph computes."""
        ids, cache = kwargs.get("input_ids"), kwargs.get(CACHE_ARGUMENT)
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        known = {"input_ids", "attention_mask", "position_ids", CACHE_ARGUMENT, *WITHOUT_EFFECT}
        if ids is None or ids.shape[1] != 1 or cache is None or not given <= known or self.student.training:
            return False
        return is_recurrent(cache) and all(layer.states and not layer.record_past for layer in cache.layers)

    def run(
        self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, states: tuple[State, ...]
    ) -> tuple[Tensor, tuple[State, ...]]:
        cache: Any = self.student.new_cache()
        for layer, state in zip(cache.layers, states, strict=True):
            layer.states = state
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        logits = self.student.base(**inputs, use_cache=True, **{CACHE_ARGUMENT: cache}).logits
        return logits, contiguous(layer.states for layer in cache.layers)


def contiguous(states: Iterable[State]) -> tuple[State, ...]:
    """The states with the strides that those of all steps have, since a graph is compiled for strides."""
    return tuple(tuple(x.contiguous() for x in state) for state in states)


def copied(states: tuple[State, ...]) -> tuple[State, ...]:
    """Copies of all states in few launches, since launches bound the speed of decoding."""
    copies = tuple(tuple(torch.empty_like(x) for x in state) for state in states)
    torch._foreach_copy_([x for state in copies for x in state], [x for state in states for x in state])
    return copies


def is_recurrent(cache: SubquadCache) -> bool:
    """Whether the tensors of a cache have the same shapes after any number of tokens: all layers are mixers."""
    return all(type(layer) is RecurrentCacheLayer for layer in cache.layers)
