"""The norm that a family puts on queries and keys, read off what it takes and gives."""

import torch.nn as nn
from torch import Tensor

from subquad.mixers.norms import qk_norm
from subquad.modeling.attention.tracing import TRACE_LENGTH

NORM_KINDS = ("rms-head", "rms-all", "layer-head", "layer-all")
QKNorm = tuple[str, float, Tensor, Tensor | None]
"""Kind, epsilon, weight and bias `[heads, channels]`; no bias in the rms kinds."""


def fit_norm(module: nn.Module, taken: Tensor, given: Tensor, heads: int) -> QKNorm | None:
    """The kind of norm, and its weights by least squares over tokens; None where it is none of `KINDS`."""
    x, y = (split_heads(t, heads).double() for t in (taken, given))
    if x.shape != y.shape:
        return None
    eps = next((getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)
    eps = 1e-6 if eps is None else float(eps)
    best: tuple[float, QKNorm] | None = None
    for kind in NORM_KINDS:
        n = qk_norm(x, kind, eps)
        about = (0, 1)
        if kind.startswith("layer"):
            centred, mean = n - n.mean(about), n.mean(about)
            weight = (centred * y).sum(about) / centred.square().sum(about)
            bias = y.mean(about) - weight * mean
        else:
            weight, bias = (n * y).sum(about) / n.square().sum(about), None
        error = float((qk_norm(x, kind, eps, weight, bias) - y).square().mean() / y.square().mean())
        if best is None or error < 1e-2 * best[0]:  # a kind with more freedom must be worth it
            best = error, (kind, eps, weight, bias)
    return best[1] if best is not None and best[0] < 1e-4 else None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H, K]`, from that, from `[B, H, T, K]`, or from `[B, T, H * K]`."""
    if x.dim() == 4:
        return x.transpose(1, 2) if x.shape[1] != TRACE_LENGTH else x
    return x.unflatten(-1, (heads, -1)) if x.shape[-1] % heads == 0 else x
