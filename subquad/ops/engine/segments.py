"""How a sequence is processed: chunks of C tokens, grouped into segments whose temporaries fit in the CPU cache.

A segment is n consecutive chunks of all B G states. All its tensors are batches of m = n B G small matrices
[m, C, ...] in the order (chunk, batch, state). Inputs are copied into the segment and converted to the computation's
dtype there; outputs are copied back. Zeros fill the last chunk, which leaves the state unchanged.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.checks import Inputs

DEFAULT_CHUNK = 32  # 64 is 5 to 20% slower, 16 more
MIN_CHUNK = 16  # in shorter chunks the rounding of the state at every chunk would show in float32
# Elements in the temporaries of a segment, 80 matrices for heads of 64. Twice as many exceed the CPU cache (10%
# slower); with fewer, dispatch dominates.
SEGMENT_ELEMENTS = 1_000_000
MIN_MATRICES, MAX_MATRICES = 8, 160
DEVICE_FACTOR = 32  # an accelerator has no such cache, and a launch costs more


def chunk_length(T: int, chunk_size: int | None) -> int:
    """A power of two: the requested or default chunk size, at least `MIN_CHUNK`, and not above what T tokens need."""
    return 1 << (min(max(1, T), max(MIN_CHUNK, chunk_size or DEFAULT_CHUNK)) - 1).bit_length()


def matrices_per_segment(inputs: Inputs, C: int) -> int:
    """Upper bound of m. Each matrix holds queries, keys and values with their gradients, and two states."""
    K, V = inputs.k.shape[-1], inputs.v.shape[-1]
    elements = K * V + (1 + inputs.queries) * C * (K + V)
    matrices = max(MIN_MATRICES, min(MAX_MATRICES, SEGMENT_ELEMENTS // max(1, elements)))
    return matrices * (1 if inputs.q.device.type == "cpu" else DEVICE_FACTOR)


class Segment(NamedTuple):
    first: int  # index of its first chunk
    n: int  # chunks

    @property
    def chunks(self) -> slice:
        return slice(self.first, self.first + self.n)


class ChunkLayout:
    """Maps tokens to chunks and segments, and documents to the chunks where they begin and end.

    bounds: boundaries of packed documents in tokens, multiples of C (see `DocumentPadding`); None without documents.
    """

    def __init__(self, inputs: Inputs, C: int, bounds: list[int] | None) -> None:
        (self.B, self.T, self.G, _), self.Q = inputs.k.shape, inputs.queries
        self.BG, self.C, self.N = self.B * self.G, C, -(-self.T // C)
        chunk_bounds = [0, self.N] if bounds is None else [b // C for b in bounds]
        self.chunk_ranges = list(itertools.pairwise(chunk_bounds))  # of each document
        self.num_documents = len(self.chunk_ranges)
        self.first_chunks = {a: doc for doc, (a, b) in enumerate(self.chunk_ranges) if a < b}
        self.last_chunks = {b - 1: doc for doc, (a, b) in enumerate(self.chunk_ranges) if a < b}
        self.empty_documents = [doc for doc, (a, b) in enumerate(self.chunk_ranges) if a == b]
        most = max(1, matrices_per_segment(inputs, C) // max(1, self.BG))
        self.chunks_per_segment = max(1, -(-self.N // max(1, -(-self.N // most))))  # segments of nearly equal size

    def segments(self) -> list[Segment]:
        size = self.chunks_per_segment
        return [Segment(c, min(size, self.N - c)) for c in range(0, self.N, size)]

    def gates_to_chunks(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, G] -> [N, BG, C] in float64 for the whole sequence at once, since gates are small."""
        padded = x.new_full((self.B, self.N * self.C, self.G), fill, dtype=torch.float64)
        padded[:, : self.T] = x
        return padded.view(self.B, self.N, self.C, self.G).permute(1, 0, 3, 2).reshape(self.N, self.BG, self.C)


class ChunkedView:
    """A tensor [B, T, G, D], or [B, T, G] as D = 1, viewed as chunks [N, B, G, C, D], to copy segments from and to.

    by_query: a tensor [B, T, H, D] or [B, T, H], viewed as chunks [N, B, G, C, Q, D] with Q = H / G.
    """

    def __init__(self, layout: ChunkLayout, x: Tensor, by_query: bool = False) -> None:
        x = x.unsqueeze(-1) if x.dim() == 3 else x
        x = x.unflatten(2, (layout.G, layout.Q)) if by_query else x
        self.layout, self.num_full = layout, x.shape[1] // layout.C
        length = self.num_full * layout.C
        self.full = x[:, :length].unflatten(1, (self.num_full, layout.C)).transpose(0, 1).transpose(2, 3)
        self.tail = x[:, length:].transpose(1, 2)  # the tokens after the last full chunk, [B, G, fewer than C, D]

    def load(self, segment: Segment, out: Tensor, scale: float = 1.0, by: ChunkedView | None = None) -> Tensor:
        """Copies a segment into `out` [m, C, (Q,) D], times `scale` or `by` [.., 1] per token, padded with zeros."""
        target = self._by_state(out, segment)
        n = min(segment.n, self.num_full - segment.first)
        chunks = slice(segment.first, segment.first + n)
        _copy(self.full[chunks], target if n == segment.n else target[:n], scale if by is None else by.full[chunks])
        if n < segment.n:
            last, length = target[n], self.tail.shape[2]
            _copy(self.tail, last[:, :, :length], scale if by is None else by.tail)
            last[:, :, length:].zero_()
        return out

    def store(self, x: Tensor, segment: Segment, scale: float = 1.0) -> None:
        """Copies x [m, C, (Q,) D], times `scale`, to the tokens of the segment."""
        source = self._by_state(x, segment)
        n = min(segment.n, self.num_full - segment.first)
        _copy(source if n == segment.n else source[:n], self.full[segment.first : segment.first + n], scale)
        if n < segment.n:
            _copy(source[n, :, :, : self.tail.shape[2]], self.tail, scale)

    def _by_state(self, x: Tensor, segment: Segment) -> Tensor:
        return x.view(segment.n, self.layout.B, self.layout.G, *x.shape[1:])


def _copy(source: Tensor, target: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, float) and factor == 1.0:
        target.copy_(source)
    elif source.dtype == target.dtype:
        torch.mul(source, factor, out=target)
    elif target.element_size() >= source.element_size():
        target.copy_(source).mul_(factor)
    else:
        target.copy_(source * factor)


class DocumentPadding:
    """Pads packed documents so that each begins at a chunk boundary. Without `cu_seqlens` it changes nothing."""

    def __init__(self, cu_seqlens: Tensor | None, C: int, device: torch.device) -> None:
        self.bounds: list[int] | None = None
        self.positions: Tensor | None = None
        if cu_seqlens is None:
            return
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        self.bounds = list(itertools.accumulate((-(-length // C) * C for length in lengths), initial=0))
        if self.bounds != bounds:
            positions = [torch.arange(start, start + n) for start, n in zip(self.bounds, lengths, strict=False)]
            self.positions = torch.cat(positions).to(device)

    def pad(self, inputs: Inputs) -> Inputs:
        if self.positions is None or self.bounds is None:
            return inputs
        padded = {}
        for name in ("q", "k", "v", "log_decay", "beta", "input_gate"):
            if (x := getattr(inputs, name)) is not None:
                fill = -torch.inf if name == "input_gate" else 0.0
                whole = x.new_full((1, self.bounds[-1], *x.shape[2:]), fill)
                padded[name] = whole.index_copy(1, self.positions, x)
        return inputs._replace(**padded)

    def unpad(self, x: Tensor) -> Tensor:
        return x if self.positions is None else x.index_select(1, self.positions)
