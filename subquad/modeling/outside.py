"""What the teacher's attention gives of the tokens outside a window: the target of a memory.

    m* = 1 - exp(lse_near - lse_all)        m* o_far* = o_all - (1 - m*) o_near

m* is the teacher's attention mass outside the window. A memory that is merged with another share than m* has the
target that goes with this share.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.mixers.norms import upcast
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.banded import Implementation, LogSumExp, Slots
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.attention.local import LOCAL, run_local
from subquad.modeling.attention.tracing import attention_implementation
from subquad.modeling.far_call import FarCall, left_tokens
from subquad.modeling.masks import doc_ids_and_positions, visible_keys
from subquad.modeling.near_far import NearFarLayer

QUERY_BLOCK = 512
"""Queries whose scores over all keys are in memory at a time."""


class FarTarget(NamedTuple):
    """share: `[B, T, H, 1]`. value: what the memory, times the share, should give, `[B, T, H, V]`. Both float32, or
    float64 of a float64 model, and 0 while the memory is empty, and for heads without a memory."""

    share: Tensor
    value: Tensor


class OutsideRecorder:
    """In place of a `FarCall`, in one forward pass without a cache and without padding: keeps the near part of heads
    with a memory, and leaves it as it is."""

    known_lse: Tensor | None = None
    """What `full_log_sum_exp` gives, of all heads, `[B, T, H]`, if it is known."""

    def __init__(self, layer: NearFarLayer):
        self.layer = layer

    def begin(self, query: Tensor, key: Tensor, value: Tensor, order: Tensor | None) -> None:
        B, H, T, _ = query.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.near = query.new_zeros(B, T, H, value.shape[-1], dtype=dtype)
        self.near_lse = query.new_zeros(B, T, H, dtype=dtype)
        self.full_lse = torch.zeros_like(self.near_lse) if self.known_lse is None else self.known_lse
        self.left = torch.zeros(B, T, H, dtype=torch.bool, device=query.device)

    def __call__(self, index: int, slots: Slots, runner: Implementation, near: Tensor, lse: Any) -> Tensor:
        heads = slice(None) if runner.heads is None else runner.heads
        self.near[:, :, heads], self.near_lse[:, :, heads] = upcast(near), lse(False)
        self.left[:, :, heads] = left_tokens(slots, self.layer.memory).unsqueeze(-1)
        if self.known_lse is None:
            self.full_lse[:, :, heads] = full_log_sum_exp(slots, runner)
        return near

    @property
    def mass(self) -> Tensor:
        """m*, `[B, T, H]`."""
        mass = (1 - (self.near_lse - self.full_lse).exp()).clamp(0, 1)
        return torch.where(self.left, mass, 0.0)

    def target(self, full: Tensor, merge: str) -> FarTarget:
        """The target of the memory of a merge of this kind: the share is m*, with `fixed` 1/2; with `add`, where the
        near part keeps its whole weight, 1. full: the teacher's o_all, `[B, T, H, V]`."""
        mass, left = self.mass.unsqueeze(-1), self.left.unsqueeze(-1)
        share = {"add": torch.ones_like(mass), "fixed": torch.full_like(mass, 0.5)}.get(merge, mass)
        share = torch.where(left, share, 0.0)
        kept = self.near if merge == "add" else (1 - share) * self.near
        return FarTarget(share, torch.where(left, upcast(full) - kept, 0.0))


class KeptFarCall(FarCall):
    """Keeps what the memories give, `far: [B, T, H, V]` in float32 or float64; zero for heads without one."""

    def begin(self, query: Tensor, key: Tensor, value: Tensor, order: Tensor | None) -> None:
        super().begin(query, key, value, order)
        B, H, T, _ = query.shape
        self.far = query.new_zeros(B, T, H, value.shape[-1], dtype=torch.promote_types(query.dtype, torch.float32))

    def far_part(self, index: int, slots: Slots, heads: Tensor | None) -> tuple[Tensor, Tensor | None]:
        far, z = super().far_part(index, slots, heads)
        self.far = upcast(far) if heads is None else self.far.index_copy(2, heads, upcast(far))
        return far, z


def full_log_sum_exp(slots: Slots, runner: Implementation) -> Tensor:
    """The log-sum-exp of the scores of all tokens that the teacher sees, `[B, T, h]`; without a cache."""
    scores, T = LogSumExp(runner), slots.queries.shape[2]
    layout = slots.layout or doc_ids_and_positions(None, 1, T, slots.queries.device)
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(T, start + QUERY_BLOCK)
        docs, positions = (x[:, :end] for x in layout)
        seen = visible_keys((docs[:, start:], positions[:, start:]), (docs, positions), limit=runner.limit).unsqueeze(1)
        parts.append(scores(slots.queries[:, :, start:end], slots.keys[:, :, :end], slots.values, seen))
    return torch.cat(parts, 1).squeeze(-1)


@torch.no_grad()
def far_target(
    layer: NearFarLayer, info: AttentionInfo, activations: LayerActivations, attention_mask: Tensor | None
) -> FarTarget:
    """The target of a student's memory from the teacher's attention `info` in the same layer.

    activations: of the teacher's attention, with `head_outputs`. attention_mask: the student's mask of several
    documents a row, or None.
    """
    kwargs = {name: value for name, value in activations.kwargs.items() if name != "attention_mask"}
    call = layer.local_call(activations.args, kwargs, attention_mask, None)
    call.far = recorder = OutsideRecorder(layer)
    with attention_implementation(info.module, LOCAL):
        run_local(info.module, call, activations.args, kwargs)
    assert activations.head_outputs is not None
    return recorder.target(activations.head_outputs.unflatten(-1, (info.spec.num_heads, -1)), layer.merge.kind)
