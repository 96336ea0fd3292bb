"""What writes the state, additively or by the delta rule: the part of `engine` that scans over the chunks of a segment.

In the notation of `engine`, for m = n B H chunk matrices: rows [m, C, R, K] and keys [m, C, K] decayed, values
[m, C, V], reads and their gradients [m, C, (R,) V], states [n, BH, K, V].
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
    """What the forward pass leaves for the backward one; without gradients the same, for one segment at a time."""

    states: StateScan
    A: Tensor | None = None  # [N BH, C, C]; additive
    U: Tensor | None = None  # [N BH, C, V]; delta rule
    inverse: Tensor | None = None  # [N BH, C (C + 1)]; delta rule, see `unit_inverse`

    def part(self, x: Tensor | None, segment: Segment) -> Tensor:
        """The segment's matrices of A, U or inverse."""
        assert x is not None
        BH = self.states.layout.BH
        return x[self.states.base(segment) * BH :][: segment.n * BH]


def additive_forward(
    segment: Segment,
    frame: Decay,
    kept: SavedForBackward,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    initial: Tensor | None,
    final: Tensor,
    work: Workspace,
) -> Tensor:
    """O [m, C, V]; the states pass from chunk to chunk by one multiplication each."""
    m, C, _, K = rows.shape
    V = values.shape[-1]
    A = kept.part(kept.A, segment)
    frame.forward(segment, rows, keys, A, None)
    added = torch.bmm(keys.mT, values, out=work("added", m, K, V)).view(segment.n, -1, K, V).unbind(0)
    total = _each(frame.total(segment))
    for i, before, after in kept.states.forward(segment, initial, final):
        if total is None:
            torch.add(added[i], before, out=after)
        else:
            torch.addcmul(added[i], before, total[i], out=after)
    reads = torch.bmm(A, values, out=work("reads", m, C, V))
    return reads.baddbmm_(rows.view(m, C, K), kept.states.starts(segment).flatten(0, 1))


def additive_backward(
    segment: Segment,
    frame: Decay,
    kept: SavedForBackward,
    decayed: tuple[Tensor, Tensor, Tensor],
    reads: Tensor,
    d_final: Tensor | None,
    d_initial: Tensor,
    carry: Tensor,
    work: Workspace,
) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each chunk, G [n, BH, K, V], and of V [m, C, V]."""
    rows, keys, A = decayed
    m, C, _, K = rows.shape
    do, V = reads[:, :, 0], reads.shape[-1]
    read = torch.bmm(rows[:, :, 0].mT, do, out=work("read", m, K, V)).view(segment.n, -1, K, V).unbind(0)
    ends, total = work("ends", segment.n, *read[0].shape), _each(frame.total(segment))
    for i, G, before in kept.states.backward(segment, ends, carry, d_final, d_initial):
        if total is None:
            torch.add(read[i], G, out=before)
        else:
            torch.addcmul(read[i], G, total[i], out=before)
    d_values = torch.bmm(keys, ends.flatten(0, 1), out=work("d_values", m, C, V))
    return ends, d_values.baddbmm_(A.mT, do)


def delta_forward(
    segment: Segment,
    frame: Decay,
    kept: SavedForBackward,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    initial: Tensor | None,
    final: Tensor,
    work: Workspace,
) -> Tensor:
    """O [m, C, V]; U depends on the state, so that it is found inside the scan, its triangular system solved before."""
    m, C, _, K = rows.shape
    V, n = values.shape[-1], segment.n
    A, L = work("A", m, C, C), square(work("L", m, C * (C + 1)), C)
    frame.forward(segment, rows, keys, A, L)
    inverse, U = kept.part(kept.inverse, segment), kept.part(kept.U, segment).view(n, -1, C, V)
    unit_inverse(L, inverse, work)
    solve = square(inverse, C).unflatten(0, (n, -1)).unbind(0)
    key_rows, writes = rows[:, :, 1].view(n, -1, C, K).unbind(0), keys.mT.view(n, -1, K, C).unbind(0)
    each_v, each_U, total = values.view(n, -1, C, V).unbind(0), U.unbind(0), _each(frame.total(segment))
    for i, before, after in kept.states.forward(segment, initial, final):
        each_v[i].baddbmm_(key_rows[i], before, alpha=-1)
        torch.bmm(solve[i], each_v[i], out=each_U[i])
        after.copy_(before) if total is None else torch.mul(before, total[i], out=after)
        after.baddbmm_(writes[i], each_U[i])
    reads = torch.bmm(A, U.flatten(0, 1), out=work("reads", m, C, V))
    return reads.baddbmm_(rows[:, :, 0], kept.states.starts(segment).flatten(0, 1))


def delta_backward(
    segment: Segment,
    frame: Decay,
    kept: SavedForBackward,
    decayed: tuple[Tensor, Tensor, Tensor],
    reads: Tensor,
    d_final: Tensor | None,
    d_initial: Tensor,
    carry: Tensor,
    work: Workspace,
) -> tuple[Tensor, Tensor]:
    """As `additive_backward`; also writes -dV, the gradient of what keys read, into the second role of `reads`."""
    rows, keys, A = decayed
    m, C, _, K = rows.shape
    do, V, n = reads[:, :, 0], reads.shape[-1], segment.n
    solve = square(kept.part(kept.inverse, segment), C).mT.unflatten(0, (n, -1)).unbind(0)
    read = torch.bmm(rows[:, :, 0].mT, do, out=work("read", m, K, V)).view(n, -1, K, V).unbind(0)
    d_values = torch.bmm(A.mT, do, out=work("d_values", m, C, V)).view(n, -1, C, V).unbind(0)
    all_solved = work("solved", n, m // n, C, V)
    key_reads, writes = rows[:, :, 1].mT.view(n, -1, K, C).unbind(0), keys.view(n, -1, C, K).unbind(0)
    solved, ends, total = all_solved.unbind(0), work("ends", n, *read[0].shape), _each(frame.total(segment))
    for i, G, before in kept.states.backward(segment, ends, carry, d_final, d_initial):
        d_values[i].baddbmm_(writes[i], G)
        torch.bmm(solve[i], d_values[i], out=solved[i])
        torch.add(read[i], G, out=before) if total is None else torch.addcmul(read[i], G, total[i], out=before)
        before.baddbmm_(key_reads[i], solved[i], alpha=-1)
    flat = all_solved.view(m, C, V)
    torch.neg(flat, out=reads[:, :, 1])
    return ends, flat


def _each(total: Tensor | None) -> tuple[Tensor, ...] | None:
    return None if total is None else total.unbind(0)


def square(flat: Tensor, C: int) -> Tensor:
    """[m, C (C + 1)] as [m, C, C]. With a gap of C numbers after each matrix all diagonal blocks of a size are equally
    far apart, so that those of all matrices are one batch."""
    return flat.as_strided((flat.shape[0], C, C), (C * (C + 1), C, 1), flat.storage_offset())


def unit_inverse(L: Tensor, inverse: Tensor, work: Workspace) -> None:
    """(I + L)^-1 of a strictly lower triangular L by doubling blocks, half the time of `solve_triangular`:

        inverse of [[A, 0], [B, C]] = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]

    Both are `square`; `inverse` [m, C (C + 1)] comes with zeros above its diagonal, L's is not read there.
    """
    m, C, _ = L.shape
    square(inverse, C).diagonal(0, 1, 2).fill_(1.0)
    l_at, at = L.storage_offset(), inverse.storage_offset()
    h = 1
    while h < C:
        size, strides = (m * C // (2 * h), h, h), (2 * h * (C + 1), C, 1)
        below = L.as_strided(size, strides, l_at + h * C)
        corner = inverse.as_strided(size, strides, at + h * C)
        if h == 1:
            torch.neg(below, out=corner)
        else:
            first, second = inverse.as_strided(size, strides, at), inverse.as_strided(size, strides, at + h * (C + 1))
            half = torch.bmm(second, below, out=work("half", *size))
            torch.neg(torch.bmm(half, first, out=work("whole", *size)), out=corner)
        h *= 2
