"""The cache of one layer and one sequence as bytes of a fixed number, a page, as servers keep it.

A page holds what a mixer's `RecurrentCacheLayer` or a window's `LocalCacheLayer` holds. Which of its slots a window has
filled follows from the number of tokens, which the server knows.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.modeling.cache import HeadGroup, LocalCacheLayer, RecurrentCacheLayer
from subquad.modeling.far_call import FarStates, NearFarCacheLayer
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.utils import UserError

ALIGNMENT = 16
"""Offsets in a page, and its size, are multiples of it."""


class Field(NamedTuple):
    """One tensor in a page: its shape for one sequence, its dtype and its first byte."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def end(self) -> int:
        return self.offset + prod(self.shape) * self.dtype.itemsize


class StatePage:
    """How the cache of `layer` lies in a page.

    Args:
        layer: a mixer, or attention of which all heads have a window.
        example: its cache layer after some tokens of one sequence.

    Raises:
        UserError: some heads see all tokens, so that the cache grows.
    """

    def __init__(self, layer: MixerLayer | AttentionLayer, example: RecurrentCacheLayer):
        self.layer, self.example = layer, example
        self.groups: Sequence[HeadGroup] = example.groups if isinstance(example, LocalCacheLayer) else ()
        if any(group.window is None for group in self.groups):
            raise UserError(
                f"layer {layer.index}: some heads see all tokens and others have a window; expected all or none"
            )
        has_rotary = layer.spec.rotary is not None and bool(layer.spec.rotary_channels)
        lasts = {group.last_full for group in self.groups if group.last_full is not None}
        self.lasts = sorted(lasts) if has_rotary else []
        """The positions whose rotation a window's first tokens need."""
        self.fields: list[Field] = []
        for shape, dtype in self._shapes():
            offset = -(-self.fields[-1].end // ALIGNMENT) * ALIGNMENT if self.fields else 0
            self.fields.append(Field(shape, dtype, offset))
        self.nbytes = -(-self.fields[-1].end // ALIGNMENT) * ALIGNMENT if self.fields else 0

    def _shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        shapes = [(tuple(x.shape[1:]), x.dtype) for x in self._tensors(self.example)]
        for index, group in enumerate(self.groups):
            for side in (2 * index, 2 * index + 1):
                (heads, _, channels), dtype = shapes[side]
                shapes[side] = (heads, group.cached_tokens(10**9), channels), dtype
        states = len(self._tensors(self.example)) - 2 * len(self._rotations(self.example))
        rotation = (1, self.layer.spec.rotary_channels), torch.float32
        return [*shapes[:states], *[rotation] * 2 * len(self.lasts)]

    @property
    def settled(self) -> int:
        """A number of tokens from which on calls do not depend on it: sequences with more can share a call."""
        limit = self.layer.spec.window or 0
        return max((group.sinks + max(group.window or 0, limit) for group in self.groups), default=1)

    def views(self, pages: Tensor) -> list[Tensor]:
        """The fields of `pages: [pages, bytes]` (uint8; rows may be further apart), `[pages, *shape]`."""
        found = [pages[:, field.offset : field.end].view(field.dtype) for field in self.fields]
        return [x.unflatten(1, field.shape) for x, field in zip(found, self.fields, strict=True)]

    def load(self, views: list[Tensor], pages: Tensor, num_tokens: int) -> RecurrentCacheLayer:
        """The cache layer of the sequences in `pages: [B]` (indices), each after `num_tokens` tokens."""
        new: Any = self.layer.new_cache_layer()
        if not num_tokens:
            return new
        parts = iter(x.index_select(0, pages) for x in views)
        slots = [n for group in self.groups for n in [group.cached_tokens(num_tokens)] * 2]
        assert self.example.states is not None
        states = [next(parts) for _ in self.example.states]
        if slots:
            states = [x[:, :, :n].contiguous() for x, n in zip(states, slots, strict=True)]
        new.states, new.num_tokens = tuple(states), num_tokens
        if isinstance(self.example, NearFarCacheLayer):
            new.far_states = {i: filled(far, parts) for i, far in self.example.far_states.items()}
        rotations = {last: (next(parts), next(parts)) for last in self.lasts}
        if rotations:
            new.sink_rotations = {last: both for last, both in rotations.items() if num_tokens > last}
        return new

    def store(self, views: list[Tensor], pages: Tensor, cache_layer: RecurrentCacheLayer) -> None:
        """Writes a cache layer of B sequences to `pages: [B]` (indices)."""
        tensors, rotations = self._tensors(cache_layer), self._rotations(cache_layer)
        states = len(tensors) - 2 * len(rotations)
        for view, x in zip(views, tensors[:states], strict=False):
            for dim in range(1, view.dim()):
                view = view.narrow(dim, 0, x.shape[dim])
            view[pages] = x
        for last, both in rotations.items():
            first = states + 2 * self.lasts.index(last)
            for view, x in zip(views[first : first + 2], both, strict=True):
                view[pages] = x.float()

    def _tensors(self, cache_layer: RecurrentCacheLayer) -> list[Tensor]:
        """All of a cache layer: states, those of memories, rotations."""
        assert cache_layer.states is not None
        far = cache_layer.far_states if isinstance(cache_layer, NearFarCacheLayer) else {}
        of_memories = [x for states in far.values() for x in states.tensors()]
        rotations = [x for both in self._rotations(cache_layer).values() for x in both]
        return [*cache_layer.states, *of_memories, *rotations]

    def _rotations(self, cache_layer: RecurrentCacheLayer) -> dict[int, tuple[Tensor, Tensor]]:
        return cache_layer.sink_rotations if isinstance(cache_layer, LocalCacheLayer) else {}


def filled(far: FarStates, tensors: Iterator[Tensor]) -> FarStates:
    """`far` with other tensors, in the order of `FarStates.tensors`."""
    pending = next(tensors), next(tensors)
    inputs = {name: next(tensors) for name in far.inputs}
    return FarStates(pending, inputs, tuple(next(tensors) for _ in far.states))
