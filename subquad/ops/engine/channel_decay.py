"""The inside of a chunk when every channel decays on its own: a product tree of halves, exact for any decay.

Exponentiating running sums would overflow and a tensor [C, C, K] of all decays costs more than everything else. So, at
every level, blocks of h tokens pair up: rows carry the decay since their block's start, keys the decay to their block's
end, and (right rows) (left keys)^T is a block of A. Then right rows take the left block's total decay and left keys the
right block's. No factor exceeds one, each step is exponentiated once, and at the root stand P rows and E keys. The
backward pass walks the same tree down; the gradients of the totals add up to that of the log decay without cancelling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.engine.product_tree import Tree, tokens
from subquad.ops.engine.scalar_decay import LOG2E
from subquad.ops.engine.segments import ChunkedView, Layout, Segment
from subquad.ops.engine.workspace import Workspace


class ChannelDecay:
    """As `ScalarFrame`, for a log decay [B, T, H, K]."""

    def __init__(self, layout: Layout, log_decay: Tensor, work: Workspace) -> None:
        self.layout, self.log_decay, self.work = layout, ChunkedView(layout, log_decay), work

    def total(self, segment: Segment) -> Tensor:
        return self.tree.root.view(segment.n, self.layout.BH, -1, 1)

    def _plant(self, segment: Segment, shape: torch.Size) -> None:
        """The tree of a segment, with the factors of all its blocks."""
        self.tree = self.work.cached_view(("tree", shape), lambda: Tree(self.work, *shape))
        self.log_decay.load(segment, self.tree.steps, LOG2E).exp2_()
        for level in self.tree.levels:
            level.multiply()

    def forward(self, segment: Segment, rows: Tensor, keys: Tensor, A: Tensor, L: Tensor | None) -> None:
        m, _, R, _ = rows.shape
        self._plant(segment, rows.shape)
        A.zero_()
        A.diagonal(0, 1, 2).copy_(self.work.dot(rows[:, :, 0], keys))
        rows.mul_(self.tree.steps.unsqueeze(2))
        for level in self.tree.levels:
            block = level.dots.run().view(m, -1, level.h, R, level.h)
            level.blocks(A).copy_(block[:, :, :, 0])
            if L is not None:
                level.blocks(L).copy_(block[:, :, :, 1])
            for side in level.sides:
                side.move()

    def recompute(
        self, segment: Segment, raw_rows: Tensor, raw_keys: Tensor, A: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, keeping each level's operands; A is given where it was kept."""
        m, C, R, K = raw_rows.shape
        self._plant(segment, raw_rows.shape)
        self.raw_rows, self.raw_keys = raw_rows, raw_keys
        rows, keys = tokens(self.work, "decayed", m, C, R, K)
        fill = A is None
        if A is None:
            A = self.work("A", m, C, C).zero_()
            A.diagonal(0, 1, 2).copy_(self.work.dot(raw_rows[:, :, 0], raw_keys))
        torch.mul(raw_rows, self.tree.steps.unsqueeze(2), out=rows)
        keys.copy_(raw_keys)
        for level in self.tree.levels:
            for side in level.sides:
                side.keep()
                side.move()
            if fill:
                block = level.dots_was.run().view(m, -1, level.h, R, level.h)
                level.blocks(A).copy_(block[:, :, :, 0])
        return rows, keys, A

    def backward(
        self, segment: Segment, dA: Tensor, d_rows: Tensor, d_keys: Tensor, d_state: Tensor, state: Tensor, gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        tree, (m, _, R, K) = self.tree, d_rows.shape
        if gates:
            torch.mul(self.work.dot(d_state, state).view(m, K), tree.root, out=tree.d_root)
        for level in reversed(tree.levels):
            if gates:
                for side in level.sides:
                    side.find_d_total()
                torch.addcmul(level.d_above, level.d_totals, level.all_factors, out=level.d_totals)
            level.block.view(m, -1, level.h, R, level.h).copy_(level.blocks(dA))
            for product in level.products:
                product.run()
            for side in level.sides:
                side.move_back()
        d_rows.mul_(tree.steps.unsqueeze(2))
        if gates:
            for role in range(R):
                tree.d_steps.addcmul_(self.raw_rows[:, :, role], d_rows[:, :, role])
        diagonal = dA[:, :, 0].diagonal(0, 1, 2).unsqueeze(-1)
        d_rows[:, :, 0].addcmul_(self.raw_keys, diagonal)
        d_keys.addcmul_(self.raw_rows[:, :, 0], diagonal)
        return tree.d_steps if gates else None, None
