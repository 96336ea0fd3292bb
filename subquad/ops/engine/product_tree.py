"""The product tree of `channel`: its buffers, and all views of them that its walks need, made once a segment size.

At level h the tokens form pairs of blocks of h. The rows of right blocks move by the factor of the left block, the keys
of left blocks by that of the right block. Knows the steps of a walk, not their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.engine.workspace import Workspace

SMALL = 400  # multiplications, below which `bmm` does not call its library
FEW = 2  # terms, up to which adding them one by one beats a sum over products


def tokens(work: Workspace, name: str, m: int, C: int, R: int, K: int) -> tuple[Tensor, Tensor]:
    """Rows [m, C, R, K] and keys [m, C, K], side by side, so that one view can take in both."""

    def make() -> tuple[Tensor, Tensor]:
        rows, keys = work(name, m * C * (R + 1) * K).split([m * C * R * K, m * C * K])
        return rows.view(m, C, R, K), keys.view(m, C, K)

    return work.cached_view((name, m, C, R, K), make)


class Tree:
    """Of m chunks of C tokens with R rows of K channels each."""

    def __init__(self, work: Workspace, m: int, C: int, R: int, K: int) -> None:
        depth = C.bit_length() - 1
        self.steps, self.root = work("factor0", m, C, K), work(f"factor{depth}", m, K)
        self.d_steps, self.d_root = work("d_total0", m, C, K), work(f"d_total{depth}", m, K)
        self.levels = [Level(work, level, m, C, R, K) for level in range(depth)]


class Level:
    """One level, blocks of h tokens in P pairs."""

    def __init__(self, work: Workspace, level: int, m: int, C: int, R: int, K: int) -> None:
        self.m, self.R, self.h = m, R, 1 << level
        h, P = self.h, m * C // (2 << level)
        factors, d_totals = (work(f"{name}{level}", P, 2, K) for name in ("factor", "d_total"))
        above, d_above = (work(f"{name}{level + 1}", P, K) for name in ("factor", "d_total"))
        self.factors, self.factor_above = factors.unbind(1), above
        self.all_factors, self.d_totals, self.d_above = factors, d_totals, d_above.unsqueeze(1)

        def halves(name: str) -> list[Tensor]:
            rows, keys = tokens(work, name, m, C, R, K)
            return [rows.view(P, 2, h * R, K)[:, 1], keys.view(P, 2, h, K)[:, 0]]

        now, grads = halves("decayed"), halves("gradients")
        was, products = ([x.view(P, -1, K) for x in tokens(work, n, P, h, R, K)] for n in (f"was{level}", "moved"))
        self.block = work("block", P, h * R, h)
        self.dots, self.dots_was = (BlockDot(work, rows, keys, self.block) for rows, keys in (now, was))
        self.products = BlockMatmul(self.block, was[1], products[0]), BlockMatmul(self.block.mT, was[0], products[1])
        sides: list = [now, was, grads, products, factors.unsqueeze(2).unbind(1), d_totals.unbind(1)]
        if R == 1:
            sides = [[_stack(*both)] for both in sides]
        self.sides = [TreeSide(*views) for views in zip(*sides, strict=True)]

    def multiply(self) -> None:
        """The factors of blocks twice as large: more exact than exponentials of sums, and faster."""
        torch.mul(*self.factors, out=self.factor_above)

    def blocks(self, A: Tensor) -> Tensor:
        """The blocks (right, left) of [m, C, C] or [m, C, R, C] below the diagonal, [m, C / 2h, h, (R,) h]."""
        h, (m, C, *_), (matrix, row, *role, _) = self.h, A.shape, A.stride()
        shape, strides = (m, C // (2 * h), h, *A.shape[2:-1], h), (matrix, 2 * h * (row + 1), row, *role, 1)
        return A.as_strided(shape, strides, A.storage_offset() + h * row)


class TreeSide:
    """What moves at a level, [P, r, K]; with one row a token, rows and keys at once, [2, P, r, K]."""

    def __init__(
        self, now: Tensor, was: Tensor, grad: Tensor, product: Tensor, factor: Tensor, d_total: Tensor
    ) -> None:
        self.now, self.was, self.grad, self.product, self.factor, self.d_total = (
            now,
            was,
            grad,
            product,
            factor,
            d_total,
        )
        self.terms = list(zip(was.unbind(-2), grad.unbind(-2), strict=True)) if was.shape[-2] <= FEW else []

    def keep(self) -> None:
        self.was.copy_(self.now)

    def move(self) -> None:
        self.now.mul_(self.factor)

    def move_back(self) -> None:
        """The gradient through `move`, and through the product with the other side."""
        torch.addcmul(self.product, self.grad, self.factor, out=self.grad)

    def find_d_total(self) -> None:
        """The gradient of the factor, [.., K]: was times grad, summed over tokens."""
        if not self.terms:
            torch.sum(torch.mul(self.was, self.grad, out=self.product), -2, out=self.d_total)
            return
        torch.mul(*self.terms[0], out=self.d_total)
        for was, grad in self.terms[1:]:
            self.d_total.addcmul_(was, grad)


class BlockDot:
    """block [P, h R, h] = rows keys^T."""

    def __init__(self, work: Workspace, rows: Tensor, keys: Tensor, block: Tensor) -> None:
        self.x, self.y, self.block, self.each = rows, keys.mT, block, None
        (P, r, K), h = rows.shape, keys.shape[1]
        if r * h * K < SMALL:
            self.x, self.y, self.each = rows.unsqueeze(2), keys.unsqueeze(1), work("each", P, r, h, K)

    def run(self) -> Tensor:
        if self.each is None:
            return torch.bmm(self.x, self.y, out=self.block)
        return torch.sum(torch.mul(self.x, self.y, out=self.each), -1, out=self.block)


class BlockMatmul:
    """out = x y; the smallest term by term, several times as fast as PyTorch's loop for them."""

    def __init__(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        self.x, self.y, self.out = x, y, out
        small = out[0].numel() * x.shape[2] < SMALL
        self.terms = [(x[:, :, j : j + 1], y[:, j : j + 1]) for j in range(x.shape[2])] if small else []

    def run(self) -> None:
        if not self.terms:
            torch.bmm(self.x, self.y, out=self.out)
            return
        torch.mul(*self.terms[0], out=self.out)
        for x, y in self.terms[1:]:
            self.out.addcmul_(x, y)


def _stack(x: Tensor, y: Tensor) -> Tensor:
    """One view [2, ...] of two views of one buffer, alike in shape and strides."""
    apart = y.storage_offset() - x.storage_offset()
    return x.as_strided((2, *x.shape), (apart, *x.stride()), x.storage_offset())
