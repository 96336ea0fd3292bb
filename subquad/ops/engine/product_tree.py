"""The binary tree over the tokens of a chunk that `ChannelDecay` uses: its buffers, and the views of each level.

At the level of h the tokens form pairs of blocks of h. Queries of right blocks decay by the factor of the left block,
keys of left blocks by the factor of the right block. Views are created once for each segment size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.engine.workspace import Workspace

MIN_BMM_PRODUCTS = 400  # with fewer multiplications per matrix, `bmm` uses its own slower loop, not BLAS
MAX_UNROLLED_TERMS = 2  # terms up to which adding them one by one is faster than a sum over products


def queries_and_keys(work: Workspace, name: str, m: int, C: int, R: int, K: int) -> tuple[Tensor, Tensor]:
    """Queries [m, C, R, K] and keys [m, C, K], adjacent in memory, so that one view can include both."""

    def make() -> tuple[Tensor, Tensor]:
        queries, keys = work(name, m * C * (R + 1) * K).split([m * C * R * K, m * C * K])
        return queries.view(m, C, R, K), keys.view(m, C, K)

    return work.cached_view((name, m, C, R, K), make)


class ProductTree:
    """The tree of m chunks of C tokens with R queries of K channels each."""

    def __init__(self, work: Workspace, m: int, C: int, R: int, K: int) -> None:
        depth = C.bit_length() - 1
        self.step_factors, self.total = work("factor0", m, C, K), work(f"factor{depth}", m, K)
        self.d_steps, self.d_total = work("d_factor0", m, C, K), work(f"d_factor{depth}", m, K)
        self.levels = [TreeLevel(work, level, m, C, R, K) for level in range(depth)]


class TreeLevel:
    """One level: P pairs of blocks of h tokens."""

    def __init__(self, work: Workspace, level: int, m: int, C: int, R: int, K: int) -> None:
        self.m, self.R, self.h = m, R, 1 << level
        h, P = self.h, m * C // (2 << level)
        factors, d_factors = (work(f"{name}{level}", P, 2, K) for name in ("factor", "d_factor"))
        parent, d_parent = (work(f"{name}{level + 1}", P, K) for name in ("factor", "d_factor"))
        self.left_and_right, self.parent_factor = factors.unbind(1), parent
        self.factors, self.d_factors, self.d_parent = factors, d_factors, d_parent.unsqueeze(1)

        def moving(name: str) -> list[Tensor]:
            """Queries of right blocks and keys of left blocks."""
            queries, keys = queries_and_keys(work, name, m, C, R, K)
            return [queries.view(P, 2, h * R, K)[:, 1], keys.view(P, 2, h, K)[:, 0]]

        values, grads = moving("decayed"), moving("gradients")
        saved, products = (
            [x.view(P, -1, K) for x in queries_and_keys(work, name, P, h, R, K)] for name in (f"saved{level}", "moved")
        )
        self.block = work("block", P, h * R, h)
        self.dot, self.saved_dot = (BlockDot(work, queries, keys, self.block) for queries, keys in (values, saved))
        self.grad_products = (
            BlockMatmul(self.block, saved[1], products[0]),
            BlockMatmul(self.block.mT, saved[0], products[1]),
        )
        views: list = [values, saved, grads, products, factors.unsqueeze(2).unbind(1), d_factors.unbind(1)]
        if R == 1:
            views = [[_stack(*both)] for both in views]
        self.sides = [TreeSide(*side) for side in zip(*views, strict=True)]

    def blocks(self, A: Tensor) -> Tensor:
        """The blocks (right, left) of [m, C, C] or [m, C, R, C] below the diagonal, [m, C / 2h, h, (R,) h]."""
        h, (m, C, *_), (matrix, row, *role, _) = self.h, A.shape, A.stride()
        shape, strides = (m, C // (2 * h), h, *A.shape[2:-1], h), (matrix, 2 * h * (row + 1), row, *role, 1)
        return A.as_strided(shape, strides, A.storage_offset() + h * row)


class TreeSide:
    """The queries of right blocks or the keys of left blocks, [P, r, K]; both at once, [2, P, r, K], if R is 1."""

    def __init__(
        self, values: Tensor, saved: Tensor, grad: Tensor, product: Tensor, factor: Tensor, d_factor: Tensor
    ) -> None:
        self.values, self.saved, self.grad = values, saved, grad
        self.product, self.factor, self.d_factor = product, factor, d_factor
        unroll = saved.shape[-2] <= MAX_UNROLLED_TERMS
        self.terms = list(zip(saved.unbind(-2), grad.unbind(-2), strict=True)) if unroll else []

    def save(self) -> None:
        self.saved.copy_(self.values)

    def decay(self) -> None:
        self.values.mul_(self.factor)

    def decay_backward(self) -> None:
        """The gradient through `decay`, and through the product with the other side."""
        torch.addcmul(self.product, self.grad, self.factor, out=self.grad)

    def factor_backward(self) -> None:
        """The gradient of the factor [.., K]: saved values times gradients, summed over tokens."""
        if self.terms:
            _sum_of_products(self.terms, out=self.d_factor)
        else:
            torch.sum(torch.mul(self.saved, self.grad, out=self.product), -2, out=self.d_factor)


class BlockDot:
    """block [P, h R, h] = queries keys^T."""

    def __init__(self, work: Workspace, queries: Tensor, keys: Tensor, block: Tensor) -> None:
        self.x, self.y, self.block, self.products = queries, keys.mT, block, None
        (P, r, K), h = queries.shape, keys.shape[1]
        if r * h * K < MIN_BMM_PRODUCTS:
            self.x, self.y, self.products = queries.unsqueeze(2), keys.unsqueeze(1), work("each", P, r, h, K)

    def run(self) -> Tensor:
        if self.products is None:
            return torch.bmm(self.x, self.y, out=self.block)
        return torch.sum(torch.mul(self.x, self.y, out=self.products), -1, out=self.block)


class BlockMatmul:
    """out = x y; the smallest matrices term by term, which is several times as fast as PyTorch's loop for them."""

    def __init__(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        self.x, self.y, self.out = x, y, out
        small = out[0].numel() * x.shape[2] < MIN_BMM_PRODUCTS
        self.terms = [(x[:, :, j : j + 1], y[:, j : j + 1]) for j in range(x.shape[2])] if small else []

    def run(self) -> None:
        if self.terms:
            _sum_of_products(self.terms, out=self.out)
        else:
            torch.bmm(self.x, self.y, out=self.out)


def _sum_of_products(terms: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    torch.mul(*terms[0], out=out)
    for x, y in terms[1:]:
        out.addcmul_(x, y)


def _stack(x: Tensor, y: Tensor) -> Tensor:
    """One view [2, ...] of two views of one buffer with equal shapes and strides."""
    distance = y.storage_offset() - x.storage_offset()
    return x.as_strided((2, *x.shape), (distance, *x.stride()), x.storage_offset())
