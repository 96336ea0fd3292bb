"""Products and decays inside a chunk where every channel has its own decay: a binary tree, exact for any decay.

Exponentials of cumulative sums would overflow, and a tensor [C, C, K] of all decays would cost more than everything
else. Instead, at every level of the tree, blocks of h tokens form pairs. Queries carry the decay since their block's
start, keys the decay to their block's end; (right queries) (left keys)^T is a block of A. Then right queries decay by
the left block's total and left keys by the right block's. No factor exceeds one, and each step is exponentiated once.
At the root the queries are P q, the keys E k. The backward pass goes through the same tree from the root; the gradients
of the factors add up to that of the log decay without cancelling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.checks import Inputs
from subquad.ops.engine.product_tree import ProductTree, queries_and_keys
from subquad.ops.engine.scalar_decay import LOG2E
from subquad.ops.engine.segments import ChunkedView, ChunkLayout, Segment
from subquad.ops.engine.workspace import Workspace


class ChannelDecay:
    """The methods of `ScalarDecay` for a log decay [B, T, G, K]."""

    floor: Tensor | None = None
    last_m: Tensor | None = None

    def __init__(self, layout: ChunkLayout, inputs: Inputs, work: Workspace) -> None:
        assert inputs.log_decay is not None
        self.layout, self.log_decay, self.work = layout, ChunkedView(layout, inputs.log_decay), work

    def total(self, segment: Segment) -> Tensor:
        """The decay of the state over each chunk, [n, BG, K, 1]."""
        return self.tree.total.view(segment.n, self.layout.BG, -1, 1)

    def _build_tree(self, segment: Segment, shape: torch.Size) -> None:
        """Sets the tree of a segment and computes the factors of all its blocks."""
        self.tree = self.work.cached_view(("tree", shape), lambda: ProductTree(self.work, *shape))
        self.log_decay.load(segment, self.tree.step_factors, LOG2E).exp2_()
        for level in self.tree.levels:  # more exact, and faster, than exponentials of sums
            torch.mul(*level.left_and_right, out=level.parent_factor)

    def forward(self, segment: Segment, queries: Tensor, keys: Tensor, A: Tensor, L: Tensor | None) -> None:
        (m, _, R, _), Q = queries.shape, self.layout.Q
        self._build_tree(segment, queries.shape)
        self._start_products(A, queries, keys)
        queries.mul_(self.tree.step_factors.unsqueeze(2))
        for level in self.tree.levels:
            block = level.dot.run().view(m, -1, level.h, R, level.h)
            level.blocks(A).copy_(block[:, :, :, :Q])
            if L is not None:
                level.blocks(L).copy_(block[:, :, :, Q])
            for side in level.sides:
                side.decay()

    def _start_products(self, A: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Sets A [m, C, Q, C] to the products of queries of q and keys of the same token."""
        products = self.work.dot(queries[:, :, : self.layout.Q], keys.unsqueeze(2))
        A.zero_().diagonal(0, 1, 3).copy_(products.mT)

    def recompute(
        self, segment: Segment, raw_queries: Tensor, raw_keys: Tensor, A: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Also saves each level's operands."""
        (m, C, R, K), Q = raw_queries.shape, self.layout.Q
        self._build_tree(segment, raw_queries.shape)
        self.raw_queries, self.raw_keys = raw_queries, raw_keys
        queries, keys = queries_and_keys(self.work, "decayed", m, C, R, K)
        compute_A = A is None
        if A is None:
            A = self.work("A", m, C, Q, C)
            self._start_products(A, raw_queries, raw_keys)
        torch.mul(raw_queries, self.tree.step_factors.unsqueeze(2), out=queries)
        keys.copy_(raw_keys)
        for level in self.tree.levels:
            for side in level.sides:
                side.save()
                side.decay()
            if compute_A:
                block = level.saved_dot.run().view(m, -1, level.h, R, level.h)
                level.blocks(A).copy_(block[:, :, :, :Q])
        return queries, keys, A

    def backward(
        self, segment: Segment, dA: Tensor, d_queries: Tensor, d_keys: Tensor, G: Tensor, S: Tensor, gates: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of the log decay is [m, C, K]; there is no input gate."""
        tree, (m, _, R, K) = self.tree, d_queries.shape
        if gates:
            torch.mul(self.work.dot(G, S).view(m, K), tree.total, out=tree.d_total)
        for level in reversed(tree.levels):
            if gates:
                for side in level.sides:
                    side.factor_backward()
                torch.addcmul(level.d_parent, level.d_factors, level.factors, out=level.d_factors)
            level.block.view(m, -1, level.h, R, level.h).copy_(level.blocks(dA))
            for product in level.grad_products:
                product.run()
            for side in level.sides:
                side.decay_backward()
        d_queries.mul_(tree.step_factors.unsqueeze(2))
        if gates:
            for role in range(R):
                tree.d_steps.addcmul_(self.raw_queries[:, :, role], d_queries[:, :, role])
        for role in range(self.layout.Q):
            diagonal = dA[:, :, role].diagonal(0, 1, 2).unsqueeze(-1)
            d_queries[:, :, role].addcmul_(self.raw_keys, diagonal)
            d_keys.addcmul_(self.raw_queries[:, :, role], diagonal)
        return tree.d_steps if gates else None, None
