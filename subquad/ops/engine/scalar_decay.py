"""Products and decays inside a chunk where all channels of a head decay alike, also with mLSTM's input gate.

Every factor is the exponential of a difference of float64 cumulative log decays, so that nothing overflows or cancels.
They are in base two: exp2 is three times as fast as exp. With the cumulative log decays a_i at queries, c_j at keys, s
at the start and e at the end of the chunk:

    A_ij = q_i . k_j 2^(a_i - c_j)     P_i = 2^(a_i - s)     E_j = 2^(e - c_j)     total = 2^(e - s)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subquad.ops.checks import Inputs, compute_dtype
from subquad.ops.engine.product_tree import queries_and_keys
from subquad.ops.engine.segments import ChunkLayout, Segment
from subquad.ops.engine.workspace import Workspace

LOG2E = 1 / math.log(2)
MIN_LOG_DECAY = -1000.0  # its exp is zero even in float64; -inf would make differences of sums NaN
INITIAL_STABILIZER = -(2.0**100)
"""m before the first token: finite, since -inf minus -inf is NaN, and exact in every dtype."""


def stabilized_cum_decay(
    layout: ChunkLayout, f: Tensor, i: Tensor, initial_m: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The cumulative log decay relative to the running maximum of i_t - (f_1 + ... + f_t), of each document, of mLSTM.

    Returns it at the queries, keys, start and end of each chunk, the stabilizer m_t = f_1 + ... + f_t + maximum
    [N, BG, C], and the last m of each document [.., BG].
    """
    N, BG, C = layout.N, layout.BG, layout.C

    def by_chunk(x: Tensor) -> Tensor:
        return x.view(BG, N, x.shape[1] // max(N, 1)).transpose(0, 1)

    f, i = layout.gates_to_chunks(f), layout.gates_to_chunks(i, fill=-torch.inf)
    f, i = (x.transpose(0, 1).reshape(BG, N * C) for x in (f, i))
    documents, last_m = [], []
    initial_m = initial_m.double().reshape(layout.num_documents, BG, 1).clamp_min(INITIAL_STABILIZER)
    for (first, end), document_m in zip(layout.chunk_ranges, initial_m, strict=True):
        t = slice(first * C, end * C)
        sums = f[:, t].cumsum(-1)
        maxima = torch.cat([document_m, i[:, t] - sums], -1).cummax(-1)[0]
        documents.append((sums, maxima[:, 1:], maxima[:, :-1:C]))
        last_m.append(maxima[:, -1] + sums[:, -1] if first < end else maxima[:, -1])
    sums, maxima, maxima_at_start = (torch.cat(x, -1) for x in zip(*documents, strict=True))
    at_queries, at_keys = by_chunk(maxima * -LOG2E), by_chunk((sums - i) * LOG2E)
    cum_decay = at_queries, at_keys, by_chunk(maxima_at_start * -LOG2E), at_queries[..., -1:]
    return cum_decay, by_chunk(sums + maxima), torch.stack(last_m)


class ScalarDecay:
    """Computes products and decays of the chunks of a segment; `decays` is whether anything decays.

    `floor` and `last_m` are of mLSTM: exp(-m_t) [N, BG, C], and the last stabilizer of each document [.., BG].
    """

    def __init__(self, layout: ChunkLayout, inputs: Inputs, work: Workspace) -> None:
        self.layout, self.work, self.input_gate = layout, work, inputs.input_gate is not None
        self.decays, self.floor, self.last_m = inputs.log_decay is not None, None, None
        if inputs.log_decay is None:
            return
        dtype, C = compute_dtype(inputs.q), layout.C
        # cumulative log decays, in base two and float64: [N, BG, C] and, at the start and end of a chunk, [N, BG, 1]
        if inputs.input_gate is None or inputs.stabilizer is None:
            sums = (layout.gates_to_chunks(inputs.log_decay).clamp_min_(MIN_LOG_DECAY) * LOG2E).cumsum(-1)
            at_queries, at_keys, at_start, at_end = sums, sums, torch.zeros_like(sums[..., :1]), sums[..., -1:]
        else:
            gates = inputs.log_decay, inputs.input_gate, inputs.stabilizer
            (at_queries, at_keys, at_start, at_end), m, self.last_m = stabilized_cum_decay(layout, *gates)
            self.floor = (-m).to(dtype).exp()
        self.at_queries, self.at_keys = at_queries, at_keys
        self.from_step = torch.ones(C, C, dtype=dtype, device=at_queries.device).triu_()  # i >= t
        self.after_step = self.from_step.triu(1)
        self.P = torch.exp2((at_queries - at_start).to(dtype)).unsqueeze(-1)
        self.E = torch.exp2((at_end - at_keys).to(dtype)).unsqueeze(-1)
        self.totals = torch.exp2((at_end - at_start).to(dtype)).unsqueeze(-1)

    def total(self, segment: Segment) -> Tensor | None:
        """The decay of the state over each chunk, [n, BG, 1, 1]."""
        return self.totals[segment.chunks] if self.decays else None

    def _pairwise_decay(self, segment: Segment) -> Tensor | None:
        """2^(a_i - c_j) as [m, C, C]; undefined above the diagonal, possibly inf."""
        if not self.decays:
            return None
        s, C = segment.chunks, self.layout.C
        D = self.work("D", segment.n, self.layout.BG, C, C)
        torch.sub(self.at_queries[s].unsqueeze(-1), self.at_keys[s].unsqueeze(-2), out=D)
        return D.exp2_().view(-1, C, C)

    def _factors(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """P as [m, C, 1, 1] and E as [m, C, 1]."""
        s, C = segment.chunks, self.layout.C
        return self.P[s].reshape(-1, C, 1, 1), self.E[s].reshape(-1, C, 1)

    def forward(self, segment: Segment, queries: Tensor, keys: Tensor, A: Tensor, L: Tensor | None) -> None:
        """Fills A [m, C, Q, C], zero above the diagonal, and the lower triangle of L, then decays queries and keys in
        place."""
        (m, C, R, K), Q = queries.shape, self.layout.Q
        D = self._pairwise_decay(segment)
        products = A if L is None else self.work("products", m, C, R, C)
        torch.bmm(queries.view(m, C * R, K), keys.mT, out=products.view(m, C * R, C))
        if L is not None:
            A.copy_(products[:, :, :Q])
            L.copy_(products[:, :, Q]) if D is None else torch.mul(products[:, :, Q], D, out=L)
        if D is not None:
            A.mul_(D.tril_().unsqueeze(2))
        else:
            _clear_above_diagonal(A)
        if self.decays:
            P, E = self._factors(segment)
            queries.mul_(P)
            keys.mul_(E)

    def recompute(
        self, segment: Segment, raw_queries: Tensor, raw_keys: Tensor, A: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns decayed queries, decayed keys and A for the backward pass; A is computed unless it was saved."""
        m, C, R, K = raw_queries.shape
        D = self.D = self._pairwise_decay(segment)
        if D is not None:
            D.tril_()
        self.raw_queries, self.raw_keys = raw_queries, raw_keys
        if A is not None:
            self.products = A
        else:
            flat = torch.bmm(raw_queries.view(m, C * R, K), raw_keys.mT, out=self.work("products", m, C * R, C))
            self.products = flat.view(m, C, R, C)
            if D is not None:
                self.products.mul_(D.unsqueeze(2))
            else:
                _clear_above_diagonal(self.products[:, :, : self.layout.Q])
        if not self.decays:
            self.queries, self.keys = raw_queries, raw_keys
        else:
            P, E = self._factors(segment)
            self.queries, self.keys = queries_and_keys(self.work, "decayed", m, C, R, K)
            torch.mul(raw_queries, P, out=self.queries)
            torch.mul(raw_keys, E, out=self.keys)
        return self.queries, self.keys, self.products[:, :, : self.layout.Q]

    def backward(
        self, segment: Segment, dA: Tensor, d_queries: Tensor, d_keys: Tensor, G: Tensor, S: Tensor, gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Turns the gradients of decayed queries and keys into those of the raw ones, in place.

        Args:
            dA: [m, C, R, C], the gradients of A and, under the delta rule, of L.
            G, S: [n, BG, K, V], the gradients of the states after each chunk, and the states before.
            gates: whether gradients of the gates are needed.

        Returns:
            The gradients of the log decay and of the input gate, [n, BG, C].
        """
        (m, C, R, K), Q = d_queries.shape, self.layout.Q
        d_log_decay = d_input_gate = None
        if gates and self.decays:
            d_log_decay, d_input_gate = self._gate_grads(segment, dA, d_queries, d_keys, G, S)
        if self.D is not None:
            dA.mul_(self.D.unsqueeze(2))
            P, E = self._factors(segment)
            d_queries.mul_(P)
            d_keys.mul_(E)
        else:
            _clear_above_diagonal(dA[:, :, :Q])
        if R > Q:
            dA[:, :, Q].tril_(-1)
        flat = dA.view(m, C * R, C)
        d_queries.view(m, C * R, K).baddbmm_(flat, self.raw_keys)
        d_keys.baddbmm_(flat.mT, self.raw_queries.view(m, C * R, K))
        return d_log_decay, d_input_gate

    def _gate_grads(
        self, segment: Segment, dA: Tensor, d_queries: Tensor, d_keys: Tensor, G: Tensor, S: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The decay of step t acts on every pair i >= t > j, on queries from t on, on keys before t and on the total.

        The usual shorter form, a cumulative sum of q dq - k dk, cancels: its error is a factor of hundreds where decays
        are strong.
        """
        m, C, _, _ = dA.shape
        W = torch.mul(self.products[:, :, 0], dA[:, :, 0], out=self.work("W", m, C, C))
        for role in range(1, dA.shape[2]):
            W.addcmul_(self.products[:, :, role], dA[:, :, role])
        by_query = self.work.dot(self.queries, d_queries).sum(-1)
        by_key = self.work.dot(self.keys, d_keys)
        by_step = torch.matmul(self.from_step, W, out=self.work("by_step", m, C, C)).tril_(-1).sum(-1)
        by_step.addmm_(by_query, self.from_step.mT).addmm_(by_key, self.after_step)
        d_total = self.work.dot(G.flatten(-2), S.flatten(-2)) * self.totals[segment.chunks][..., 0, 0]
        d_log_decay = by_step.view(segment.n, -1, C) + d_total.unsqueeze(-1)
        return d_log_decay, (W.tril_().sum(-2) + by_key).view(segment.n, -1, C) if self.input_gate else None


def _clear_above_diagonal(A: Tensor) -> None:
    """Sets the products A [m, C, Q, C] of queries with later keys to zero."""
    A.transpose(1, 2).tril_()
