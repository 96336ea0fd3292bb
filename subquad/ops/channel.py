"""The inside of a chunk when every channel decays on its own: a product tree of halves, exact for any decay.

Exponentiating running sums would overflow and a tensor [C, C, K] of all decays costs more than everything else. So, at
every level, blocks of h tokens pair up: rows carry the decay since their block's start, keys the decay to their block's
end, and (right rows) (left keys)^T is a block of A. Then right rows take the left block's total decay and left keys the
right block's. No factor exceeds one, each total is exponentiated once, and at the root stand P rows and E keys. The
backward pass walks the same tree down; the gradients of the totals add up to that of the log decay without cancelling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.memory import Workspace
from subquad.ops.scalar import LOG2E
from subquad.ops.segments import Layout, Segment, Tokens

SMALL = 400  # multiplications, below which `bmm` does not call its library


class ChannelFrame:
    """As `ScalarFrame`, for a log decay [B, T, H, K]."""

    def __init__(self, layout: Layout, log_decay: Tensor, work: Workspace) -> None:
        self.layout, self.log_decay, self.work = layout, Tokens(layout, log_decay), work

    def total(self, segment: Segment) -> Tensor:
        return self.root.view(segment.n, self.layout.BH, -1, 1)

    def _load_decay(self, segment: Segment, K: int) -> None:
        """For every level the factors of its blocks, [pairs, 2, 1, K]; h = 1 are the steps themselves."""
        C, m = self.layout.C, segment.n * self.layout.BH
        total = self.log_decay.load(segment, self.work("log_decay", m, C, K), LOG2E)
        self.factors, h = [], 1
        while h < C:
            pairs = m * C // (2 * h)
            factor = torch.exp2(total, out=self.work(f"factor{h}", *total.shape))
            self.factors.append(factor.view(pairs, 2, 1, K))
            total = torch.sum(total.view(pairs, 2, K), 1, out=self.work(f"total{h}", pairs, K))
            h *= 2
        self.root = torch.exp2(total).view(m, K)
        self.step = self.factors[0] if self.factors else self.root

    def _climb(self, rows: Tensor, keys: Tensor, A: Tensor, L: Tensor | None, keep: bool) -> None:
        """Decay rows and keys in place up the tree, filling A and L on the way; keep each level's operands if asked."""
        m, C, R, K = rows.shape
        self.kept = []
        A.zero_()
        A.diagonal(0, 1, 2).copy_(self.work.dot(rows[:, :, 0], keys))
        rows.mul_(self.step.view(m, C, 1, K))
        for level, factor in enumerate(self.factors):
            h = 1 << level
            pairs = m * C // (2 * h)
            right, left = rows.view(pairs, 2, h * R, K)[:, 1], keys.view(pairs, 2, h, K)[:, 0]
            if keep:
                right_was = self.work(f"right{level}", pairs, h * R, K).copy_(right)
                left_was = self.work(f"left{level}", pairs, h, K).copy_(left)
                self.kept.append((right_was, left_was))
            self._fill(right, left, A, L, h, R)
            right.mul_(factor[:, 0])
            left.mul_(factor[:, 1])

    def _fill(self, right: Tensor, left: Tensor, A: Tensor, L: Tensor | None, h: int, R: int) -> None:
        pairs, _, _ = right.shape
        if h == 1:
            block = self.work.dot(right, left)
        else:
            block = torch.bmm(right, left.mT, out=self.work("block", pairs, h * R, h))
        block = block.view(A.shape[0], -1, h, R, h)
        _blocks(A, h).copy_(block[:, :, :, 0])
        if L is not None:
            _blocks(L, h).copy_(block[:, :, :, 1])

    def forward(self, segment: Segment, rows: Tensor, keys: Tensor, A: Tensor, L: Tensor | None) -> None:
        self._load_decay(segment, rows.shape[-1])
        self._climb(rows, keys, A, L, keep=False)

    def recompute(self, segment: Segment, raw_rows: Tensor, raw_keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, C, R, K = raw_rows.shape
        self._load_decay(segment, K)
        rows = self.work("rows", m, C, R, K).copy_(raw_rows)
        keys = self.work("keys", m, C, K).copy_(raw_keys)
        self.raw_rows, self.raw_keys = raw_rows, raw_keys
        A = self.work("A", m, C, C)
        self._climb(rows, keys, A, None, keep=True)
        return rows, keys, A

    def backward(
        self, segment: Segment, dA: Tensor, d_rows: Tensor, d_keys: Tensor, d_state: Tensor, state: Tensor, gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        m, C, R, K = d_rows.shape
        d_total = None
        if gates:
            d_total = self.work.dot(d_state, state).view(m, K).mul_(self.root)
        for level in reversed(range(len(self.factors))):
            d_total = self._descend(level, dA, d_rows, d_keys, d_total)
        d_rows.mul_(self.step.view(m, C, 1, K))
        if d_total is not None:
            d_total = d_total.view(m, C, K)
            for role in range(R):
                d_total.addcmul_(self.raw_rows[:, :, role], d_rows[:, :, role])
        diagonal = dA[:, :, 0].diagonal(0, 1, 2).unsqueeze(-1)
        d_rows[:, :, 0].addcmul_(self.raw_keys, diagonal)
        d_keys.addcmul_(self.raw_rows[:, :, 0], diagonal)
        return d_total, None

    def _descend(self, level: int, dA: Tensor, d_rows: Tensor, d_keys: Tensor, d_total: Tensor | None) -> Tensor | None:
        """One level down: through the multiplication by the totals, then through the block of A."""
        m, C, R, K = d_rows.shape
        h, (right, left), factor = 1 << level, self.kept[level], self.factors[level]
        pairs = m * C // (2 * h)
        d_right, d_left = d_rows.view(pairs, 2, h * R, K)[:, 1], d_keys.view(pairs, 2, h, K)[:, 0]
        scratch, narrow = self.work("scratch", pairs, h * R, K), self.work("narrow", pairs, h, K)
        if d_total is not None:
            below = self.work(f"below{level}", pairs, 2, K)
            torch.sum(torch.mul(right, d_right, out=scratch), 1, out=below[:, 0])
            torch.sum(torch.mul(left, d_left, out=narrow), 1, out=below[:, 1])
            d_total = below.mul_(factor.view(pairs, 2, K)).add_(d_total.view(pairs, 1, K))
        block = self.work("block", pairs, h * R, h)
        block.view(m, -1, h, R, h).copy_(_role_blocks(dA, h))
        _product(block, left, scratch)
        _product(block.mT, right, narrow)
        torch.addcmul(scratch, d_right, factor[:, 0], out=d_right)
        torch.addcmul(narrow, d_left, factor[:, 1], out=d_left)
        return d_total


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """x @ y for many small matrices; the smallest term by term, several times as fast as PyTorch's loop for them."""
    if x.shape[1] * x.shape[2] * y.shape[2] >= SMALL:
        torch.bmm(x, y, out=out)
        return
    torch.mul(x[:, :, :1], y[:, :1], out=out)
    for j in range(1, x.shape[2]):
        out.addcmul_(x[:, :, j : j + 1], y[:, j : j + 1])


def _blocks(A: Tensor, h: int) -> Tensor:
    """The blocks (right, left) of size h of [m, C, C] below the diagonal, [m, C / 2h, h, h]."""
    m, C, _ = A.shape
    matrix, row, _ = A.stride()
    return A.as_strided((m, C // (2 * h), h, h), (matrix, 2 * h * (row + 1), row, 1), A.storage_offset() + h * row)


def _role_blocks(A: Tensor, h: int) -> Tensor:
    """The same blocks of [m, C, R, C], [m, C / 2h, h, R, h]."""
    m, C, R, _ = A.shape
    matrix, row, role, _ = A.stride()
    shape, strides = (m, C // (2 * h), h, R, h), (matrix, 2 * h * (row + 1), row, role, 1)
    return A.as_strided(shape, strides, A.storage_offset() + h * row)
