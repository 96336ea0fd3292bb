"""Traces the attention of a model in one forward pass: queries, keys, values, and inputs and outputs of submodules.
Finds a table of learned positions in the same way.

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

from subquad.modeling.attention.activations import LayerActivations, record_modules
from subquad.utils import UserError, as_user_error, is_out_of_memory

TRACED = "subquad_traced"
"""Name of the attention implementation that records its calls."""
TRACE_BATCH, TRACE_LENGTH = 5, 13
"""Shape of the traced token ids. Both are primes and unusual head counts, so that axes can be told apart by size."""


def cannot_linearize(name: str, reason: str) -> UserError:
    return UserError(f"{name} cannot be linearized: {reason}")


def random_tokens(model: PreTrainedModel) -> Tensor:
    """Token ids `[TRACE_BATCH, TRACE_LENGTH]`, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment, union-attr]
    return torch.randint(vocabulary, (TRACE_BATCH, TRACE_LENGTH), generator=generator).to(model.device)


@dataclass
class AttentionCall:
    """One call of attention in a traced forward pass.

    query, key, value, mask, attention_kwargs: arguments of the attention function; `[B, H, T, D]`.
    attn_output: its result, `[B, T, H, V]`. probabilities: `[B, H, T, T]`, if the model computes them itself.
    window: tokens that a query attends to, itself included; None for all. is_chunked: they are a fixed chunk instead.
    forward, submodules: what the module's forward, and its submodules by name, took and returned.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attn_output: Tensor
    mask: Tensor | None = None
    probabilities: Tensor | None = None
    window: int | None = None
    is_chunked: bool = False
    attention_kwargs: dict[str, Any] = field(default_factory=dict)
    forward: LayerActivations = field(init=False)
    submodules: dict[str, LayerActivations] = field(init=False)


_calls: ContextVar[list[AttentionCall]] = ContextVar("calls of the trace that runs in this thread")


def _traced_attention(module, query, key, value, attention_mask, **kwargs):
    plain = {name: arg for name, arg in kwargs.items() if name not in ("softcap", "s_aux")}
    attn_output = sdpa_attention_forward(module, query, key, value, attention_mask, **plain)[0]
    # Some models pass the window to the mask only.
    window, is_chunked = getattr(attention_mask, "subquad_window", (kwargs.get("sliding_window"), False))
    call = AttentionCall(module, query, key, value, attn_output, attention_mask, None, window, is_chunked, kwargs)
    _calls.get().append(call)
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

    The call is attributed to the innermost running module, the last of `running`.
    """

    MATMULS = torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm
    SOFTMAXES = torch.softmax, Tensor.softmax, nn.functional.softmax

    def __init__(self, calls: list[AttentionCall], running: list[nn.Module]):
        super().__init__()
        self.calls, self.running = calls, running
        self.query_and_key: tuple[Tensor, Tensor] | None = None
        self.probabilities: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            q, k, v, mask = (*args, None)[:4]
            mask = (kwargs or {}).get("attn_mask", mask)
            self.calls.append(AttentionCall(self.running[-1], q, k, v, out.transpose(1, 2), mask))
        elif func in self.SOFTMAXES:
            self.probabilities = out if self.query_and_key is not None else None
        elif func in self.MATMULS and self.probabilities is not None and same_values(args[0], self.probabilities):
            tensors = (*self.query_and_key, args[1], out, self.probabilities)  # type: ignore[misc]
            q, k, v, o, p = (x if x.dim() == 4 else x.unflatten(0, (TRACE_BATCH, -1)) for x in tensors)
            self.calls.append(AttentionCall(self.running[-1], q, k, v, o.transpose(1, 2), probabilities=p))
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
    calls: list[AttentionCall] = []
    running: list[nn.Module] = []
    token = _calls.set(calls)
    failure = f"{type(model).__name__} cannot be linearized: its forward pass failed during tracing"
    try:
        with as_user_error(failure), record_modules(model.modules(), running) as recorded:
            with attention_implementation(model, TRACED):
                model(input_ids=input_ids, use_cache=False)
            if not calls:
                with attention_implementation(model, "eager"), EagerAttentionTracer(calls, running):
                    model(input_ids=input_ids, use_cache=False)
    finally:
        _calls.reset(token)
    for call in calls:
        call.forward = recorded[call.module]
        parts = call.module.named_modules()
        call.submodules = {path: recorded[part] for path, part in parts if path and part in recorded}
    return calls


@torch.no_grad()
def find_max_learned_positions(model: PreTrainedModel) -> int | None:
    """Number of positions in `model`'s table of learned positions; None where it has none.

    The table is the embedding that returns consecutive rows of its weight for the tokens of a row.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    with record_modules(tables) as recorded:
        if tables:
            model(input_ids=random_tokens(model), use_cache=False)
    for table, activations in recorded.items():
        if activations.output.shape[-2] != TRACE_LENGTH:
            continue
        rows = activations.output.flatten(0, -2)[:TRACE_LENGTH]
        weight: Tensor = table.weight  # type: ignore[assignment]
        first = int((weight - rows[0]).abs().sum(-1).argmin())  # OPT reserves the first rows for padding
        if torch.equal(weight[first : first + TRACE_LENGTH], rows):
            return len(weight) - first
    return None


def is_shape_mismatch(error: RuntimeError) -> bool:
    """Whether torch raised `error` because the shapes of tensors do not fit together."""
    return not is_out_of_memory(error) and re.search("size|shape", str(error), re.IGNORECASE) is not None


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes."""
    return a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())
