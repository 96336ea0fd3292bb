"""The cache of a student: a constant-size state for every mixer, keys and values for every layer that keeps attention.

`transformers`' own `DynamicCache` cannot count tokens where no layer keeps keys, and takes a layer of linear
attention without a convolution for one that has seen nothing; so positions are counted here, and states are a plain
tuple a layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_ARGUMENT = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What `transformers` calls the cache that a model takes and returns: renamed in 5.24."""


class RecurrentCacheLayer(CacheLayerMixin):
    """States of one mixer, `(tensors with the batch first)`, and the number of tokens that they have seen."""

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.states: tuple[Tensor, ...] | None = None
        self.seen = 0

    def set(self, states: tuple[Tensor, ...], tokens: int) -> None:
        self.states, self.seen, self.is_initialized = states, self.seen + tokens, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: a mixer makes its states."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("this layer is a recurrent mixer and keeps no keys and values")

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any, *args: Any) -> tuple[int, int]:
        return self.seen + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.states, self.seen, self.is_initialized = None, 0, False

    def _map(self, f) -> None:
        if self.states is not None:
            self.states = tuple(f(s) for s in self.states)

    def offload(self) -> None:
        self._map(lambda s: s.to("cpu", non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda s: s.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda s: s[indices])

    def crop(self, *args: Any) -> None:
        raise NotImplementedError("a recurrent state cannot be cropped to fewer tokens; keep a copy and run from it")


class SlidingWindowCacheLayer(RecurrentCacheLayer):
    """Keys and values of attention that sees a window, and perhaps the first tokens (sinks): no more than those are
    kept. The states are keys and values `[B, H, n, D]` and each one's place in its row, `[B, n]`, -1 where there is
    no token."""

    def __init__(self, window: int, sinks: int = 0) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.positions: Tensor | None = None
        """Places of the tokens of the next `update`, `[B, T]`: the layer sets them before attention runs."""

    def kept_positions(self) -> Tensor | None:
        return None if self.states is None else self.states[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All that is kept and the new keys and values, for attention; then forgets what no later query can see."""
        assert self.positions is not None
        keys, values, places = key_states, value_states, self.positions
        if self.states is not None:
            keys = torch.cat((self.states[0], keys), dim=2)
            values = torch.cat((self.states[1], values), dim=2)
            places = torch.cat((self.states[2], places), dim=1)
        self.set(self._visible_later(keys, values, places), key_states.shape[2])
        self.positions = None
        return keys, values

    def _visible_later(self, keys: Tensor, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        most = self.sinks + self.window - 1
        if places.shape[1] <= most:
            return keys, values, places
        last = places.amax(1, keepdim=True)
        wanted = (places >= 0) & ((places < self.sinks) | (places > last + 1 - self.window))
        # Rows are padded differently: what a row still needs moves to its end, in order, and the rest is cut off.
        order = wanted.long().argsort(dim=1, stable=True)[:, places.shape[1] - most :]
        places = places.masked_fill(~wanted, -1).gather(1, order)
        index = order[:, None, :, None]
        keys, values = (x.gather(2, index.expand(*x.shape[:2], -1, x.shape[3])) for x in (keys, values))
        return keys, values, places


class SubquadCache(Cache):
    """One layer a block: `StateLayer` for a mixer, `WindowLayer` for attention with a window, and `DynamicLayer`, whose
    keys and values grow with the context, for attention that sees all."""

    is_compileable = False

    def __init__(self, layers: Sequence[RecurrentCacheLayer | DynamicLayer]):
        super().__init__(layers=list(layers))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].get_seq_length()  # type: ignore[union-attr]

    def nbytes(self) -> int:
        """Bytes of everything held for the tokens seen so far."""
        total = 0
        layers: list[Any] = self.layers
        for layer in layers:
            tensors = layer.states if isinstance(layer, RecurrentCacheLayer) else (layer.keys, layer.values)
            total += sum(t.numel() * t.element_size() for t in tensors or () if isinstance(t, torch.Tensor))
        return total
