"""The additive update and the delta rule of the state: scans over the chunks of a segment, forward and backward.

Notation and shapes as in `autograd`, for m = n B G chunk matrices: decayed queries [m, C, R, K] and keys [m, C, K],
values [m, C, V], reads [m, C, Q or R, V], states [n, BG, K, V].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from subquad.ops.engine.channel_decay import ChannelDecay
from subquad.ops.engine.scalar_decay import ScalarDecay
from subquad.ops.engine.segments import ChunkLayout, Segment
from subquad.ops.engine.workspace import Workspace

Decay = ScalarDecay | ChannelDecay


class AdditiveUpdate:
    """Each state follows from the one before by one multiplication and one addition.

    Args:
        save: whether intermediates of all chunks are kept for the backward pass; else those of one segment.
        states: [chunks + 1, BG, K, V], the state before each chunk.
        saved: A [chunks BG, C, Q, C] for the additive update; for the delta rule U [chunks BG, C, V] and the inverse
            [chunks BG, C (C + 1)], see `unit_lower_inverse`.
    """

    def __init__(
        self, layout: ChunkLayout, decay: Decay, work: Workspace, save: bool, states: Tensor, *saved: Tensor | None
    ) -> None:
        self.layout, self.decay, self.work, self.save, self.states = layout, decay, work, save, states
        (self.A, self.U, self.inverse), self.by_chunk = saved, states.unbind(0)

    def offset(self, segment: Segment) -> int:
        """Index in `states` of the segment's first chunk."""
        return segment.first if self.save else 0

    def before(self, segment: Segment) -> Tensor:
        """The states before each chunk of the segment, [n, BG, K, V]."""
        return self.states[self.offset(segment) :][: segment.n]

    def of_segment(self, x: Tensor | None, segment: Segment) -> Tensor:
        """The segment's matrices of A, U or inverse."""
        assert x is not None
        return x[self.offset(segment) * self.layout.BG :][: segment.n * self.layout.BG]

    def forward(self, segment: Segment, queries: Tensor, keys: Tensor, values: Tensor, ends: tuple) -> Tensor:
        """Returns O [m, C, Q, V]. `ends` are the states before each document (None: zeros) and, to be filled, after."""
        A, U = self.update_states(segment, queries, keys, values, ends)
        A, queries = A.flatten(1, 2), self.of_q(queries)
        reads = torch.bmm(A, U, out=self.work("reads", *queries.shape[:2], U.shape[-1]))
        reads.baddbmm_(queries, self.before(segment).flatten(0, 1))
        return reads.unflatten(1, (-1, self.layout.Q))

    def update_states(
        self, segment: Segment, queries: Tensor, keys: Tensor, values: Tensor, ends: tuple
    ) -> tuple[Tensor, Tensor]:
        """Computes the states; returns A and U."""
        (m, _, K), V = keys.shape, values.shape[-1]
        A = self.of_segment(self.A, segment)
        self.decay.forward(segment, queries, keys, A, None)
        added = torch.bmm(keys.mT, values, out=self.work("added", m, K, V)).view(segment.n, -1, K, V).unbind(0)
        for i, decay, before, after in self.scan(segment, ends):
            _add_decayed(added[i], before, decay, out=after)
        return A, values

    def backward(
        self, segment: Segment, queries: Tensor, keys: Tensor, A: Tensor, d_reads: Tensor, d_ends: tuple
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradients of the states after each chunk, G [n, BG, K, V], and of V [m, C, V].

        `d_ends` are the carry [BG, K, V] to the segment before, and the gradients of the final states (None: zeros)
        and, to be filled, of the initial ones.
        """
        do = self.of_q(d_reads)
        d_states, G = self._start_backward(queries, do, segment.n)
        for i, decay, d_after, d_before in self.scan_backward(segment, G, d_ends):
            _add_decayed(d_states[i], d_after, decay, out=d_before)
        d_values = torch.bmm(keys, G.flatten(0, 1), out=self.work("d_values", *keys.shape[:2], do.shape[-1]))
        return G, d_values.baddbmm_(A.flatten(1, 2).mT, do)

    def scan(self, segment: Segment, ends: tuple) -> Iterator[tuple[int, Tensor | None, Tensor, Tensor]]:
        """Yields for each chunk i (i, its decay, the state before, the tensor to fill with the state after)."""
        layout, states, offset, decays = self.layout, self.by_chunk, self.offset(segment), self._decays(segment)
        if not self.save and segment.first not in layout.first_chunks:
            states[0].copy_(states[layout.chunks_per_segment])
        for i in range(segment.n):
            chunk = segment.first + i
            if chunk in layout.first_chunks:
                _copy_or_zero(ends[0], layout.first_chunks[chunk], out=states[offset + i])
            yield i, decays[i], states[offset + i], states[offset + i + 1]
            if chunk in layout.last_chunks:
                ends[1][layout.last_chunks[chunk]].copy_(states[offset + i + 1])

    def scan_backward(
        self, segment: Segment, G: Tensor, d_ends: tuple
    ) -> Iterator[tuple[int, Tensor | None, Tensor, Tensor]]:
        """Yields for each chunk i, last first, (i, its decay, the gradient of the state after, the tensor to fill with
        that of the state before). `G` collects the former."""
        layout, each_G, decays, (carry, d_final, d_initial) = self.layout, G.unbind(0), self._decays(segment), d_ends
        each_G[-1].copy_(carry)
        for i in reversed(range(segment.n)):
            chunk = segment.first + i
            if chunk in layout.last_chunks:
                _copy_or_zero(d_final, layout.last_chunks[chunk], out=each_G[i])
            d_before = each_G[i - 1] if i else carry
            yield i, decays[i], each_G[i], d_before
            if chunk in layout.first_chunks:
                d_initial[layout.first_chunks[chunk]].copy_(d_before)

    def of_q(self, x: Tensor) -> Tensor:
        """Of all queries [m, C, R, D] those of q [m, C Q, D]; a copy if k lies between several of them."""
        return x[:, :, : self.layout.Q].flatten(1, 2)

    def _decays(self, segment: Segment) -> tuple[Tensor | None, ...]:
        total = self.decay.total(segment)
        return (None,) * segment.n if total is None else total.unbind(0)

    def _start_backward(self, queries: Tensor, do: Tensor, n: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The gradients of the state before each chunk that its outputs cause, and memory for G."""
        size = queries.shape[-1], do.shape[-1]
        d_states = torch.bmm(self.of_q(queries).mT, do, out=self.work("d_state", len(do), *size)).view(n, -1, *size)
        return d_states.unbind(0), self.work("G", *d_states.shape)


def _copy_or_zero(states: Tensor | None, document: int, out: Tensor) -> None:
    if states is None:
        out.zero_()
    else:
        out.copy_(states[document])


def _add_decayed(x: Tensor, state: Tensor, decay: Tensor | None, out: Tensor) -> None:
    if decay is None:
        torch.add(x, state, out=out)
    else:
        torch.addcmul(x, state, decay, out=out)


class DeltaUpdate(AdditiveUpdate):
    """U depends on the state and is computed in the scan, (I + L)^-1 before it."""

    def update_states(
        self, segment: Segment, queries: Tensor, keys: Tensor, values: Tensor, ends: tuple
    ) -> tuple[Tensor, Tensor]:
        (m, C, _, K), V, n, work = queries.shape, values.shape[-1], segment.n, self.work
        A, L = work("A", m, C, self.layout.Q, C), padded_square(work("L", m, C * (C + 1)), C)
        self.decay.forward(segment, queries, keys, A, L)
        inverse, U = self.of_segment(self.inverse, segment), self.of_segment(self.U, segment)
        unit_lower_inverse(L, inverse, work)
        inverses = padded_square(inverse, C).unflatten(0, (n, -1)).unbind(0)
        key_queries, writes = queries[:, :, -1].view(n, -1, C, K).unbind(0), keys.mT.view(n, -1, K, C).unbind(0)
        each_V, each_U = values.view(n, -1, C, V).unbind(0), U.view(n, -1, C, V).unbind(0)
        for i, decay, before, after in self.scan(segment, ends):
            each_V[i].baddbmm_(key_queries[i], before, alpha=-1)
            torch.bmm(inverses[i], each_V[i], out=each_U[i])
            after.copy_(before) if decay is None else torch.mul(before, decay, out=after)
            after.baddbmm_(writes[i], each_U[i])
        return A, U

    def backward(
        self, segment: Segment, queries: Tensor, keys: Tensor, A: Tensor, d_reads: Tensor, d_ends: tuple
    ) -> tuple[Tensor, Tensor]:
        """Also writes -dV, the gradient of what keys read, to `d_reads[:, :, -1]`."""
        (m, C, _, K), do, V, n, work = queries.shape, self.of_q(d_reads), d_reads.shape[-1], segment.n, self.work
        inverses = padded_square(self.of_segment(self.inverse, segment), C).mT.unflatten(0, (n, -1)).unbind(0)
        d_states, G = self._start_backward(queries, do, n)
        dU = torch.bmm(A.flatten(1, 2).mT, do, out=work("d_values", m, C, V)).view(n, -1, C, V).unbind(0)
        d_values = work("solved", m, C, V)
        dV = d_values.view(n, -1, C, V).unbind(0)
        key_queries, writes = queries[:, :, -1].mT.view(n, -1, K, C).unbind(0), keys.view(n, -1, C, K).unbind(0)
        for i, decay, d_after, d_before in self.scan_backward(segment, G, d_ends):
            dU[i].baddbmm_(writes[i], d_after)
            torch.bmm(inverses[i], dU[i], out=dV[i])
            _add_decayed(d_states[i], d_after, decay, out=d_before)
            d_before.baddbmm_(key_queries[i], dV[i], alpha=-1)
        torch.neg(d_values, out=d_reads[:, :, -1])
        return G, d_values


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
