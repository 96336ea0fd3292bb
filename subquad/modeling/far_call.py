"""The far part of a layer with near and far: what its memory is written with, reads, and keeps in the cache."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import ops
from subquad.mixers.base import PAD_VALUES
from subquad.mixers.norms import head_norm, upcast
from subquad.mixers.packing import PackedDocuments
from subquad.mixers.states import loaded, stored
from subquad.modeling.attention.banded import Implementation, Slots
from subquad.modeling.cache import HeadGroup, LocalCacheLayer
from subquad.modeling.merge import TINY
from subquad.modeling.rollback import tokens_of

if TYPE_CHECKING:
    from subquad.modeling.near_far import NearFarLayer

UNDELAYED = ("log_decay", "forget_gate")
"""Inputs of an op that are those of the query's token."""


class FarStates(NamedTuple):
    """The far part of one group of heads in the cache: key and value of the token that is written next, `[B, g, 1, D]`;
    other inputs of the op of the last `window` tokens, `[B, window, heads, ...]`; and the op's states. Nothing waits,
    0 in place of 1 and `window`, where the memory holds all tokens."""

    pending: tuple[Tensor, Tensor]
    inputs: dict[str, Tensor]
    states: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> "FarStates":
        key, value = self.pending
        inputs = {name: function(x) for name, x in self.inputs.items()}
        return FarStates((function(key), function(value)), inputs, tuple(function(x) for x in self.states))

    def tensors(self) -> list[Tensor]:
        return [*self.pending, *self.inputs.values(), *self.states]


class NearFarCacheLayer(LocalCacheLayer):
    """The window's keys and values, and what the memory of each group of heads holds."""

    def __init__(self, groups: Sequence[HeadGroup]):
        super().__init__(groups)
        self.far_states: dict[int, FarStates] = {}

    def contents(self) -> dict[str, Any]:
        return {**super().contents(), "far_states": dict(self.far_states)}

    def with_types(self, contents: dict[str, Any]) -> dict[str, Any]:
        far = {int(index): FarStates(*states) for index, states in contents["far_states"].items()}
        return {**super().with_types(contents), "far_states": far}

    def reset(self) -> None:
        super().reset()
        self.far_states = {}

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map_states(function)
        self.far_states = {index: states.map(function) for index, states in self.far_states.items()}

    def tensors(self) -> list[Tensor]:
        return super().tensors() + [x for states in self.far_states.values() for x in states.tensors()]


def delayed(x: Tensor, before: Tensor | None, group: HeadGroup, new_tokens: int, dim: int, empty: float = 0) -> Tensor:
    """Entry i of the result is `window` tokens before new token i, for `window` entries more than new tokens.

    x: the cached and the new slots along `dim`. before: what was kept of the last token that has left the cache; its
    place is between the sinks and the window.
    """
    assert group.window is not None
    skipped = min(group.sinks, x.shape[dim] - new_tokens)
    x = x.narrow(dim, skipped, x.shape[dim] - skipped)
    if before is not None:
        x = torch.cat((before, x), dim)
    missing = group.window + new_tokens - x.shape[dim]
    return F.pad(x, (*[0, 0] * (x.dim() - 1 - dim), missing, 0), value=empty)


def written_tokens(slots: Slots) -> tuple[Tensor, Tensor]:
    """Whether the token that leaves the window of each new token is written, and whether one has left by then; both
    bool `[1 or B, T]`."""
    group, T, device = slots.group, slots.queries.shape[2], slots.queries.device
    assert group.window is not None
    if slots.layout is None:
        left = slots.past_tokens + torch.arange(T, device=device)[None] >= group.window + group.sinks
        return left, left
    docs, positions = slots.layout
    before = None if slots.tokens_before is None else slots.tokens_before - group.window
    docs_before = None if before is None else torch.ones_like(before)
    if before is not None:
        docs, positions = docs.expand(len(before), -1), positions.expand(len(before), -1)
    source_docs = delayed(docs, docs_before, group, T, 1)[:, :T]
    source_positions = delayed(positions, before, group, T, 1, -1)[:, :T]
    new_docs, new_positions = docs[:, -T:], positions[:, -T:]
    same = (source_docs == new_docs) & (source_positions == new_positions - group.window) & (new_docs > 0)
    return same & (source_positions >= group.sinks), new_positions >= group.window + group.sinks


def left_tokens(slots: Slots, memory: str) -> Tensor:
    """Whether a memory, "outside" or "all", holds a token when a new token is read, bool `[1 or B, T]`."""
    return written_tokens(slots if memory == "outside" else undelayed(slots))[1]


def undelayed(slots: Slots) -> Slots:
    """The new slots, each token of which is written when it is read."""
    T = slots.queries.shape[2]
    layout = None if slots.layout is None else (slots.layout[0][:, -T:], slots.layout[1][:, -T:])
    group = HeadGroup(0, 0, slots.group.kv_heads)
    new = slots.keys[:, :, -T:], slots.values[:, :, -T:]
    return Slots(group, slots.queries, *new, layout, slots.past_tokens, slots.tokens_before)


class FarCall:
    """The far part of one forward pass of a layer; `run_local` calls it for each group of heads with a window.

    mask: the student's, if it holds the numbers of documents.
    """

    def __init__(self, layer: "NearFarLayer", x: Tensor, mask: Tensor | None, cache: NearFarCacheLayer | None):
        self.layer, self.x, self.mask_of_documents, self.cache = layer, x, mask, cache
        self.shared = layer.mixer.options.state_heads == "key_value"

    def narrow(self, start: int, stop: int) -> "FarCall":
        """That of new tokens `start` to `stop` alone."""
        return FarCall(self.layer, tokens_of(self.x, start, stop), None, self.cache)

    def begin(self, query: Tensor, key: Tensor, value: Tensor, order: Tensor | None) -> None:
        """Computes the gates of the new tokens, in their order. query: `[B, H, T, K]`; key, value: `[B, G, T, D]`."""
        x = self.x if order is None else self.x.gather(1, order.unsqueeze(-1).expand_as(self.x))
        self.gates = self.layer.mixer.gates(x, self.gate_inputs(query, key, value))
        self.logits = self.layer.merge.logits(x)

    def gate_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """q, k and v of the new tokens, for `Mixer.gates`."""
        mixer, repeats = self.layer.mixer, 1 if self.shared else query.shape[1] // key.shape[1]
        q, k, v = (t.transpose(1, 2) for t in (query, *(t.repeat_interleave(repeats, 1) for t in (key, value))))
        return {"q": mixer.feature_map("q", q), "k": mixer.feature_map("k", k), "v": v}

    def __call__(
        self, index: int, slots: Slots, runner: Implementation, near: Tensor, lse: Callable[[bool], Tensor]
    ) -> Tensor:
        """The merged output of group `index`, `[B, T, h, V]`.

        runner: computes the near part. near: `[B, T, h, V]`. lse: gives the log-sum-exp of the near scores,
        `[B, T, h]`; `lse(True)` that of the scores less the largest.
        """
        far, z = self.far_part(index, slots, runner.heads)
        return self.layer.merge(near, far.to(near.dtype), z, *self.merge_inputs(slots, runner), lse, runner.heads)

    def far_part(self, index: int, slots: Slots, heads: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is merged with the near part: what `read` gives, normed where the mixer has an output norm."""
        o, z = self.read(index, slots, heads)
        return self.normed(o, heads), z

    def merge_inputs(self, slots: Slots, runner: Implementation) -> tuple[Tensor | None, Tensor]:
        """`logits` and `left` of `Merge`."""
        logits = self.logits if self.logits is None or runner.heads is None else self.logits[..., runner.heads]
        return logits, left_tokens(slots, self.layer.memory)

    def normed(self, o: Tensor, heads: Tensor | None) -> Tensor:
        mixer = self.layer.mixer
        if not mixer.options.output_norm:
            return o
        return head_norm(o, mixer.o_norm if heads is None else mixer.o_norm[heads], mixer.norm_eps)

    def read(self, index: int, slots: Slots, heads: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the memory of group `index`, with the query heads `heads` (None: all), gives, `[B, T, h, V]`; and its
        normalizer, `[B, T, h]`, if the merge reads it."""
        slots = slots if self.layer.memory == "outside" else undelayed(slots)
        group, T = slots.group, slots.queries.shape[2]
        state_heads = group.index(slots.queries.device) if self.shared and heads is not None else heads
        cached = None if self.cache is None else self.cache.far_states.get(index)
        pending = (None, None) if cached is None else cached.pending
        entries, inputs = self.entries_and_inputs(index, slots, pending, heads, state_heads)
        buffers: dict[str, Tensor] = {}
        for name, gate in self.gates.items():
            own = gate if state_heads is None else gate.index_select(0 if gate.dim() == 1 else 2, state_heads)
            if name not in UNDELAYED:
                buffers[name] = delayed(own, None if cached is None else cached.inputs[name], group, T, 1)
                own = buffers[name][:, :T]
            inputs[name] = own
        self.mask(inputs, written_tokens(slots)[0], slots)
        before = loaded(None if cached is None else cached.states, inputs["q"])
        o, z, states = self.run_op(inputs, before, slots)
        if self.cache is not None:
            self.keep(index, slots, entries, buffers, stored(states, self.layer.mixer.options.state_dtype))
        return o, z

    def entries_and_inputs(
        self,
        index: int,
        slots: Slots,
        pending: tuple[Tensor | None, Tensor | None],
        heads: Tensor | None,
        state_heads: Tensor | None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The keys and values that are written, delayed, `[B, g, T + window, D]`; and q, k and v of the op.

        pending: key and value of the token that is written first, from the cache. heads, state_heads: which query heads
        and which states the group has; None: all.
        """
        mixer, T = self.layer.mixer, slots.queries.shape[2]
        both = zip((slots.keys, slots.values), pending, strict=True)
        entries = [delayed(x, old, slots.group, T, 2) for x, old in both]
        repeats = 1 if self.shared else slots.queries.shape[1] // slots.keys.shape[1]
        k, v = (x[:, :, :T].transpose(1, 2).repeat_interleave(repeats, 2) for x in entries)
        inputs = {
            "q": mixer.feature_map("q", slots.queries.transpose(1, 2), heads=heads),
            "k": mixer.feature_map("k", k, heads=state_heads),
            "v": mixer.value_map(v),
        }
        return entries, inputs

    def mask(self, inputs: dict[str, Tensor], written: Tensor, slots: Slots) -> None:
        """Sets the inputs of the op at tokens where nothing is written, and decays at padding, in place of `inputs`."""
        real = None if slots.layout is None else slots.layout[0][:, -slots.queries.shape[2] :] > 0
        for name in PAD_VALUES.keys() & inputs.keys():
            used = real if name in UNDELAYED else written
            if used is not None and inputs[name].dim() > 1:
                shape = (*used.shape, *[1] * (inputs[name].dim() - 2))
                inputs[name] = inputs[name].masked_fill(~used.view(shape), PAD_VALUES[name])

    def run_op(
        self, inputs: dict[str, Any], states: tuple[Tensor, ...] | None, slots: Slots
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """What the memory reads, `[B, T, h, V]`; if the merge reads it, its normalizer `[B, T, h]`; its states."""
        with_normalizer = self.layer.merge.has_normalizer
        if with_normalizer:  # the normalizer is one more value channel of ones, where something is written
            written = inputs["v"].new_ones(inputs["v"].shape[:-1]).unsqueeze(-1)
            inputs["v"] = torch.cat((inputs["v"], written), -1)
        if self.mask_of_documents is not None and slots.layout is not None:
            o, states = self.run_packed(inputs, slots.layout[0][:, -slots.queries.shape[2] :])
        else:
            o, states = self.run(inputs, states, None)
        if not with_normalizer:
            return o, None, states
        z = upcast(o[..., -1])
        return (upcast(o[..., :-1]) / z.clamp_min(TINY).unsqueeze(-1)).to(o.dtype), z, states

    def run(
        self, inputs: dict[str, Any], states: tuple[Tensor, ...] | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.layer.merge.has_normalizer:
            return self.layer.mixer.run_op(inputs, states, cu_seqlens)
        state = states[0] if states else None
        o, state = ops.chunk(**inputs, initial_state=state, cu_seqlens=cu_seqlens)
        return o, (state,)

    def run_packed(self, inputs: dict[str, Any], docs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        mask: Any = self.mask_of_documents
        if not hasattr(mask, "subquad_far_documents"):  # located once for all layers and groups
            mask.subquad_far_documents = PackedDocuments(docs)
        documents = mask.subquad_far_documents
        packed = {
            name: x if x.dim() == 1 else documents.pack(x.flatten(2)).unflatten(-1, x.shape[2:])
            for name, x in inputs.items()
        }
        o, states = self.run(packed, None, documents.cu_seqlens)
        o = documents.unpack(o.flatten(2)).unflatten(-1, o.shape[2:])
        return o, tuple(state[documents.last_documents] for state in states)

    def keep(
        self, index: int, slots: Slots, entries: list[Tensor], buffers: dict[str, Tensor], states: tuple[Tensor, ...]
    ) -> None:
        """Stores in the cache what the next token needs."""
        assert self.cache is not None
        assert slots.group.window is not None
        T, window, new = slots.queries.shape[2], slots.group.window, None
        if slots.layout is not None:  # rows have different numbers of new tokens
            new = (slots.layout[0][:, -T:] > 0).sum(1, keepdim=True).expand(len(entries[0]), -1)

        def after_new(x: Tensor, dim: int, count: int) -> Tensor:
            if new is None:  # a copy, since a view would keep the whole tensor
                return x.narrow(dim, T, count).clone(memory_format=torch.contiguous_format)
            shape = [1] * x.dim()
            shape[0], shape[dim] = len(new), count
            index = (new + torch.arange(count, device=x.device)).view(shape)
            return x.gather(dim, index.expand(*x.shape[:dim], count, *x.shape[dim + 1 :]))

        next_token = min(1, window)
        pending = after_new(entries[0], 2, next_token), after_new(entries[1], 2, next_token)
        inputs = {name: after_new(x, 1, window) for name, x in buffers.items()}
        self.cache.far_states[index] = FarStates(pending, inputs, states)
