"""Finds the kind and weights of a norm of queries or keys from its input and output."""

from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from subquad.mixers.norms import qk_norm
from subquad.modeling.attention.tracing import TRACE_LENGTH

NORM_KINDS = ("rms-head", "rms-all", "layer-head", "layer-all")
"""RMS or layer norm, over each head or over all heads (see `subquad.mixers.norms.qk_norm`)."""


class QKNorm(NamedTuple):
    """A norm of queries or keys: one of `NORM_KINDS`, its epsilon, weight and bias `[heads, head_dim]`."""

    kind: str
    eps: float
    weight: Tensor
    bias: Tensor | None
    """None in RMS norms."""


def fit_norm(module: nn.Module, norm_input: Tensor, norm_output: Tensor, heads: int) -> QKNorm | None:
    """The kind of a norm and its weights, by least squares over the tokens; None if it is none of `NORM_KINDS`."""
    x, y = (split_heads(t, heads).double() for t in (norm_input, norm_output))
    if x.shape != y.shape:
        return None
    eps = norm_epsilon(module)
    best: tuple[float, QKNorm] | None = None
    for kind in NORM_KINDS:
        n = qk_norm(x, kind, eps)
        tokens = (0, 1)
        if kind.startswith("layer"):
            mean = n.mean(tokens)
            centered = n - mean
            weight = (centered * y).sum(tokens) / centered.square().sum(tokens)
            bias = y.mean(tokens) - weight * mean
        else:
            weight, bias = (n * y).sum(tokens) / n.square().sum(tokens), None
        error = float((qk_norm(x, kind, eps, weight, bias) - y).square().mean() / y.square().mean())
        if best is None or error < 1e-2 * best[0]:  # a kind with more parameters must fit much better
            best = error, QKNorm(kind, eps, weight, bias)
    return best[1] if best is not None and best[0] < 1e-4 else None


def norm_epsilon(norm: nn.Module) -> float:
    """The epsilon of a norm of `transformers` or torch; 1e-6 if it has no such attribute."""
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    return 1e-6 if eps is None else float(eps)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`x` as `[B, T, H, K]`; given that, `[B, H, T, K]` or `[B, T, H * K]`."""
    if x.dim() == 4:
        return x.transpose(1, 2) if x.shape[1] != TRACE_LENGTH else x
    return x.unflatten(-1, (heads, -1)) if x.shape[-1] % heads == 0 else x
