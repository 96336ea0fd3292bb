"""The norms of mixers, and of a teacher's queries and keys."""

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that: for decays and norms, which bfloat16 is too coarse for."""
    return x if x.dtype == torch.float64 else x.float()


def head_norm(o: Tensor, weight: Tensor | float, eps: float = 1e-8) -> Tensor:
    """RMS norm over the channels of each head, in float32 at least. `eps` lies far below the square of the smallest
    output of a fresh student, about 1e-7 in a first layer."""
    wide = widen(o)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(o.dtype) * weight


def qk_normed(x: Tensor, kind: str, eps: float, weight: Tensor | float = 1.0, bias: Tensor | None = None) -> Tensor:
    """The norm of queries or keys `[B, T, H, K]`, in float32 at least: see `HeadLayout.qk_norm`."""
    wide = widen(x) if kind.endswith("head") else widen(x).flatten(-2)
    if kind.startswith("layer"):
        wide = wide - wide.mean(-1, keepdim=True)
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).view(x.shape)
    return (wide * weight if bias is None else wide * weight + bias).to(x.dtype)


def l2_norm(x: Tensor) -> Tensor:
    return F.normalize(widen(x), dim=-1, eps=1e-6).to(x.dtype)
