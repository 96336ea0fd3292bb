"""Norms of the mixers' outputs, of queries and of keys."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays. Decays and norms need more precision than bfloat16."""
    return x if x.dtype == torch.float64 else x.float()


def head_norm(o: Tensor, weight: Tensor | float, eps: float = 1e-8) -> Tensor:
    """RMS norm of `o: [B, T, H, V]` over the channels of each head, in float32 at least.

    The default `eps` is far below the mean square of the smallest output of an untrained student, about 1e-7 in a first
    layer.
    """
    wide = upcast(o)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(o.dtype) * weight


def qk_norm(x: Tensor, kind: str, eps: float, weight: Tensor | float = 1.0, bias: Tensor | None = None) -> Tensor:
    """The teacher's norm of queries or keys `x: [B, T, H, K]`, in float32 at least; for `kind` see
    `AttentionSpec.qk_norm`."""
    wide = upcast(x) if kind.endswith("head") else upcast(x).flatten(-2)
    if kind.startswith("layer"):
        wide = wide - wide.mean(-1, keepdim=True)
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).view(x.shape)
    return (wide * weight if bias is None else wide * weight + bias).to(x.dtype)


def l2_norm(x: Tensor) -> Tensor:
    """`x / sqrt(|x|^2 + 1e-6)` over the last dimension, as in `fla` and Qwen3.5."""
    wide = upcast(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
