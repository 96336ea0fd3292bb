"""How a sequence is processed: chunks of C tokens, grouped into segments whose temporaries fit in the CPU cache.

A segment is n consecutive chunks of all B H heads. All its tensors are batches of m = n B H small matrices
[m, C, ...] in the order (chunk, batch, head). Inputs are copied into the segment and converted to the computation's
dtype there; outputs are copied back. Zeros fill the last chunk, which leaves the state unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_CHUNK = 32  # 64 is 5 to 20% slower, 16 more
MIN_CHUNK = 16  # in shorter chunks the rounding of the state at every chunk would show in float32
# Elements in the temporaries of a segment, 80 matrices for heads of 64. Twice as many exceed the CPU cache (10%
# slower); with fewer, dispatch dominates.
SEGMENT_ELEMENTS = 1_000_000
MIN_MATRICES, MAX_MATRICES = 8, 160
DEVICE_FACTOR = 32  # an accelerator has no such cache, and a launch costs more


class Segment(NamedTuple):
    first: int  # index of its first chunk
    n: int  # chunks


class ChunkLayout:
    """Maps tokens of tensors [B, T, H, D] to chunks and segments, and documents to the chunks where they begin and end.

    Args:
        matrices_per_segment: upper bound of n B H, see `count_matrices_per_segment`.
        bounds: boundaries of packed documents in tokens, multiples of C (see `VarlenPadding`); None without documents.
    """

    def __init__(
        self, B: int, T: int, H: int, C: int, matrices_per_segment: int, bounds: list[int] | None = None
    ) -> None:
        self.B, self.T, self.H, self.BH = B, T, H, B * H
        self.C, self.matrices_per_segment, self.bounds = C, matrices_per_segment, bounds
        self.N = -(-T // self.C)
        chunk_bounds = [0, self.N] if bounds is None else [b // self.C for b in bounds]
        self.chunk_ranges = list(itertools.pairwise(chunk_bounds))  # of each document
        self.num_documents = len(self.chunk_ranges)
        self.first_chunks = {a: doc for doc, (a, b) in enumerate(self.chunk_ranges) if a < b}
        self.last_chunks = {b - 1: doc for doc, (a, b) in enumerate(self.chunk_ranges) if a < b}
        self.empty_documents = [doc for doc, (a, b) in enumerate(self.chunk_ranges) if a == b]
        most = max(1, matrices_per_segment // max(1, self.BH))
        self.chunks_per_segment = max(1, -(-self.N // max(1, -(-self.N // most))))  # segments of nearly equal size

    def segments(self) -> list[Segment]:
        size = self.chunks_per_segment
        return [Segment(c, min(size, self.N - c)) for c in range(0, self.N, size)]

    def gates_to_chunks(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        """[B, T, H] -> [N, BH, C] for the whole sequence at once, since gates are small."""
        padded = x.new_full((self.B, self.N * self.C, self.H), fill, dtype=dtype)
        padded[:, : self.T] = x
        return padded.view(self.B, self.N, self.C, self.H).permute(1, 0, 3, 2).reshape(self.N, self.BH, self.C)

    def chunks_to_gates(self, x: Tensor) -> Tensor:
        """[N, BH, C] -> [B, T, H], the inverse of `gates_to_chunks`."""
        tokens = x.view(self.N, self.B, self.H, self.C).permute(1, 0, 3, 2)
        return tokens.reshape(self.B, self.N * self.C, self.H)[:, : self.T]


class ChunkedView:
    """A tensor [B, T, H, D], or [B, T, H] as D = 1, viewed as chunks [N, B, H, C, D], to copy segments from and to."""

    def __init__(self, layout: ChunkLayout, x: Tensor) -> None:
        x = x.unsqueeze(-1) if x.dim() == 3 else x
        B, T, H, D = x.shape
        self.layout, self.num_full = layout, T // layout.C
        length = self.num_full * layout.C
        self.full = x[:, :length].view(B, self.num_full, layout.C, H, D).permute(1, 0, 3, 2, 4)
        self.tail = x[:, length:].transpose(1, 2)  # the tokens after the last full chunk, [B, H, fewer than C, D]

    def load(self, segment: Segment, out: Tensor, scale: float = 1.0, by: ChunkedView | None = None) -> Tensor:
        """Copies a segment into `out` [m, C, D], times `scale` or times `by` [.., 1] per token, padded with zeros."""
        target = self._by_head(out, segment)
        n = min(segment.n, self.num_full - segment.first)
        chunks = slice(segment.first, segment.first + n)
        _copy(self.full[chunks], target if n == segment.n else target[:n], scale if by is None else by.full[chunks])
        if n < segment.n:
            last, length = target[n], self.tail.shape[2]
            _copy(self.tail, last[:, :, :length], scale if by is None else by.tail)
            last[:, :, length:].zero_()
        return out

    def store(self, x: Tensor, segment: Segment, scale: float = 1.0) -> None:
        """Copies x [m, C, D], times `scale`, to the tokens of the segment."""
        source = self._by_head(x, segment)
        n = min(segment.n, self.num_full - segment.first)
        _copy(source if n == segment.n else source[:n], self.full[segment.first : segment.first + n], scale)
        if n < segment.n:
            _copy(source[n, :, :, : self.tail.shape[2]], self.tail, scale)

    def _by_head(self, x: Tensor, segment: Segment) -> Tensor:
        return x.view(segment.n, self.layout.B, self.layout.H, *x.shape[1:])


def _copy(source: Tensor, target: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, float) and factor == 1.0:
        target.copy_(source)
    elif source.dtype == target.dtype:
        torch.mul(source, factor, out=target)
    elif target.element_size() >= source.element_size():
        target.copy_(source).mul_(factor)
    else:
        target.copy_(source * factor)


class VarlenPadding:
    """Pads packed documents so that each begins at a chunk boundary. Without `cu_seqlens` it changes nothing."""

    def __init__(self, q: Tensor, v: Tensor, chunk_size: int | None, cu_seqlens: Tensor | None) -> None:
        B, T, H, K = q.shape
        self.positions: Tensor | None = None
        C = chunk_length(T, chunk_size)
        matrices = count_matrices_per_segment(C, K, v.shape[-1]) * (1 if q.device.type == "cpu" else DEVICE_FACTOR)
        if cu_seqlens is None:
            self.layout = ChunkLayout(B, T, H, C, matrices)
            return
        bounds = cu_seqlens.tolist()
        padded_bounds, positions = [0], []
        for start, end in itertools.pairwise(bounds):
            padded_start, length = padded_bounds[-1], end - start
            positions.append(torch.arange(padded_start, padded_start + length))
            padded_bounds.append(padded_start + -(-length // C) * C)
        if padded_bounds != bounds:
            self.positions, self.padded_length = torch.cat(positions).to(q.device), padded_bounds[-1]
        self.layout = ChunkLayout(B, padded_bounds[-1], H, C, matrices, padded_bounds)

    def pad(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[1, T, ...] -> [1, padded length, ...]"""
        if self.positions is None:
            return x
        return x.new_full((1, self.padded_length, *x.shape[2:]), fill).index_copy(1, self.positions, x)

    def unpad(self, x: Tensor) -> Tensor:
        return x if self.positions is None else x.index_select(1, self.positions)


def chunk_length(T: int, chunk_size: int | None) -> int:
    """A power of two: the requested or default chunk size, at least `MIN_CHUNK`, and not above what T tokens need."""
    return 1 << (min(max(1, T), max(MIN_CHUNK, chunk_size or DEFAULT_CHUNK)) - 1).bit_length()


def count_matrices_per_segment(C: int, K: int, V: int) -> int:
    """Each chunk matrix holds queries, keys and values with their gradients, and two states."""
    return max(MIN_MATRICES, min(MAX_MATRICES, SEGMENT_ELEMENTS // (K * V + 2 * C * (K + V))))


class StateScan:
    """Passes states from chunk to chunk, forward, and their gradients, backward; restarts at every document.

    Args:
        chunk_states: [chunks + 1, BH, K, V] memory for the state before each chunk: of all chunks if `save`, else of
            one segment.
    """

    def __init__(self, layout: ChunkLayout, chunk_states: Tensor, save: bool) -> None:
        self.layout, self.chunk_states, self.save = layout, chunk_states, save
        self.by_chunk = chunk_states.unbind(0)

    def offset(self, segment: Segment) -> int:
        """Index in `chunk_states` of the segment's first chunk."""
        return segment.first if self.save else 0

    def before(self, segment: Segment) -> Tensor:
        """The states before each chunk of the segment, [n, BH, K, V]."""
        return self.chunk_states[self.offset(segment) : self.offset(segment) + segment.n]

    def forward(
        self, segment: Segment, initial_state: Tensor | None, final_state: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields for each chunk i of the segment (i, the state before, the tensor to fill with the state after)."""
        layout, states, offset = self.layout, self.by_chunk, self.offset(segment)
        if not self.save and segment.first not in layout.first_chunks:
            states[0].copy_(states[layout.chunks_per_segment])
        for i in range(segment.n):
            chunk = segment.first + i
            if chunk in layout.first_chunks:
                _copy_or_zero(initial_state, layout.first_chunks[chunk], out=states[offset + i])
            yield i, states[offset + i], states[offset + i + 1]
            if chunk in layout.last_chunks:
                final_state[layout.last_chunks[chunk]].copy_(states[offset + i + 1])

    def backward(
        self, segment: Segment, G: Tensor, carry: Tensor, d_final: Tensor | None, d_initial: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields for each chunk i, last first: (i, the gradient of the state after, the tensor to fill with that of the
        state before). `G` [n, BH, K, V] collects the former; `carry` [BH, K, V] passes on to the previous segment.
        """
        layout, by_chunk = self.layout, G.unbind(0)
        by_chunk[-1].copy_(carry)
        for i in reversed(range(segment.n)):
            chunk = segment.first + i
            if chunk in layout.last_chunks:
                _copy_or_zero(d_final, layout.last_chunks[chunk], out=by_chunk[i])
            d_before = by_chunk[i - 1] if i else carry
            yield i, by_chunk[i], d_before
            if chunk in layout.first_chunks:
                d_initial[layout.first_chunks[chunk]].copy_(d_before)


def _copy_or_zero(states: Tensor | None, document: int, out: Tensor) -> None:
    if states is None:
        out.zero_()
    else:
        out.copy_(states[document])
