"""The cache of a student: the state of every mixer, and keys and values of every layer that keeps attention.

A `DynamicCache` of `transformers` does not fit. It counts tokens only where a layer keeps keys, and it takes a layer of
linear attention without a convolution for an empty one. So these classes count tokens, and hold a mixer's states as a
tuple of tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_ARGUMENT = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name in `transformers` of the cache that a model takes and returns: "cache" since 5.24."""


class RecurrentCacheLayer(DynamicLayer):
    """The states of one mixer, tensors with the batch as first axis, and the number of tokens that they summarize."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.states: tuple[Tensor, ...] | None = None
        self.num_tokens = 0

    def update_states(self, states: tuple[Tensor, ...], new_tokens: int) -> None:
        self.states, self.num_tokens = states, self.num_tokens + new_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("this layer of the cache is of a recurrent mixer and holds no keys and values")

    def get_seq_length(self, *args: Any) -> int:
        return self.num_tokens

    def reset(self) -> None:
        self.states, self.num_tokens = None, 0

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.states is not None:
            self.states = tuple(function(s) for s in self.states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_states(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_states(lambda s: s.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_states(lambda s: s[indices])

    def crop(self, *args: Any) -> None:
        raise NotImplementedError("a recurrent state cannot be cropped to fewer tokens; copy the cache before the call")


class SlidingWindowCacheLayer(RecurrentCacheLayer):
    """Keys and values of attention with a window: those of the last `window - 1` tokens and of the first `sinks`.

    The states are keys `[B, H, n, K]`, values `[B, H, n, V]`, and positions `[B, n]`, -1 where there is no token.
    """

    def __init__(self, window: int, sinks: int = 0) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.positions: Tensor | None = None
        """Positions `[B, T]` of the tokens of the next `update`; the layer sets them before attention runs."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns the kept and the new keys and values; then drops those that no later query can see."""
        assert self.positions is not None
        keys, values, positions = key_states, value_states, self.positions
        if self.states is not None:
            joined = zip(self.states, (keys, values, positions), (2, 2, 1), strict=True)
            keys, values, positions = (torch.cat((old, new), dim) for old, new, dim in joined)
        self.update_states(self._visible_later(keys, values, positions), key_states.shape[2])
        self.positions = None
        return keys, values

    def _visible_later(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        capacity = self.sinks + self.window - 1
        if positions.shape[1] <= capacity:
            return keys, values, positions
        last = positions.amax(1, keepdim=True)
        visible = (positions >= 0) & ((positions < self.sinks) | (positions > last + 1 - self.window))
        # Rows have different padding: the visible tokens of each row move to its end, in order, and the rest is cut.
        order = visible.long().argsort(dim=1, stable=True)[:, positions.shape[1] - capacity :]
        positions = positions.masked_fill(~visible, -1).gather(1, order)
        index = order[:, None, :, None]
        keys, values = (x.gather(2, index.expand(*x.shape[:2], -1, x.shape[3])) for x in (keys, values))
        return keys, values, positions


class SubquadCache(Cache):
    """One cache layer per decoder layer: `RecurrentCacheLayer` for a mixer, `SlidingWindowCacheLayer` for attention
    with a window, and `DynamicLayer` for full attention, whose keys and values grow with the context."""

    def nbytes(self) -> int:
        return cache_bytes(self)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors of a student's or a transformer's cache."""
    layers: list[Any] = cache.layers
    tensors = (t for layer in layers for t in getattr(layer, "states", None) or (layer.keys, layer.values))
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))
