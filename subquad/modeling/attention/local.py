"""Local attention: each key/value head sees its own window of tokens and the first tokens of the document.

The teacher's attention module computes queries, keys and values, and calls an attention implementation of this module.
This one calls the teacher's own implementation (so that soft caps, learned sinks and scaling stay) once for all heads
of one window, on blocks of queries with the keys that they can see: time and memory are O(T * window).

Sequences are rows of slots: the tokens in the cache, then the new tokens, both without padding between them. A slot has
the number of its document (0: it is empty) and its token's position in the document.
"""

import copy
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from subquad.modeling.attention.banded import Implementation, LogSumExp, Runner, Slots, attend, forward_globals
from subquad.modeling.attention.sinks import RotaryTokens, Rotation, with_sink_channels
from subquad.modeling.cache import HeadGroup, LocalCacheLayer
from subquad.modeling.masks import (
    DocIdsAndPositions,
    additive_mask,
    doc_ids_and_positions,
    numbers_of_heads,
)
from subquad.modeling.rollback import LayerCall, mask_of, run_recorded, tokens_of

LOCAL = "subquad_local"
"""Name of the attention implementation."""
NO_WINDOW = 2**62


@dataclass
class LocalCall:
    """One forward pass of an attention layer.

    groups: heads of one window each. limit: the teacher's own window. implementation: the teacher's own one.
    attention_mask: the student's mask (`subquad.modeling.masks`). cache_layer: None without a cache. rotary: layout,
    cos and sin `[1 or B, T, R]` of the rotary embedding of the new tokens; None: there is none, or it is unknown.
    """

    groups: Sequence[HeadGroup]
    limit: int | None
    implementation: str
    attention_mask: Tensor | None
    cache_layer: LocalCacheLayer | None
    rotary: tuple[str, Tensor, Tensor] | None = None
    far: Any = None
    """A `near_far.FarCall`, which merges the memory's output into that of heads with a window of their own."""


_call: ContextVar[LocalCall] = ContextVar("the attention layer that runs in this thread")


def use_local_attention(attention: nn.Module) -> None:
    """Makes a module that calls an attention implementation call that of this file, in a configuration of its own."""
    if calls_interface(attention):
        attention.config = copy.copy(attention.config)  # type: ignore[assignment, arg-type]
        attention.config._attn_implementation_internal = LOCAL  # type: ignore[union-attr]


def calls_interface(attention: nn.Module) -> bool:
    """Whether a module's forward gets its attention function from `transformers`' registry."""
    return hasattr(attention, "config") and "ALL_ATTENTION_FUNCTIONS" in forward_globals(attention)


def uses_local_attention(attention: nn.Module) -> bool:
    return getattr(getattr(attention, "config", None), "_attn_implementation", None) == LOCAL


def run_local(attention: nn.Module, call: LocalCall, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of the module's forward, `attention_mask` excepted from its arguments, with local attention."""
    token = _call.set(call)
    try:
        return attention(*args, attention_mask=None, **kwargs)
    finally:
        _call.reset(token)


# ---------------------------------------------------------------------- the attention implementation


def local_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query `[B, H, T, K]`, key `[B, G, T, K]`, value `[B, G, T, V]` of the new tokens; returns `[B, T, H, V]`."""
    call = _call.get()
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
    return run_recorded(call.cache_layer, LocalPass(module, call, query, key, value, kwargs)), None


@dataclass
class LocalPass(LayerCall):
    """A pass of local attention over new tokens; arguments as of `local_attention_forward`."""

    module: nn.Module
    call: LocalCall
    query: Tensor
    key: Tensor
    value: Tensor
    kwargs: dict[str, Any]

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]
        return self.call.attention_mask

    @property
    def num_tokens(self) -> int:
        return self.query.shape[2]

    def narrow(self, start: int, stop: int) -> "LocalPass":
        T, call = self.num_tokens, self.call
        rotary = call.rotary
        if rotary is not None and rotary[1].shape[1] == T:
            rotary = (rotary[0], tokens_of(rotary[1], start, stop), tokens_of(rotary[2], start, stop))
        far = None if call.far is None else call.far.narrow(start, stop)
        mask = mask_of(call.attention_mask, T, start, stop)
        query, key, value = (tokens_of(x, start, stop, 2) for x in (self.query, self.key, self.value))
        call = replace(call, attention_mask=mask, rotary=rotary, far=far)
        return LocalPass(self.module, call, query, key, value, self.kwargs)

    def __call__(self) -> Tensor:
        return attend_locally(self.module, self.call, self.query, self.key, self.value, self.kwargs)


def attend_locally(
    module: nn.Module, call: LocalCall, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Arguments and result as of `local_attention_forward`."""
    B, H, T, _ = query.shape
    cache, mask = call.cache_layer, call.attention_mask
    kv_heads = sum(len(group.kv_heads) for group in call.groups)
    repeats = key.shape[1] // kv_heads  # some modules repeat keys and values themselves
    if repeats > 1:
        key, value = key[:, ::repeats], value[:, ::repeats]
    order, new = new_tokens(mask, cache, B, T, query.device)
    if order is not None:
        query, key, value = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in (query, key, value))
    rotary = rotary_tokens(call, order, new, T)
    out = query.new_empty(B, T, H, value.shape[-1])
    if call.far is not None:
        call.far.begin(query, key, value, order)
    for index, group in enumerate(call.groups):
        eager, device = call.implementation == "eager", query.device
        runner = Implementation(module, group, call.limit, eager, H // kv_heads, repeats, kv_heads, kwargs, device)
        o = group_output(call, runner, index, (query, key, value), new, rotary)
        out = o if runner.heads is None else out.index_copy(2, runner.heads, o)
    if cache is not None:
        cache.advance(T, new)
    if order is not None:
        out = out.gather(1, order.argsort(1)[:, :, None, None].expand_as(out))
    return out


def group_output(
    call: LocalCall,
    runner: Implementation,
    index: int,
    qkv: tuple[Tensor, Tensor, Tensor],
    new: DocIdsAndPositions | None,
    rotary: RotaryTokens | None,
) -> Tensor:
    """The output of group `index` of heads, `[B, T, heads, V]`. qkv: of all heads and the new tokens."""
    query, key, value = qkv
    group, cache, T = call.groups[index], call.cache_layer, query.shape[2]
    q, k, v, layout = runner.queries(query), group.select(key), group.select(value), new
    past_tokens = 0 if cache is None else cache.num_tokens
    if cache is not None:
        k, v, layout = cache.append(index, k, v, new)
    slots = Slots(group, q, k, v, None if new is None else layout, past_tokens)
    if cache is not None and new is not None:
        slots.tokens_before = cache.tokens_before(new)
    expired = group.sinks > 0 and call.limit is not None and past_tokens + T > call.limit
    one_token = T == 1 and new is None and not expired  # the cache holds what the token sees, and no more
    rotation, last = rotation_of_sinks(rotary, group, cache, len(q)), group.last_full or 0
    if rotary is not None and rotation is not None and one_token:
        k = rotary.with_moved_sinks(k, group.sinks, rotation)
    elif rotary is not None and rotation is not None:
        runner.kwargs = {**runner.kwargs, "scaling": runner.kwargs.get("scaling") or q.shape[-1] ** -0.5}
        q, k, v = with_sink_channels(q, rotary.moved(q, last, rotation), k, v, group.sinks, slots.layout)

    def run(function: Runner, values: Tensor) -> Tensor:
        return function(q, k, values, None) if one_token else attend(function, q, k, values, layout)

    o = run(runner, v)[..., : value.shape[-1]]
    if call.far is None or not group.memory:
        return o
    return call.far(index, slots, runner, o, lambda relative: run(LogSumExp(runner, relative), v[..., :1]).squeeze(-1))


def rotary_tokens(call: LocalCall, order: Tensor | None, new: DocIdsAndPositions | None, T: int) -> RotaryTokens | None:
    """The rotary embedding of T new tokens in the order of `new_tokens`; None if it is unknown."""
    if call.rotary is None or call.rotary[1].shape[1] != T:
        return None
    style, cos, sin = call.rotary
    if order is not None:
        index = order[..., None].expand(-1, -1, cos.shape[-1])
        cos, sin = (x.expand(len(order), -1, -1).gather(1, index) for x in (cos, sin))
    past_tokens = 0 if call.cache_layer is None else call.cache_layer.num_tokens
    return RotaryTokens(style, cos, sin, past_tokens, None if new is None else new[1])


def rotation_of_sinks(
    rotary: RotaryTokens | None, group: HeadGroup, cache: LocalCacheLayer | None, B: int
) -> Rotation | None:
    """cos and sin at the position as from which late queries see the sinks of a group; None if no query is late."""
    last = group.last_full
    if last is None or rotary is None:
        return None
    earlier = None if cache is None else cache.sink_rotations.get(last)
    rotation = rotary.at(last, earlier)
    if rotation is None:
        return None
    if cache is not None and rotation is not earlier:
        cache.sink_rotations[last] = rotary.of_last_tokens(rotation, B)
    return rotation if rotary.reaches(last) else None


def new_tokens(
    mask: Tensor | None, cache: LocalCacheLayer | None, B: int, T: int, device: torch.device
) -> tuple[Tensor | None, DocIdsAndPositions | None]:
    """The order that moves the padding of the last T tokens to their end, `[B, T]`, and the tokens' documents and
    positions in this order. None and None: no padding, one document a row, in the cache too."""
    plain = mask is None or not mask.shape[-1] or mask.dtype == torch.uint8
    if plain and (cache is None or cache.real_tokens is None):
        return None, None
    docs, positions = layout = new_layout(None if plain else mask, cache, B, T, device)
    if plain or T == 1:
        return None, layout
    order = (docs == 0).long().argsort(dim=1, stable=True)
    return order, (docs.gather(1, order), positions.gather(1, order))


def new_layout(
    mask: Tensor | None, cache: LocalCacheLayer | None, B: int, T: int, device: torch.device
) -> DocIdsAndPositions:
    """Documents and positions of the last T tokens, `[B, T]`."""
    new = None if mask is None or mask.dtype == torch.uint8 else mask[..., -T:]
    docs, positions = doc_ids_and_positions(new, B, T, device)
    if cache is None:
        return docs, positions
    past = cache.num_tokens if cache.real_tokens is None else cache.real_tokens.unsqueeze(1)
    return docs, torch.where(docs > 0, positions + past, -1)


def joined_mask(call: LocalCall, x: Tensor, num_heads: int) -> Tensor:
    """The additive mask `[B, H, T, S]` for attention modules that compute attention themselves, of the cached and new
    tokens `x: [B, T, hidden]`. Such modules get all keys from the cache; the mask grows with T * S."""
    (B, T), cache = x.shape[:2], call.cache_layer
    keys = new = new_layout(call.attention_mask, cache, B, T, x.device)
    if cache is not None:
        cache.joined_tokens = new
        layouts: Any = [cache.layout(i, T, new, x.device) for i in range(len(call.groups))]
        slots = max(docs.shape[1] for docs, _ in layouts)
        order = torch.cat([group.index(x.device) for group in call.groups]).argsort()
        sizes = torch.tensor([len(group.kv_heads) for group in call.groups], device=x.device)
        repeats = num_heads // len(order)
        keys = tuple(  # type: ignore[assignment]
            torch.stack([F.pad(side, (slots - side.shape[1], 0), value=empty) for side in sides], 1)
            .repeat_interleave(sizes, 1)
            .index_select(1, order)
            .repeat_interleave(repeats, 1)
            for sides, empty in zip(zip(*layouts, strict=True), (0, -1), strict=True)
        )
    sinks = max(group.sinks for group in call.groups)
    window = numbers_of_heads(head_windows(call.groups, num_heads), x.device)
    return additive_mask(new, keys, window, sinks, call.limit, x.dtype)


def head_windows(groups: Sequence[HeadGroup], num_heads: int) -> tuple[int, ...]:
    """The window of each query head; a number larger than any context for heads without."""
    windows = {head: group.window or NO_WINDOW for group in groups for head in group.kv_heads}
    return tuple(windows[head * len(windows) // num_heads] for head in range(num_heads))


AttentionInterface.register(LOCAL, local_attention_forward)
AttentionMaskInterface.register(LOCAL, sdpa_mask)
