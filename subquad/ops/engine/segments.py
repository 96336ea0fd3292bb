"""How a sequence is walked: chunks of C tokens, grouped into segments whose temporaries stay in the cache.

A segment is n consecutive chunks of all B H heads; everything in it is one batch of m = n B H small matrices, shaped
[m, C, ...] in the order (chunk, batch, head). Inputs are copied in (and converted, so that half precision needs no
second copy), outputs are copied out; the tokens that fill the last chunk are zeros, which change no state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 32  # 64 is 5 to 20% slower, 16 more
SMALLEST = 16  # below, the state's rounding at every chunk would show in float32
# A segment has as many chunk matrices as keep so many numbers at work, 80 of them for heads of 64: more leave the
# cache (10% slower at twice as many), fewer pay for launches.
NUMBERS = 1_000_000
FEWEST, MOST = 8, 160


class Segment(NamedTuple):
    first: int  # chunk
    n: int


class Layout:
    """Where the tokens of q-shaped tensors [B, T, H, D] go, and at which chunks documents begin and end."""

    def __init__(
        self, B: int, T: int, H: int, C: int, matrices_per_segment: int, bounds: list[int] | None = None
    ) -> None:
        self.B, self.T, self.H, self.BH = B, T, H, B * H
        self.C, self.matrices, self.bounds = C, matrices_per_segment, bounds
        self.N = -(-T // self.C)
        # `Packing` has made the bounds of documents multiples of C.
        chunks = [0, self.N] if bounds is None else [b // self.C for b in bounds]
        self.spans = list(itertools.pairwise(chunks))
        self.sequences = len(self.spans)
        self.first = {a: n for n, (a, b) in enumerate(self.spans) if a < b}
        self.last = {b - 1: n for n, (a, b) in enumerate(self.spans) if a < b}
        self.empty = [n for n, (a, b) in enumerate(self.spans) if a == b]
        most = max(1, matrices_per_segment // max(1, self.BH))
        self.n = max(1, -(-self.N // max(1, -(-self.N // most))))  # as even as may be

    def segments(self) -> list[Segment]:
        return [Segment(c, min(self.n, self.N - c)) for c in range(0, self.N, self.n)]

    def gates(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """[B, T, H] -> [N, BH, C], the whole sequence at once: gates are small."""
        padded = x.new_full((self.B, self.N * self.C, self.H), fill, dtype=dtype)
        padded[:, : self.T] = x
        return padded.view(self.B, self.N, self.C, self.H).permute(1, 0, 3, 2).reshape(self.N, self.BH, self.C)

    def from_gates(self, x: Tensor) -> Tensor:
        """[N, BH, C] -> [B, T, H], the inverse of `gates`."""
        tokens = x.view(self.N, self.B, self.H, self.C).permute(1, 0, 3, 2)
        return tokens.reshape(self.B, self.N * self.C, self.H)[:, : self.T]


class ChunkedView:
    """A tensor [B, T, H, D], or [B, T, H] as D = 1, seen as chunks [N, B, H, C, D], to copy segments from and to."""

    def __init__(self, layout: Layout, x: Tensor) -> None:
        x = x.unsqueeze(-1) if x.dim() == 3 else x
        B, T, H, D = x.shape
        self.layout, self.count = layout, T // layout.C
        length = self.count * layout.C
        self.whole = x[:, :length].view(B, self.count, layout.C, H, D).permute(1, 0, 3, 2, 4)
        self.rest = x[:, length:].transpose(1, 2)  # the tokens of a part chunk, [B, H, fewer than C, D]

    def load(self, segment: Segment, out: Tensor, scale: float = 1.0, by: ChunkedView | None = None) -> Tensor:
        """Copy a segment into `out` [m, C, D], times a number or `by`, token by token; zeros fill a part chunk."""
        target = self._chunks(out, segment)
        n = min(segment.n, self.count - segment.first)
        here = slice(segment.first, segment.first + n)
        _copy(self.whole[here], target if n == segment.n else target[:n], scale if by is None else by.whole[here])
        if n < segment.n:
            part, length = target[n], self.rest.shape[2]
            _copy(self.rest, part[:, :, :length], scale if by is None else by.rest)
            part[:, :, length:].zero_()
        return out

    def store(self, x: Tensor, segment: Segment, scale: float = 1.0) -> None:
        """Copy [m, C, D] to the segment's tokens, times a number."""
        source = self._chunks(x, segment)
        n = min(segment.n, self.count - segment.first)
        _copy(source if n == segment.n else source[:n], self.whole[segment.first : segment.first + n], scale)
        if n < segment.n:
            _copy(source[n, :, :, : self.rest.shape[2]], self.rest, scale)

    def _chunks(self, x: Tensor, segment: Segment) -> Tensor:
        return x.view(segment.n, self.layout.B, self.layout.H, *x.shape[1:])


class VarlenPadding:
    """Documents of a packed sequence moved apart, so that each begins with a chunk; nothing to do without documents."""

    def __init__(self, q: Tensor, v: Tensor, chunk_size: int | None, cu_seqlens: Tensor | None) -> None:
        B, T, H, K = q.shape
        self.positions: Tensor | None = None
        C = chunk_length(T, chunk_size)
        matrices = chunk_matrices(C, K, v.shape[-1])
        if cu_seqlens is None:
            self.layout = Layout(B, T, H, C, matrices)
            return
        bounds = cu_seqlens.tolist()
        apart, positions = [0], []
        for start, end in itertools.pairwise(bounds):
            positions.append(torch.arange(apart[-1], apart[-1] + end - start))
            apart.append(apart[-1] + -(-(end - start) // C) * C)
        if apart != bounds:
            self.positions, self.length = torch.cat(positions).to(q.device), apart[-1]
        self.layout = Layout(B, apart[-1], H, C, matrices, apart)

    def pack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[1, T, ...] -> [1, T and padding, ...]"""
        if self.positions is None:
            return x
        return x.new_full((1, self.length, *x.shape[2:]), fill).index_copy(1, self.positions, x)

    def unpack(self, x: Tensor) -> Tensor:
        return x if self.positions is None else x.index_select(1, self.positions)


def chunk_length(T: int, chunk_size: int | None) -> int:
    """A power of two: the requested size, or the default, but no more than the sequence needs."""
    return 1 << (min(max(1, T), max(SMALLEST, chunk_size or CHUNK)) - 1).bit_length()


def chunk_matrices(C: int, K: int, V: int) -> int:
    """In a segment; each has its rows, keys and values with their gradients, and two states."""
    return max(FEWEST, min(MOST, NUMBERS // (K * V + 2 * C * (K + V))))


def _copy(source: Tensor, target: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, float) and factor == 1.0:
        target.copy_(source)
    elif source.dtype == target.dtype:
        torch.mul(source, factor, out=target)
    else:
        target.copy_(source).mul_(factor) if target.element_size() >= source.element_size() else target.copy_(
            source * factor
        )


class StateScan:
    """The order in which states pass from chunk to chunk, forward and backward, starting anew at each document."""

    def __init__(self, layout: Layout, chunk_states: Tensor, keep: bool) -> None:
        """`slots`, [chunks + 1, BH, K, V], holds the states of all chunks, or if none is kept of one segment."""
        self.layout, self.slots, self.keep = layout, chunk_states, keep
        self.each = chunk_states.unbind(0)

    def base(self, segment: Segment) -> int:
        """The slot of the segment's first chunk."""
        return segment.first if self.keep else 0

    def starts(self, segment: Segment) -> Tensor:
        """The states before each chunk of the segment, [n, BH, K, V]."""
        return self.slots[self.base(segment) : self.base(segment) + segment.n]

    def forward(self, segment: Segment, initial: Tensor | None, final: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each chunk i of the segment (i, the state before, where to put the state after)."""
        first, last, base = self.layout.first, self.layout.last, self.base(segment)
        if not self.keep and segment.first not in first:
            self.each[0].copy_(self.each[self.layout.n])
        for i in range(segment.n):
            chunk = segment.first + i
            if chunk in first:
                _start(self.each[base + i], initial, first[chunk])
            yield i, self.each[base + i], self.each[base + i + 1]
            if chunk in last:
                final[last[chunk]].copy_(self.each[base + i + 1])

    def backward(
        self, segment: Segment, ends: Tensor, carry: Tensor, d_final: Tensor | None, d_initial: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each chunk i, last first: (i, the gradient of the state after, where to put that of the state before).

        `ends` [n, BH, K, V] collects the former; `carry` [BH, K, V] passes to the segment before this one.
        """
        first, last = self.layout.first, self.layout.last
        each = ends.unbind(0)
        each[-1].copy_(carry)
        for i in reversed(range(segment.n)):
            chunk = segment.first + i
            if chunk in last:
                _start(each[i], d_final, last[chunk])
            target = each[i - 1] if i else carry
            yield i, each[i], target
            if chunk in first:
                d_initial[first[chunk]].copy_(target)


def _start(slot: Tensor, states: Tensor | None, n: int) -> None:
    if states is None:
        slot.zero_()
    else:
        slot.copy_(states[n])
