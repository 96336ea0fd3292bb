"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692, section 3): the gated delta rule with a decay per channel.

    S~_t = Diag(exp(g_t)) S_{t-1}     S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T     o_t = S_t^T q_t / sqrt(K)
    g_t = -exp(A) softplus(W_2 W_1 x_t + dt)

A is per head, dt per channel; the decay's projection has the rank of a head, as in Kimi Linear. Sigmoid output gate.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.base import HALF_LIVES, half_life_decay, inverse_softplus
from subquad.mixers.deltanet import DeltaNet
from subquad.mixers.norms import upcast
from subquad.mixers.options import KDAOptions


class KDA(DeltaNet):
    name = "kda"
    Options = KDAOptions
    CALIBRATED_PARAMS = (*DeltaNet.CALIBRATED_PARAMS, ("half_life", HALF_LIVES))
    options: KDAOptions

    def build(self) -> None:
        super().build()
        H, K = self.spec.num_heads, self.spec.head_dim
        self.decay_down = nn.Linear(self.spec.hidden_size, K, bias=False)
        self.decay_up = nn.Linear(K, H * K, bias=False)
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H, K))

    def reset_gates(self) -> None:
        super().reset_gates()
        nn.init.normal_(self.decay_down.weight, std=self.spec.hidden_size**-0.5)
        nn.init.zeros_(self.decay_up.weight)
        nn.init.zeros_(self.A_log)
        self.set_half_life(self.per_head(self.options.half_life))

    def set_half_life(self, half_life: Tensor) -> None:
        """Of all channels of each head, `[H]`, in tokens, where the gate's projection gives zero."""
        self.dt_bias.copy_(inverse_softplus(-half_life_decay(half_life)).unsqueeze(-1).expand_as(self.dt_bias))

    def gates(self, x: Tensor, core: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = upcast(self.decay_up(self.decay_down(x))).unflatten(-1, (self.spec.num_heads, -1))
        log_decay = -upcast(self.A_log).exp().unsqueeze(-1) * F.softplus(logits + upcast(self.dt_bias))
        return {**super().gates(x, core), "log_decay": log_decay}
