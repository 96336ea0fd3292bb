"""How what attention to a window gives and what a memory reads become one output: the share m of the memory."""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from subquad.mixers import AttentionSpec
from subquad.mixers.norms import upcast
from subquad.modeling.layer_types import DENOMINATORS

TINY = 1e-30
"""Smallest normalizer of a memory."""
LOLCATS_GAMMA = 0.1
"""Initial factor of the near scores in LoLCATs' code, whose products of queries and keys are not scaled."""
INITIAL_MASS_LOGIT = -3.0
"""Of `mass`: a share of 0.05, before calibration."""


class Merge(nn.Module):
    """The share m of the far part. `mass`: sigmoid(w x_t + u lse_t + b), lse the log-sum-exp of the near scores;
    `fixed`: 1/2 (Liger, arXiv 2503.01496); `add`: no share, o_near + o_far; `denominator`: of a memory with a
    normalizer z, the shares of the sums, sigmoid(log(c z q) - lse); `lolcats`: the same with lse less the largest near
    score, LoLCATs' equation 6 (arXiv 2410.10254) with c = 1 / gamma.

    feature_dim: channels of the memory's queries and keys.
    """

    far_only = False
    """Whether the output is that of the memory alone where it holds a token (m = 1, with `add` too), as in
    ablations and in steps of training without windows. Parameters of the share then have gradients of zero."""

    def __init__(self, kind: str, spec: AttentionSpec, feature_dim: int):
        super().__init__()
        self.kind = kind
        if kind == "mass":
            self.m_proj = nn.Linear(spec.hidden_size, spec.num_heads)
            self.lse_weight = nn.Parameter(torch.empty(spec.num_heads))
        elif self.has_normalizer:
            self.log_scale = nn.Parameter(torch.empty(spec.num_heads))
        self.initial_log_scale = math.log(feature_dim**0.5 / LOLCATS_GAMMA) if kind == "lolcats" else 0.0
        self.reset_parameters()

    @property
    def has_normalizer(self) -> bool:
        """Whether the share depends on the normalizer of the memory."""
        return self.kind in DENOMINATORS

    @property
    def relative(self) -> bool:
        """Whether the share depends on the near scores less the largest of them."""
        return self.kind == "lolcats"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A share of 0.05, before calibration; a scale c of 1, or with `lolcats` as in the paper."""
        values = {"m_proj.bias": INITIAL_MASS_LOGIT, "log_scale": self.initial_log_scale}
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, values.get(name, 0.0))

    def logits(self, x: Tensor) -> Tensor | None:
        """Of `mass`, the part of the logit that depends on `x: [B, T, hidden]`, `[B, T, H]`."""
        return upcast(self.m_proj(x)) if self.kind == "mass" else None

    def forward(
        self,
        near: Tensor,
        far: Tensor,
        z: Tensor | None,
        logits: Tensor | None,
        left: Tensor,
        lse: Callable[[bool], Tensor],
        heads: Tensor | None,
    ) -> Tensor:
        """The merged output `[B, T, h, V]` of the query heads `heads` (None: all).

        near, far: `[B, T, h, V]`. z: the normalizer of the memory, `[B, T, h]`. left: whether the memory holds
        a token, `[1 or B, T]`, or by head `[1 or B, T, h]`. lse: see `FarCall.__call__`.
        """
        if self.kind == "add" and not self.far_only:
            return near + far
        m = self.share(near, z, logits, left, lse, heads).unsqueeze(-1).to(near.dtype)
        return (1 - m) * near + m * far

    def share(
        self,
        near: Tensor,
        z: Tensor | None,
        logits: Tensor | None,
        left: Tensor,
        lse: Callable[[bool], Tensor],
        heads: Tensor | None,
    ) -> Tensor:
        """m `[B, T, h]`, for the arguments of `forward`."""

        def of_heads(parameter: Tensor) -> Tensor:
            return upcast(parameter if heads is None else parameter[heads])

        if self.kind == "mass":
            assert logits is not None
            m = torch.sigmoid(logits + of_heads(self.lse_weight) * upcast(lse(False)))
        elif self.has_normalizer:
            assert z is not None
            m = torch.sigmoid(of_heads(self.log_scale) + z.clamp_min(TINY).log() - upcast(lse(self.relative)))
        else:
            m = near.new_full(near.shape[:-1], 0.5)
        left = left if left.dim() == 3 else left.unsqueeze(-1)
        return torch.where(left, 1.0, m * left) if self.far_only else m * left
