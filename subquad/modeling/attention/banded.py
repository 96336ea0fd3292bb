"""Attention in blocks: the heads of one window, on blocks of queries with the keys that they can see.

Sequences are rows of slots: the tokens in the cache, then the new tokens, both without padding between them. A slot has
the number of its document (0: it is empty) and its token's position in the document.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from subquad.mixers.norms import upcast
from subquad.modeling.attention.sinks import first_slots
from subquad.modeling.cache import HeadGroup
from subquad.modeling.masks import DocIdsAndPositions, padding_sees_itself, to_additive, visible_keys

SEGMENT_TOKENS = 4096
"""Largest number of queries of a row in one call of the teacher's implementation: a bound on memory."""


@dataclass
class Slots:
    """The slots of a group of heads in one forward pass.

    queries: `[B, h, T, K]`. keys, values: `[B, g, S, D]`, the cached ones, then T new ones. layout: documents and
    positions of the slots, `[1 or B, S]`; None: no padding, one document a row. past_tokens: in the cache;
    tokens_before: the real ones, `[B, 1]`, with a layout.
    """

    group: HeadGroup
    queries: Tensor
    keys: Tensor
    values: Tensor
    layout: DocIdsAndPositions | None
    past_tokens: int
    tokens_before: Tensor | None = None


def forward_globals(module: nn.Module) -> dict[str, Any]:
    """The names that a module's forward can use: those of the file that defines it."""
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {})


class HeadSubset:
    """Some heads of an attention module: its attributes, those with one number a query head cut to these heads."""

    def __init__(self, module: nn.Module, heads: Tensor, num_heads: int):
        self._module, self._heads, self._num_heads = module, heads, num_heads

    def __getattr__(self, name: str) -> Any:
        return self.cut(getattr(self._module, name))

    def cut(self, value: Any) -> Any:
        return value[self._heads] if isinstance(value, Tensor) and value.shape == (self._num_heads,) else value


class Implementation:
    """The teacher's own attention implementation for the heads of one `group`.

    limit: the teacher's own window. eager: whether to call the module's eager function, else sdpa. queries_per_kv:
    query heads of a key/value head. repeats: how often the module repeats keys and values itself. num_kv_heads: of all
    groups. kwargs: what the module passes.
    """

    heads: Tensor | None = None
    """The indices of the query heads; None: all."""

    def __init__(
        self,
        module: nn.Module,
        group: HeadGroup,
        limit: int | None,
        eager: bool,
        queries_per_kv: int,
        repeats: int,
        num_kv_heads: int,
        kwargs: dict[str, Any],
        device: torch.device,
    ):
        self.module: Any = module
        self.group, self.limit, self.eager, self.repeats, self.kwargs = group, limit, eager, repeats, kwargs
        self.function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if eager:
            self.function = forward_globals(module).get("eager_attention_forward", self.function)
        if len(group.kv_heads) < num_kv_heads:
            self.heads = group.queries(queries_per_kv, device)
            self.module = subset = HeadSubset(module, self.heads, queries_per_kv * num_kv_heads)
            self.kwargs = {name: subset.cut(value) for name, value in kwargs.items()}

    def queries(self, query: Tensor) -> Tensor:
        return query if self.heads is None else query.index_select(1, self.heads)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, T, H, V]`; mask: bool `[B, 1, T, S]`, True where a query sees a key; None: causal."""
        if self.repeats > 1:
            k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        if self.eager:
            if mask is None:
                ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
                mask = ones.tril(k.shape[2] - q.shape[2])[None, None]
            mask = to_additive(mask, q.dtype)
        return self.function(self.module, q, k, v, mask, **self.kwargs)[0]


class LogSumExp:
    """As an `Implementation`, but gives the log-sum-exp of the scores of each query, `[B, T, H, 1]`, in float32 at
    least, soft caps and learned sinks included where the module passes them as `softcap` and `s_aux`; values are not
    read. relative: of the scores less the largest, learned sinks included."""

    def __init__(self, implementation: Implementation, relative: bool = False):
        self.relative = relative
        self.group, self.limit, self.kwargs = implementation.group, implementation.limit, implementation.kwargs

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        T, S = q.shape[2], k.shape[2]
        scores = upcast((q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT).flatten(1, 2))
        scores = scores * (self.kwargs.get("scaling") or q.shape[-1] ** -0.5)
        if cap := self.kwargs.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~mask, -torch.inf)
        if (sinks := self.kwargs.get("s_aux")) is not None:
            sink_scores = sinks.to(scores.dtype).view(-1, 1, 1).expand(len(scores), -1, T, -1)
            scores = torch.cat((scores, sink_scores), -1)
        lse = scores.logsumexp(-1)
        lse = lse - scores.amax(-1) if self.relative else lse
        return lse.transpose(1, 2).unsqueeze(-1)


Runner = Implementation | LogSumExp


def attend(run: Runner, q: Tensor, k: Tensor, v: Tensor, layout: DocIdsAndPositions | None) -> Tensor:
    """Attention of the last T of S slots, `[B, T, H, V]`.

    layout: documents and positions of the slots, `[1 or B, S]`; None: token i is in slot i, in one document.
    """
    T, S, group = q.shape[2], k.shape[2], run.group
    if layout is None:
        if T == S <= min(S if window is None else window for window in (group.window, run.limit)):
            return run(q, k, v, None)
        layout = torch.ones(1, S, dtype=torch.long, device=q.device), torch.arange(S, device=q.device)[None]
    if group.window is not None and group.window - 1 + block_length(group.window) < S:
        return attend_in_blocks(run, q, k, v, layout)
    outputs = []
    for start in range(S - T, S, SEGMENT_TOKENS):
        end = min(S, start + SEGMENT_TOKENS)
        docs, positions = (x[:, :end] for x in layout)
        queries = docs[:, start:], positions[:, start:]
        mask = visible_keys(queries, (docs, positions), group.window, group.sinks, run.limit)
        mask |= padding_sees_itself(queries[0], end)
        outputs.append(run(q[:, :, start - S + T : end - S + T], k[:, :, :end], v[:, :, :end], mask.unsqueeze(1)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def block_length(window: int) -> int:
    """Queries of a block: about half as many as the window has tokens, a power of two from 64 to 256 (measured)."""
    return min(256, max(64, 1 << ((window - 1) // 2).bit_length()))


def attend_in_blocks(run: Runner, q: Tensor, k: Tensor, v: Tensor, layout: DocIdsAndPositions) -> Tensor:
    """As `attend`: the keys of a block of queries are those of a range of slots, and the first `sinks` tokens of the
    document in which the range begins. Documents that begin later have their first tokens in the range."""
    group, T, S = run.group, q.shape[2], k.shape[2]
    assert group.window is not None
    C, L = block_length(group.window), group.window - 1
    blocks = -(-T // C)
    first = S - T - L  # the slot in which the range of the first block begins
    edges = (max(0, -first), blocks * C - T)

    def ranges(x: Tensor, dim: int, empty: int = 0) -> Tensor:
        """The ranges of all blocks, as the axes `blocks` at `dim` and L + C as the last."""
        x = x.narrow(dim, max(0, first), S - max(0, first))
        return F.pad(x, (*[0, 0] * (x.dim() - 1 - dim), *edges), value=empty).unfold(dim, L + C, C)

    docs, positions = (ranges(x, 1, empty) for x, empty in zip(layout, (0, -1), strict=True))
    starts = first + C * torch.arange(blocks, device=q.device)
    sinks = first_slots(layout[0], starts.clamp_min(0), group.sinks)  # [1 or B, blocks, sinks]
    sink_docs, sink_positions = (x.gather(1, sinks.flatten(1)).view_as(sinks) for x in layout)
    sink_docs = sink_docs.masked_fill(sinks >= starts[:, None], 0)  # the range has them itself
    key_docs, key_positions = torch.cat((sink_docs, docs), -1), torch.cat((sink_positions, positions), -1)
    keys, values, queries = ranges(k, 2), ranges(v, 2), F.pad(q, (0, 0, 0, edges[1])).unflatten(2, (blocks, C))
    outputs = []
    for part in torch.arange(blocks).split(max(1, SEGMENT_TOKENS // C)):
        some = slice(int(part[0]), int(part[-1]) + 1)
        block = docs[:, some, L:], positions[:, some, L:]
        mask = visible_keys(block, (key_docs[:, some], key_positions[:, some]), group.window, group.sinks, run.limit)
        mask |= padding_sees_itself(block[0], mask.shape[-1])
        mask = mask.expand(len(q), *mask.shape[1:]).flatten(0, 1).unsqueeze(1)
        block_keys, block_values = (
            with_sinks(x, x_ranges[:, :, some], sinks[:, some]) for x, x_ranges in ((k, keys), (v, values))
        )
        o = run(queries[:, :, some].transpose(1, 2).flatten(0, 1), block_keys, block_values, mask)
        outputs.append(o.unflatten(0, (len(q), len(part))).flatten(1, 2))
    return torch.cat(outputs, 1)[:, :T]


def with_sinks(x: Tensor, ranges: Tensor, sinks: Tensor) -> Tensor:
    """The slots `sinks: [1 or B, blocks, n]` of `x: [B, G, S, D]`, then the `ranges: [B, G, blocks, D, L]`; the blocks
    become rows of the batch: `[B * blocks, G, n + L, D]`."""
    index = sinks.flatten(1)[:, None, :, None].expand(len(x), x.shape[1], -1, x.shape[3])
    x_sinks = x.gather(2, index).unflatten(2, sinks.shape[1:])
    return torch.cat((x_sinks, ranges.transpose(-1, -2)), 3).transpose(1, 2).flatten(0, 1)
