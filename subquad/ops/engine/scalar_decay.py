"""The inside of a chunk when all channels of a head decay alike, also under mLSTM's exponential input gate.

Everything is a difference of float64 levels (in powers of two, because exp2 is three times as fast as exp), so that
nothing overflows and nothing cancels. With the levels of rows r_i, columns c_j, the chunk's start s and its end e:

    A_ij = rows_i . keys_j 2^(r_i - c_j)     P_i = 2^(r_i - s)     E_j = 2^(e - c_j)     total = 2^(e - s)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.engine.product_tree import tokens
from subquad.ops.engine.segments import Layout, Segment
from subquad.ops.engine.workspace import Workspace

LOG2E = 1 / math.log(2)
MIN_LOG_DECAY = -1000.0  # exp of it is zero even in float64; -inf would make differences of sums NaN


class LogCumDecay(NamedTuple):
    rows: Tensor  # [N, BH, C] float64
    columns: Tensor  # [N, BH, C]
    start: Tensor  # [N, BH, 1]
    end: Tensor  # [N, BH, 1]


def cumulative_decay(layout: Layout, log_decay: Tensor) -> LogCumDecay:
    """Levels of a decay [B, T, H]: its running sum within the chunk."""
    since = (layout.gates(log_decay, torch.float64).clamp_min_(MIN_LOG_DECAY) * LOG2E).cumsum(-1)
    return LogCumDecay(since, since, torch.zeros_like(since[..., :1]), since[..., -1:])


class ScalarDecay:
    """Products and decays of the chunks of one segment; `levels` None is no decay at all."""

    def __init__(
        self, layout: Layout, levels: LogCumDecay | None, work: Workspace, dtype: torch.dtype, input_gate: bool = False
    ) -> None:
        self.layout, self.levels, self.work, self.input_gate = layout, levels, work, input_gate
        self.P = self.E = self.totals = None
        if levels is not None:
            self.from_here = torch.ones(layout.C, layout.C, dtype=dtype, device=levels.rows.device).triu_()  # i >= t
            self.after = self.from_here.triu(1)
            self.P = torch.exp2((levels.rows - levels.start).to(dtype)).unsqueeze(-1)
            self.E = torch.exp2((levels.end - levels.columns).to(dtype)).unsqueeze(-1)
            self.totals = torch.exp2((levels.end - levels.start).to(dtype)).unsqueeze(-1)

    def total(self, segment: Segment) -> Tensor | None:
        return None if self.totals is None else self.totals[segment.first : segment.first + segment.n]

    def _decay(self, segment: Segment) -> Tensor | None:
        """2^(r_i - c_j) as [m, C, C]; above the diagonal anything, inf included."""
        if self.levels is None:
            return None
        s, C = slice(segment.first, segment.first + segment.n), self.layout.C
        D = self.work("D", segment.n, self.layout.BH, C, C)
        torch.sub(self.levels.rows[s].unsqueeze(-1), self.levels.columns[s].unsqueeze(-2), out=D)
        return D.exp2_().view(-1, C, C)

    def _factors(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """P as [m, C, 1, 1] and E as [m, C, 1]."""
        assert self.P is not None
        assert self.E is not None
        s, C = slice(segment.first, segment.first + segment.n), self.layout.C
        return self.P[s].reshape(-1, C, 1, 1), self.E[s].reshape(-1, C, 1)

    def forward(self, segment: Segment, rows: Tensor, keys: Tensor, A: Tensor, L: Tensor | None) -> None:
        """Fill A [m, C, C] (lower triangular) and L (its lower triangle counts), then decay rows and keys in place."""
        m, C, R, K = rows.shape
        D = self._decay(segment)
        products = A if R == 1 else self.work("products", m, C * R, C)
        torch.bmm(rows.view(m, C * R, K), keys.mT, out=products)
        if L is not None:
            A.copy_(products.view(m, C, R, C)[:, :, 0])
            L.copy_(products.view(m, C, R, C)[:, :, 1]) if D is None else torch.mul(
                products.view(m, C, R, C)[:, :, 1], D, out=L
            )
        if D is not None:
            A.mul_(D)
        A.tril_()
        if self.levels is not None:
            P, E = self._factors(segment)
            rows.mul_(P)
            keys.mul_(E)

    def recompute(
        self, segment: Segment, raw_rows: Tensor, raw_keys: Tensor, A: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the backward pass needs of the forward one: decayed rows and keys, and A, if it was not kept."""
        m, C, R, K = raw_rows.shape
        D = self.D = self._decay(segment)
        if D is not None:
            D.tril_()
        self.raw_rows, self.raw_keys = raw_rows, raw_keys
        if A is not None:
            self.products = A.unsqueeze(2)
        else:
            flat = torch.bmm(raw_rows.view(m, C * R, K), raw_keys.mT, out=self.work("products", m, C * R, C))
            self.products = flat.view(m, C, R, C)
            if D is not None:
                self.products.mul_(D.unsqueeze(2))
            else:
                self.products[:, :, 0].tril_()
        if self.levels is None:
            self.rows, self.keys = raw_rows, raw_keys
        else:
            P, E = self._factors(segment)
            self.rows, self.keys = tokens(self.work, "decayed", m, C, R, K)
            torch.mul(raw_rows, P, out=self.rows)
            torch.mul(raw_keys, E, out=self.keys)
        return self.rows, self.keys, self.products[:, :, 0]

    def backward(
        self, segment: Segment, dA: Tensor, d_rows: Tensor, d_keys: Tensor, d_state: Tensor, state: Tensor, gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """From the gradients of A (all roles, [m, C, R, C]), decayed rows and keys, and the states after each chunk to
        those of the raw rows and keys, in place, and of the log decay and the input gate, [n, BH, C]."""
        m, C, R, K = d_rows.shape
        d_decay = d_input = None
        if gates and self.levels is not None:
            d_decay, d_input = self._gate_gradients(segment, dA, d_rows, d_keys, d_state, state)
        if self.D is not None:
            dA.mul_(self.D.unsqueeze(2))
            P, E = self._factors(segment)
            d_rows.mul_(P)
            d_keys.mul_(E)
        else:
            dA[:, :, 0].tril_()
        if R == 2:
            dA[:, :, 1].tril_(-1)
        flat = dA.view(m, C * R, C)
        d_rows.view(m, C * R, K).baddbmm_(flat, self.raw_keys)
        d_keys.baddbmm_(flat.mT, self.raw_rows.view(m, C * R, K))
        return d_decay, d_input

    def _gate_gradients(
        self, segment: Segment, dA: Tensor, d_rows: Tensor, d_keys: Tensor, d_state: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The decay of step t acts on every pair i >= t > j, on rows from t on, on keys before t and on the total.

        The short way round, a running sum of q dq - k dk, cancels: wrong by hundreds where decays are strong.
        """
        m, C, _, _ = dA.shape
        W = torch.mul(self.products[:, :, 0], dA[:, :, 0], out=self.work("W", m, C, C))
        if dA.shape[2] == 2:
            W.addcmul_(self.products[:, :, 1], dA[:, :, 1])
        by_row = self.work.dot(self.rows, d_rows)
        by_row = by_row.sum(-1) if dA.shape[2] == 2 else by_row.squeeze(-1)
        by_key = self.work.dot(self.keys, d_keys)
        crossing = torch.matmul(self.from_here, W, out=self.work("crossing", m, C, C)).tril_(-1).sum(-1)
        crossing.addmm_(by_row, self.from_here.mT).addmm_(by_key, self.after)
        total = self.total(segment)
        assert total is not None
        d_total = self.work.dot(d_state.flatten(-2), state.flatten(-2)) * total[..., 0, 0]
        d_decay = crossing.view(segment.n, -1, C) + d_total.unsqueeze(-1)
        return d_decay, (W.tril_().sum(-2) + by_key).view(segment.n, -1, C) if self.input_gate else None
