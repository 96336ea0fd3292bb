"""The cache of a student: the state of every mixer, and keys and values of every layer that keeps attention.

A `DynamicCache` of `transformers` does not fit. It counts tokens only where a layer keeps keys, and it takes a layer of
linear attention without a convolution for an empty one. So these classes count tokens, and hold a mixer's states as a
tuple of tensors.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.mixers import AttentionSpec
from subquad.modeling.masks import DocIdsAndPositions
from subquad.modeling.rollback import LayerCall, Record

CACHE_ARGUMENT = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name in `transformers` of the cache that a model takes and returns: "cache" since 5.24."""


class RecurrentCacheLayer(DynamicLayer):
    """The states of one mixer, tensors with the batch as first axis, and the number of tokens that they summarize.

    No method changes a tensor in place, so copies can share them.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.states: tuple[Tensor, ...] | None = None
        self.num_tokens = 0
        self.record = Record()

    def contents(self) -> dict[str, Any]:
        """What calls replace, by attribute."""
        return {"states": self.states, "num_tokens": self.num_tokens}

    def with_types(self, contents: dict[str, Any]) -> dict[str, Any]:
        """`contents` whose keys may be strings and whose tuples may be plain, as they were."""
        return {"states": contents["states"], "num_tokens": int(contents["num_tokens"])}

    def copy(self) -> "RecurrentCacheLayer":
        """A layer with the same tensors, which records nothing."""
        new = copy.copy(self)
        vars(new).update(self.contents(), record=Record())
        return new

    def tensors(self) -> list[Tensor]:
        """All that the layer holds."""
        return list(self.states or ())

    def update_states(self, states: tuple[Tensor, ...], new_tokens: int) -> None:
        self.states, self.num_tokens = states, self.num_tokens + new_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("this layer of the cache is of a recurrent mixer and holds no keys and values")

    def get_seq_length(self, *args: Any) -> int:
        return self.num_tokens

    def reset(self) -> None:
        self.states, self.num_tokens = None, 0
        self.record.clear()

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> None:
        self.record.clear()
        if self.states is not None:
            self.states = tuple(function(s) for s in self.states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_states(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_states(lambda s: s.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_states(lambda s: s[indices])

    @property
    def record_past(self) -> bool:
        """Whether calls are recorded, so that `crop` can take their tokens back (name and use of `transformers`)."""
        return self.record.active

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.record.active = value
        self.record.clear()

    def activate_past_recording(self) -> None:
        self.record.active = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; see `SubquadCache.crop`."""
        removed = -tokens_to_remove
        self.record.check(removed)
        taken = self.record.take_back(removed)
        if taken is None:
            return
        contents, call, with_gradients = taken
        vars(self).update(contents)
        if call is not None:
            with torch.set_grad_enabled(with_gradients):
                call()


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Key/value heads that see the last `window` tokens (None: all), the query included, and the first `sinks`."""

    window: int | None
    sinks: int
    kv_heads: tuple[int, ...]
    memory: bool = False
    """Whether a mixer remembers what has left the window."""
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @property
    def capacity(self) -> int | None:
        """Largest number of tokens in the cache: the next token brings its own keys and values."""
        return None if self.window is None else self.sinks + self.window - 1

    @property
    def last_full(self) -> int | None:
        """The last position from which all tokens are seen; None without a window or without sinks."""
        return None if self.window is None or not self.sinks else self.sinks + self.window - 1

    def cached_tokens(self, context: int) -> int:
        """Number of tokens in the cache after `context` tokens."""
        return context if self.capacity is None else min(context, self.capacity)

    def index(self, device: torch.device) -> Tensor:
        """`kv_heads` as a tensor."""
        if device not in self._indices:
            self._indices[device] = torch.tensor(self.kv_heads, device=device)
        return self._indices[device]

    def queries(self, queries_per_kv: int, device: torch.device) -> Tensor:
        """The indices of the query heads of these key/value heads."""
        offsets = torch.arange(queries_per_kv, device=device)
        return (self.index(device)[:, None] * queries_per_kv + offsets).flatten()

    def select(self, x: Tensor) -> Tensor:
        """These heads of `x: [B, all key/value heads, T, D]`."""
        return x if len(self.kv_heads) == x.shape[1] else x.index_select(1, self.index(x.device))


@functools.cache
def head_groups(
    windows: tuple[int | None, ...], sinks: int, limit: int | None, memory_heads: tuple[int, ...] = ()
) -> tuple[HeadGroup, ...]:
    """Groups the key/value heads by their windows, and by whether they have a memory; with the teacher's own window,
    `limit`, heads have no larger one.

    Heads whose window is the teacher's own have no sinks, as in the teacher; they and heads that see all tokens have no
    memory.
    """
    limited = [min((w for w in (window, limit) if w is not None), default=None) for window in windows]
    kinds = [(own, own != limit and head in memory_heads) for head, own in enumerate(limited)]
    groups = []
    for window, memory in dict.fromkeys(kinds):
        heads = tuple(head for head, kind in enumerate(kinds) if kind == (window, memory))
        groups.append(HeadGroup(window, 0 if window == limit else sinks, heads, memory))
    return tuple(groups)


def cached_numbers(spec: AttentionSpec, groups: Sequence[HeadGroup], context: int) -> int:
    """How many numbers are in the cache of one sequence and layer after `context` tokens: keys and values, and the
    rotations at which late queries read sinks."""
    tokens = sum(group.cached_tokens(context) * len(group.kv_heads) for group in groups)
    lasts = {group.last_full for group in groups if group.last_full is not None and context > group.last_full}
    return tokens * (spec.head_dim + spec.value_dim) + len(lasts) * 2 * spec.rotary_channels


class LocalCacheLayer(RecurrentCacheLayer):
    """Keys and values of attention in which each group of heads keeps its own tokens: its sinks and its window.

    `states` are keys `[B, heads, n, K]` and values `[B, heads, n, V]` of each group, then, once there was padding, each
    row's number of real tokens `[B]`. In a row with fewer than n tokens the first of the n slots are empty.
    """

    def __init__(self, groups: Sequence[HeadGroup]):
        super().__init__()
        self.groups = groups
        self.sink_rotations: dict[int, tuple[Tensor, Tensor]] = {}
        """cos and sin `[B, 1, R]` of the rotary embedding at the positions that later queries need to read sinks."""
        self.joined_tokens: DocIdsAndPositions | None = None
        """Documents and positions of the tokens of the next `update`, for attention that gets joined keys from it."""
        self._next: list[Tensor] = []

    def contents(self) -> dict[str, Any]:
        return {**super().contents(), "sink_rotations": dict(self.sink_rotations)}

    def with_types(self, contents: dict[str, Any]) -> dict[str, Any]:
        rotations = {int(last): (cos, sin) for last, (cos, sin) in contents["sink_rotations"].items()}
        return {**super().with_types(contents), "sink_rotations": rotations}

    def reset(self) -> None:
        super().reset()
        self.sink_rotations = {}

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map_states(function)
        self.sink_rotations = {last: (function(cos), function(sin)) for last, (cos, sin) in self.sink_rotations.items()}

    def tensors(self) -> list[Tensor]:
        return super().tensors() + [x for rotation in self.sink_rotations.values() for x in rotation]

    @property
    def real_tokens(self) -> Tensor | None:
        return self.states[-1] if self.states is not None and len(self.states) % 2 else None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The arguments (local attention calls `append` itself), or, with `joined_tokens`, the keys and values of the
        cache and of the new tokens, `[B, G, S, D]`; groups with fewer than S begin with empty slots."""
        new, self.joined_tokens = self.joined_tokens, None
        if new is None:
            return key_states, value_states
        if self.record.active:
            self.record.add(self.contents(), JoinedUpdate(self, key_states, value_states, new))
        return self.join(key_states, value_states, new)

    def join(self, key_states: Tensor, value_states: Tensor, new: DocIdsAndPositions) -> tuple[Tensor, Tensor]:
        """Keys and values of the cache and of the new tokens, whose documents and positions are `new`."""
        kv_heads = sum(len(group.kv_heads) for group in self.groups)
        repeats = key_states.shape[1] // kv_heads  # some modules repeat keys and values before
        keys, values = (x[:, ::repeats] for x in (key_states, value_states))
        parts = [self.append(i, g.select(keys), g.select(values), new)[:2] for i, g in enumerate(self.groups)]
        slots = max(part[0].shape[2] for part in parts)
        order = torch.cat([group.index(keys.device) for group in self.groups]).argsort().repeat_interleave(repeats)
        self.advance(keys.shape[2], new)
        return tuple(  # type: ignore[return-value]
            torch.cat([F.pad(x, (0, 0, slots - x.shape[2], 0)) for x in side], 1).index_select(1, order)
            for side in zip(*parts, strict=True)
        )

    def append(
        self, index: int, keys: Tensor, values: Tensor, new: DocIdsAndPositions | None
    ) -> tuple[Tensor, Tensor, DocIdsAndPositions | None]:
        """Keys and values of group `index`, those in the cache and the new ones, and the documents and positions of all
        (None: token i is in slot i). Keeps what later queries can see; `advance` follows for all groups.

        new: documents and positions of the new tokens, `[B, T]`; None: no padding, one document a row.
        """
        group, T = self.groups[index], keys.shape[2]
        if index == 0:  # an earlier call may have ended in an error
            self._next = []
        layout = self.layout(index, T, new, keys.device)
        if self.states is not None:
            past_keys, past_values = self.states[2 * index : 2 * index + 2]
            keys, values = torch.cat((past_keys, keys), 2), torch.cat((past_values, values), 2)
        S, capacity = keys.shape[2], group.capacity
        if new is not None:
            assert layout is not None
            order = self._kept_slots(group, layout, new)[:, None, :, None]
            kept = (x.gather(2, order.expand(*x.shape[:2], -1, x.shape[3])) for x in (keys, values))
        elif capacity is None or capacity >= S:
            kept = (x.contiguous() for x in (keys, values))
        else:
            ends = group.sinks, S - (capacity - group.sinks)
            kept = (torch.cat((x[:, :, : ends[0]], x[:, :, ends[1] :]), 2) for x in (keys, values))
        self._next = [*self._next, *kept]  # a copy of the layer may share the list
        return keys, values, layout

    def layout(
        self, index: int, T: int, new: DocIdsAndPositions | None, device: torch.device
    ) -> DocIdsAndPositions | None:
        """Documents and positions of the slots of group `index` in the cache and of T new tokens, `[1 or B, S]`."""
        group, past = self.groups[index], self.num_tokens
        n = group.cached_tokens(past)
        slots = torch.arange(n, device=device)
        if new is None:
            if n == past:
                return None
            new_positions = torch.arange(past, past + T, device=device)
            positions = torch.cat((slots.where(slots < group.sinks, slots + past - n), new_positions))[None]
            return torch.ones_like(positions), positions
        before = self.tokens_before(new)
        count = before if group.capacity is None else before.clamp_max(group.capacity)
        rank = slots - (n - count)
        positions = torch.where(rank < group.sinks, rank, rank + before - count).masked_fill(rank < 0, -1)
        docs = (rank >= 0).long()
        return torch.cat((docs.expand(len(new[0]), -1), new[0]), 1), torch.cat((positions, new[1]), 1)

    def tokens_before(self, new: DocIdsAndPositions) -> Tensor:
        """Real tokens of each row in the cache, `[B, 1]`."""
        real = self.real_tokens
        return torch.full_like(new[0][:, :1], self.num_tokens) if real is None else real.unsqueeze(1)

    def _real_tokens_after(self, new: DocIdsAndPositions) -> Tensor:
        """Real tokens of each row's last document, `[B, 1]`."""
        docs, positions = new
        last = positions.masked_fill(docs != docs.amax(1, keepdim=True), -1).amax(1, keepdim=True) + 1
        return last.maximum(self.tokens_before(new))

    def _kept_slots(self, group: HeadGroup, layout: DocIdsAndPositions, new: DocIdsAndPositions) -> Tensor:
        """The slots that later queries can see, after as many others as make their number the same for all rows."""
        (docs, positions), tokens = layout, self._real_tokens_after(new)
        kept = (docs > 0) & (docs == docs.amax(1, keepdim=True))
        if group.window is not None:
            kept &= (positions < group.sinks) | (positions > tokens - group.window)
        n = group.cached_tokens(self.num_tokens + new[0].shape[1])
        return kept.long().argsort(dim=1, stable=True)[:, docs.shape[1] - n :]

    def advance(self, new_tokens: int, new: DocIdsAndPositions | None) -> None:
        """Ends the update of all groups."""
        real = () if new is None else (self._real_tokens_after(new).squeeze(1),)
        states, self._next = (*self._next, *real), []
        self.update_states(states, new_tokens)


@dataclass
class JoinedUpdate(LayerCall):
    """The update of a cache layer by an attention module that computes attention itself."""

    cache_layer: LocalCacheLayer
    keys: Tensor
    values: Tensor
    new: DocIdsAndPositions
    mask = None

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    def narrow(self, start: int, stop: int) -> "JoinedUpdate":
        new = self.new[0][:, start:stop], self.new[1][:, start:stop]
        return JoinedUpdate(self.cache_layer, self.keys[:, :, start:stop], self.values[:, :, start:stop], new)

    def __call__(self) -> Tensor:
        return self.cache_layer.join(self.keys, self.values, self.new)[0]


class SubquadCache(Cache):
    """One cache layer per decoder layer: `RecurrentCacheLayer` for a mixer, `LocalCacheLayer` for attention with a
    window in any of its heads, and `DynamicLayer` for full attention, whose keys and values grow with the context."""

    def nbytes(self) -> int:
        return cache_bytes(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, so that the cache is as it was before them.

        tokens_to_remove: 0 or a negative number: how many tokens are removed; a positive one: how many stay. Tokens
        are removed as far back as calls were recorded, which `activate_past_recording` begins, and at most to the last
        crop: at least `RECORDED_TOKENS` tokens. Without a mixer or a window in any layer there is no limit.

        Raises:
            RuntimeError: more tokens than were recorded.
        """
        past, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)  # transformers 5.17 gives a tensor
        removed = max(past - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        if removed > past:
            raise RuntimeError(f"crop: got {removed} tokens to remove, expected at most {past}, all of the cache")
        for layer in self.layers:
            if isinstance(layer, RecurrentCacheLayer):
                layer.record.check(removed)
        super().crop(-removed)

    def snapshot(self) -> "SubquadCache":
        """A cache of the same tokens, from which other texts can go on; it shares the tensors, which no call changes,
        and records nothing."""
        layers: list[Any] = self.layers
        return SubquadCache([x.copy() if isinstance(x, RecurrentCacheLayer) else copy.copy(x) for x in layers])

    def __deepcopy__(self, memo: dict[int, Any]) -> "SubquadCache":
        new = self.snapshot()
        for layer in new.layers:
            vars(layer).update(copy.deepcopy(layer_contents(layer), memo))
        return new


def layer_contents(layer: Any) -> dict[str, Any]:
    """What calls replace in a layer of a `SubquadCache`: tensors, numbers, and tuples and dictionaries of these."""
    if isinstance(layer, RecurrentCacheLayer):
        return layer.contents()
    return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors of a student's or a transformer's cache."""
    layers: list[Any] = cache.layers
    own = (
        layer.tensors() if isinstance(layer, RecurrentCacheLayer) else (layer.keys, layer.values) for layer in layers
    )
    return sum(t.nbytes for tensors in own for t in tensors if isinstance(t, Tensor))
