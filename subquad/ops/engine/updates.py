"""The additive update and the delta rule of the state: scans over the chunks of a segment, forward and backward.

Notation and shapes as in `autograd`, for m = n B H chunk matrices: decayed queries [m, C, R, K] and keys [m, C, K],
values [m, C, V], reads [m, C, (R,) V], states [n, BH, K, V].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.engine.channel_decay import ChannelDecay
from subquad.ops.engine.scalar_decay import ScalarDecay
from subquad.ops.engine.segments import Segment, StateScan
from subquad.ops.engine.workspace import Workspace

Decay = ScalarDecay | ChannelDecay


class SavedForBackward(NamedTuple):
    """Intermediates of the forward pass: of all chunks for the backward pass; of one segment without gradients."""

    states: StateScan
    A: Tensor | None = None  # [N BH, C, C]; additive update
    U: Tensor | None = None  # [N BH, C, V]; delta rule
    inverse: Tensor | None = None  # [N BH, C (C + 1)]; delta rule, see `unit_lower_inverse`

    def of_segment(self, x: Tensor | None, segment: Segment) -> Tensor:
        """The segment's matrices of A, U or inverse."""
        assert x is not None
        BH = self.states.layout.BH
        return x[self.states.offset(segment) * BH :][: segment.n * BH]


class StateUpdate:
    """An update with the decay, what the forward pass saves, and scratch memory of a call.

    `forward` returns O [m, C, V]; its `ends` are the states before the first token (None: zeros) and, to be filled,
    after the last. `backward` returns the gradients of the states after each chunk, G [n, BH, K, V], and of V
    [m, C, V]; its `d_ends` are the carry [BH, K, V] to the segment before, and the gradients of the final states and,
    to be filled, of the initial ones.
    """

    def __init__(self, decay: Decay, saved: SavedForBackward, work: Workspace) -> None:
        self.decay, self.saved, self.work = decay, saved, work


class AdditiveUpdate(StateUpdate):
    """Each state follows from the one before by one multiplication and one addition."""

    def forward(
        self, segment: Segment, queries: Tensor, keys: Tensor, values: Tensor, ends: tuple[Tensor | None, Tensor]
    ) -> Tensor:
        saved, work, (m, C, _, K), V = self.saved, self.work, queries.shape, values.shape[-1]
        A = saved.of_segment(saved.A, segment)
        self.decay.forward(segment, queries, keys, A, None)
        added = torch.bmm(keys.mT, values, out=work("added", m, K, V)).view(segment.n, -1, K, V).unbind(0)
        total = _by_chunk(self.decay.total(segment))
        for i, before, after in saved.states.forward(segment, *ends):
            if total is None:
                torch.add(added[i], before, out=after)
            else:
                torch.addcmul(added[i], before, total[i], out=after)
        reads = torch.bmm(A, values, out=work("reads", m, C, V))
        return reads.baddbmm_(queries.view(m, C, K), saved.states.before(segment).flatten(0, 1))

    def backward(
        self, segment: Segment, queries: Tensor, keys: Tensor, A: Tensor, d_reads: Tensor, d_ends: tuple
    ) -> tuple[Tensor, Tensor]:
        work, (m, C, _, K), n = self.work, queries.shape, segment.n
        do, V = d_reads[:, :, 0], d_reads.shape[-1]
        d_state = torch.bmm(queries[:, :, 0].mT, do, out=work("d_state", m, K, V)).view(n, -1, K, V).unbind(0)
        G, total = work("G", n, *d_state[0].shape), _by_chunk(self.decay.total(segment))
        for i, d_after, d_before in self.saved.states.backward(segment, G, *d_ends):
            if total is None:
                torch.add(d_state[i], d_after, out=d_before)
            else:
                torch.addcmul(d_state[i], d_after, total[i], out=d_before)
        d_values = torch.bmm(keys, G.flatten(0, 1), out=work("d_values", m, C, V))
        return G, d_values.baddbmm_(A.mT, do)


class DeltaUpdate(StateUpdate):
    """U depends on the state and is computed in the scan, (I + L)^-1 before it."""

    def forward(
        self, segment: Segment, queries: Tensor, keys: Tensor, values: Tensor, ends: tuple[Tensor | None, Tensor]
    ) -> Tensor:
        saved, work, (m, C, _, K), V, n = self.saved, self.work, queries.shape, values.shape[-1], segment.n
        A, L = work("A", m, C, C), padded_square(work("L", m, C * (C + 1)), C)
        self.decay.forward(segment, queries, keys, A, L)
        inverse, U = saved.of_segment(saved.inverse, segment), saved.of_segment(saved.U, segment).view(n, -1, C, V)
        unit_lower_inverse(L, inverse, work)
        inverses = padded_square(inverse, C).unflatten(0, (n, -1)).unbind(0)
        key_queries, writes = queries[:, :, 1].view(n, -1, C, K).unbind(0), keys.mT.view(n, -1, K, C).unbind(0)
        each_V, each_U = values.view(n, -1, C, V).unbind(0), U.unbind(0)
        total = _by_chunk(self.decay.total(segment))
        for i, before, after in saved.states.forward(segment, *ends):
            each_V[i].baddbmm_(key_queries[i], before, alpha=-1)
            torch.bmm(inverses[i], each_V[i], out=each_U[i])
            after.copy_(before) if total is None else torch.mul(before, total[i], out=after)
            after.baddbmm_(writes[i], each_U[i])
        reads = torch.bmm(A, U.flatten(0, 1), out=work("reads", m, C, V))
        return reads.baddbmm_(queries[:, :, 0], saved.states.before(segment).flatten(0, 1))

    def backward(
        self, segment: Segment, queries: Tensor, keys: Tensor, A: Tensor, d_reads: Tensor, d_ends: tuple
    ) -> tuple[Tensor, Tensor]:
        """Also writes -dV, the gradient of what keys read, to `d_reads[:, :, 1]`."""
        saved, work, (m, C, _, K), n = self.saved, self.work, queries.shape, segment.n
        do, V = d_reads[:, :, 0], d_reads.shape[-1]
        inverses = padded_square(saved.of_segment(saved.inverse, segment), C).mT.unflatten(0, (n, -1)).unbind(0)
        d_state = torch.bmm(queries[:, :, 0].mT, do, out=work("d_state", m, K, V)).view(n, -1, K, V).unbind(0)
        dU = torch.bmm(A.mT, do, out=work("d_values", m, C, V)).view(n, -1, C, V).unbind(0)
        d_values = work("solved", n, m // n, C, V)
        key_queries, writes = queries[:, :, 1].mT.view(n, -1, K, C).unbind(0), keys.view(n, -1, C, K).unbind(0)
        dV, G, total = d_values.unbind(0), work("G", n, *d_state[0].shape), _by_chunk(self.decay.total(segment))
        for i, d_after, d_before in saved.states.backward(segment, G, *d_ends):
            dU[i].baddbmm_(writes[i], d_after)
            torch.bmm(inverses[i], dU[i], out=dV[i])
            if total is None:
                torch.add(d_state[i], d_after, out=d_before)
            else:
                torch.addcmul(d_state[i], d_after, total[i], out=d_before)
            d_before.baddbmm_(key_queries[i], dV[i], alpha=-1)
        flat = d_values.view(m, C, V)
        torch.neg(flat, out=d_reads[:, :, 1])
        return G, flat


def _by_chunk(total: Tensor | None) -> tuple[Tensor, ...] | None:
    return None if total is None else total.unbind(0)


def padded_square(flat: Tensor, C: int) -> Tensor:
    """[m, C (C + 1)] as [m, C, C]. The C unused elements after each matrix place all diagonal blocks of one size at
    equal distances, so that those of all matrices form one batch."""
    return flat.as_strided((flat.shape[0], C, C), (C * (C + 1), C, 1), flat.storage_offset())


def unit_lower_inverse(L: Tensor, inverse: Tensor, work: Workspace) -> None:
    """(I + L)^-1 of a strictly lower triangular L by blocks of doubling size, in half the time of `solve_triangular`:

        inverse of [[A, 0], [B, C]] = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]

    Args:
        L: [m, C, C], a `padded_square`; only its lower triangle is read.
        inverse: [m, C (C + 1)], to be filled; must be zero above the diagonal.
    """
    m, C, _ = L.shape
    padded_square(inverse, C).diagonal(0, 1, 2).fill_(1.0)
    L_offset, offset = L.storage_offset(), inverse.storage_offset()
    h = 1
    while h < C:
        size, strides = (m * C // (2 * h), h, h), (2 * h * (C + 1), C, 1)
        below = L.as_strided(size, strides, L_offset + h * C)
        corner = inverse.as_strided(size, strides, offset + h * C)
        if h == 1:
            torch.neg(below, out=corner)
        else:
            first = inverse.as_strided(size, strides, offset)
            second = inverse.as_strided(size, strides, offset + h * (C + 1))
            half = torch.bmm(second, below, out=work("half", *size))
            torch.neg(torch.bmm(half, first, out=work("whole", *size)), out=corner)
        h *= 2
