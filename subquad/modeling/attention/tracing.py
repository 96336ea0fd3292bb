"""Traces the attention of a model in one forward pass: queries, keys, values, and inputs and outputs of submodules.

Nearly every model of `transformers` passes queries, keys and values to a registered attention function. Tracing
registers one that records its arguments. Older models compute softmax(q k^T) v with torch functions; for them a
`TorchFunctionMode` records the matrix products and the softmax. `discovery.py` interprets the records.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from subquad.utils import UserError, is_out_of_memory

TRACED = "subquad_traced"
"""Name of the attention implementation that records its calls."""
TRACE_BATCH, TRACE_LENGTH = 5, 13
"""Shape of the traced token ids. Both are primes and unusual head counts, so that axes can be told apart by size."""


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a decoder layer or an attention module."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@dataclass
class AttentionCall:
    """One call of attention in a traced forward pass.

    query, key, value, mask, attention_kwargs: arguments of the attention function; `[B, H, T, D]`.
    attn_output: its result, `[B, T, H, V]`. probabilities: `[B, H, T, T]`, if the model computes them itself.
    args, kwargs, module_output: arguments and result of the attention module's forward.
    submodule_io: input and output of each submodule, by name.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attn_output: Tensor
    mask: Tensor | None = None
    probabilities: Tensor | None = None
    attention_kwargs: dict[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    submodule_io: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    module_output: Any = None

    @property
    def hidden_states(self) -> Tensor:
        return hidden_states_of(self.args, self.kwargs)

    @property
    def window(self) -> int | None:
        """Tokens that a query attends to, itself included; None for all. Some models pass it to the mask only."""
        return getattr(self.mask, "subquad_window", (self.attention_kwargs.get("sliding_window"), False))[0]

    @property
    def is_chunked(self) -> bool:
        """Whether attention is restricted to fixed chunks of `window` tokens, instead of a sliding window."""
        return getattr(self.mask, "subquad_window", (None, False))[1]

    @property
    def position_embeddings(self) -> tuple[Tensor, Tensor] | None:
        return self.kwargs.get("position_embeddings")


_calls: ContextVar[list[AttentionCall]] = ContextVar("calls of the trace that runs in this thread")


def _traced_attention(module, query, key, value, attention_mask, **kwargs):
    plain = {name: arg for name, arg in kwargs.items() if name not in ("softcap", "s_aux")}
    attn_output = sdpa_attention_forward(module, query, key, value, attention_mask, **plain)[0]
    _calls.get().append(AttentionCall(module, query, key, value, attn_output, attention_mask, attention_kwargs=kwargs))
    return attn_output, None


def _traced_mask(*args, **kwargs):
    """The SDPA mask, always built, with `subquad_window = (size, is_chunked)`: the traced text can be shorter than the
    window, so that the mask's values do not show it."""
    size = kwargs.get("local_size")
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    if mask is not None and size is not None:
        # Token 2 * size sees token size + 1 in a sliding window; with chunks it starts the third chunk and does not.
        indices = (torch.tensor(n, device=mask.device) for n in (0, 0, 2 * size, size + 1))
        is_chunked = size > 1 and not bool(kwargs["mask_function"](*indices))
        mask.subquad_window = size, is_chunked  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(TRACED, _traced_attention)
AttentionMaskInterface.register(TRACED, _traced_mask)


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Sets the attention implementation of `model` and its submodules to `name`; restores the previous ones on exit."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    before = [(config, config._attn_implementation) for config in configs.values()]  # type: ignore[union-attr]
    try:
        for config, _ in before:
            config._attn_implementation = name  # type: ignore[union-attr]
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation  # type: ignore[union-attr]


class EagerAttentionTracer(TorchFunctionMode):
    """Adds to `calls` what a model computes with torch calls: softmax(q k^T) v, or `scaled_dot_product_attention`.

    The call is attributed to the innermost running module, the last of `module_stack`.
    """

    MATMULS = torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm
    SOFTMAXES = torch.softmax, Tensor.softmax, nn.functional.softmax

    def __init__(self, calls: list[AttentionCall], module_stack: list[nn.Module]):
        super().__init__()
        self.calls, self.module_stack = calls, module_stack
        self.query_and_key: tuple[Tensor, Tensor] | None = None
        self.probabilities: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            q, k, v, mask = (*args, None)[:4]
            mask = (kwargs or {}).get("attn_mask", mask)
            self.calls.append(AttentionCall(self.module_stack[-1], q, k, v, out.transpose(1, 2), mask))
        elif func in self.SOFTMAXES:
            self.probabilities = out if self.query_and_key is not None else None
        elif func in self.MATMULS and self.probabilities is not None and same_values(args[0], self.probabilities):
            tensors = (*self.query_and_key, args[1], out, self.probabilities)  # type: ignore[misc]
            q, k, v, o, p = (x if x.dim() == 4 else x.unflatten(0, (TRACE_BATCH, -1)) for x in tensors)
            self.calls.append(AttentionCall(self.module_stack[-1], q, k, v, o.transpose(1, 2), probabilities=p))
            self.query_and_key = self.probabilities = None
        elif func in self.MATMULS and out.shape[-2:] == (TRACE_LENGTH, TRACE_LENGTH):
            self.query_and_key = args[0], args[1].transpose(-1, -2)
        return out


@torch.no_grad()
def trace_attention(model: PreTrainedModel, input_ids: Tensor) -> list[AttentionCall]:
    """Runs `model` once on `input_ids: [B, T]` and returns its calls of attention, in order.

    Raises:
        UserError: the forward pass failed, and not for lack of memory.
    """
    inputs: dict[nn.Module, tuple[tuple, dict[str, Any]]] = {}
    outputs: dict[nn.Module, Any] = {}
    module_stack: list[nn.Module] = []

    def enter(module, args, kwargs):
        inputs[module] = args, kwargs
        module_stack.append(module)

    def leave(module, args, output):
        outputs[module] = output
        module_stack.pop()

    hooks: list[Any] = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    calls: list[AttentionCall] = []
    token = _calls.set(calls)
    try:
        with attention_implementation(model, TRACED):
            model(input_ids=input_ids, use_cache=False)
        if not calls:
            with attention_implementation(model, "eager"), EagerAttentionTracer(calls, module_stack):
                model(input_ids=input_ids, use_cache=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{type(model).__name__} cannot be linearized: its forward pass failed during tracing: {reason[0]}"
        ) from error
    finally:
        _calls.reset(token)
        for hook in hooks:
            hook.remove()
    for call in calls:
        (call.args, call.kwargs), call.module_output = inputs[call.module], outputs[call.module]
        for name, submodule in call.module.named_modules():
            if name and submodule in outputs:
                args, output = inputs[submodule][0], outputs[submodule]
                if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    call.submodule_io[name] = args[0], output
    return calls


def is_shape_mismatch(error: RuntimeError) -> bool:
    """Whether torch raised `error` because the shapes of tensors do not fit together."""
    return not is_out_of_memory(error) and re.search("size|shape", str(error), re.IGNORECASE) is not None


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes."""
    return a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())
