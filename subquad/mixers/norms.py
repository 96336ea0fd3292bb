"""The norms of mixers, and of a teacher's queries and keys."""

import torch
from torch import Tensor

RIDGE = 0.03
"""Of `constant_direction`, over the mean square of a channel."""


def upcast(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that: for decays and norms, which bfloat16 is too coarse for."""
    return x if x.dtype == torch.float64 else x.float()


def head_norm(o: Tensor, weight: Tensor | float, eps: float = 1e-8) -> Tensor:
    """RMS norm over the channels of each head, in float32 at least. `eps` lies far below the square of the smallest
    output of a fresh student, about 1e-7 in a first layer."""
    wide = upcast(o)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(o.dtype) * weight


def qk_norm(x: Tensor, kind: str, eps: float, weight: Tensor | float = 1.0, bias: Tensor | None = None) -> Tensor:
    """The norm of queries or keys `[B, T, H, K]`, in float32 at least: see `HeadLayout.qk_norm`."""
    wide = upcast(x) if kind.endswith("head") else upcast(x).flatten(-2)
    if kind.startswith("layer"):
        wide = wide - wide.mean(-1, keepdim=True)
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).view(x.shape)
    return (wide * weight if bias is None else wide * weight + bias).to(x.dtype)


def l2_norm(x: Tensor) -> Tensor:
    """`x / sqrt(|x|^2 + 1e-6)`, as `fla` and Qwen3.5 have it."""
    wide = upcast(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def fit_bias_direction(x: Tensor) -> Tensor:
    """u `[D]` with x u as near to 1 as it comes for tokens `x: [n, D]`, by ridge regression: what stands in for a bias
    where there is none. Hidden states behind a norm have means far from zero, so that it comes near."""
    x = x.double()
    tall = x.shape[0] > x.shape[1]
    gram = x.T @ x if tall else x @ x.T
    gram.diagonal().add_(RIDGE * len(x) * x.square().mean())
    u = torch.linalg.solve(gram, x.sum(0)) if tall else x.T @ torch.linalg.solve(gram, x.new_ones(len(x)))
    return u.float()
