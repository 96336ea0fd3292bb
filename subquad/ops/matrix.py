"""The dense mixing matrix M of the recurrence, o = M v, for stage 1 and diagnostics.

    additive    M_ij = scale q_i . (D_ij k_j)                D_ij the decay from token j to token i >= j
    delta rule  M    = A (I + L)^-1 Diag(beta)               A the additive M, L_ij = beta_i k_i . (D_ij k_j), i > j

Both are assembled from tiles of `TILE` tokens, so that a few rows of a long sequence cost no more than those rows and
no tensor [T, T, K] is built. Decays are differences of float64 cumulative log decays. A decay per channel is
exponentiated relative to a token between j and i, in diagonal tiles by the tree of `engine.channel_decay`, so that no
factor exceeds one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.engine.scalar_decay import MIN_LOG_DECAY

TILE = 64


def matrix(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    rows: slice | None = None,
) -> Tensor:
    """Returns the matrix M [B, H, T, T] of `step` and `chunk` from a zero state, in the dtype of q; differentiable.

    Args:
        q, k, log_decay, beta, scale: as in `step`.
        rows: compute only these rows of M, [B, H, len(rows), T]; a slice without a step.

    Raises:
        TypeError, ValueError: as `step`; `rows` with a step.
    """
    inputs = checks.Inputs(q, k, k, log_decay, beta)
    checks.check_recurrence(inputs)
    q, k, _, log_decay, beta, *_ = inputs.expand()
    B, T, H, K = q.shape
    first, end = checks.check_rows(rows, T)
    dtype, dtype_out, scale = checks.compute_dtype(q), q.dtype, K**-0.5 if scale is None else scale
    q, k = (q[:, first:end].to(dtype) * scale).transpose(1, 2), k.to(dtype).transpose(1, 2)
    products = DecayedProducts(k, log_decay)
    row_tiles = [q.new_zeros(B, H, 0, T)]
    for a in range(first, end, TILE):
        b = min(a + TILE, end)
        queries = q[:, :, a - first : b - first]
        tile = torch.cat([products.off_diagonal(queries, a, 0, a), products.diagonal(queries, a)], -1)
        row_tiles.append(F.pad(tile, (0, T - b)))
    A = torch.cat(row_tiles, 2)
    if beta is None:
        return A.to(dtype_out)
    beta = beta.to(dtype).transpose(1, 2)
    solved = A[..., end:end]
    writes = k * beta.unsqueeze(-1)
    for a in reversed(range(0, end, TILE)):
        b = min(a + TILE, end)
        tile = A[..., a:b]
        if b < end:
            tile = tile - solved @ products.off_diagonal(writes[:, :, b:end], b, a, b)
        system = products.diagonal(writes[:, :, a:b], a)  # solve_triangular does not read its diagonal
        system, tile = system.to(dtype), tile.to(dtype)  # autocast makes products bfloat16, which cannot be solved
        tile = torch.linalg.solve_triangular(system, tile, upper=False, left=False, unitriangular=True)
        solved = torch.cat([tile, solved], -1)
    M = solved * beta[..., :end].unsqueeze(-2)
    return F.pad(M, (0, T - end)).tril(first).to(dtype_out)


class DecayedProducts:
    """x_i . (D_ij k_j) for tiles of queries x and keys k [B, H, T, K]."""

    def __init__(self, k: Tensor, log_decay: Tensor | None) -> None:
        self.k, self.per_channel = k, False
        self.cum_decay: Tensor | None = None
        if log_decay is None:
            return
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(k.shape[0], k.shape[2], -1)
        self.per_channel = log_decay.dim() == 4
        self.log_decay = log_decay.transpose(1, 2).to(torch.float64).clamp_min(MIN_LOG_DECAY)
        self.cum_decay = self.log_decay.cumsum(2)
        if not self.per_channel:
            self.cum_decay = self.cum_decay.unsqueeze(-1)

    def off_diagonal(self, x: Tensor, a: int, c: int, d: int) -> Tensor:
        """Queries `x` of the tokens from a on times keys of the tokens c to d, d <= a."""
        queries, keys = x, self.k[:, :, c:d]
        if self.cum_decay is not None and c < d:
            origin = self.cum_decay[:, :, a - 1 : a]
            queries = queries * (self.cum_decay[:, :, a : a + x.shape[2]] - origin).to(x.dtype).exp()
            keys = keys * (origin - self.cum_decay[:, :, c:d]).to(x.dtype).exp()
        return queries @ keys.mT

    def diagonal(self, x: Tensor, a: int) -> Tensor:
        """Queries `x` of the tokens from a on times keys of the same tokens, lower triangular."""
        n = x.shape[2]
        keys = self.k[:, :, a : a + n]
        if self.cum_decay is None:
            return (x @ keys.mT).tril()
        if self.per_channel:
            return channel_decay_tile(x, keys, self.log_decay[:, :, a : a + n].to(x.dtype))
        cum_decay = self.cum_decay[:, :, a : a + n]
        return (x @ keys.mT).tril() * (cum_decay - cum_decay.mT).tril().to(x.dtype).exp()


def channel_decay_tile(x: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """x_i . (D_ij k_j) for i >= j, all [B, H, n, K], by the tree of `engine.channel_decay` with PyTorch's autograd."""
    n = x.shape[2]
    pad = (0, 0, 0, (1 << (n - 1).bit_length()) - n)
    x, k, log_decay = (F.pad(y, pad).unsqueeze(3) for y in (x, k, log_decay))  # [B, H, n / h, h, K], h = 1
    A, total = torch.linalg.vecdot(x, k).unsqueeze(-1), log_decay  # A: diagonal blocks [h, h]
    x = x * log_decay.exp()
    while x.shape[2] > 1:
        block = x[:, :, 1::2] @ k[:, :, 0::2].mT
        upper = torch.cat([A[:, :, 0::2], torch.zeros_like(block)], -1)
        A = torch.cat([upper, torch.cat([block, A[:, :, 1::2]], -1)], 3)
        x = torch.cat([x[:, :, 0::2], x[:, :, 1::2] * total[:, :, 0::2].exp()], 3)
        k = torch.cat([k[:, :, 0::2] * total[:, :, 1::2].exp(), k[:, :, 1::2]], 3)
        total = total[:, :, 0::2] + total[:, :, 1::2]
    return A[:, :, 0, :n, :n]
