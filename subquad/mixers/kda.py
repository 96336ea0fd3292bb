"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692, section 3): the gated delta rule with a decay per channel.

    S~_t = Diag(exp(g_t)) S_{t-1}     S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T     o_t = S_t^T q_t / sqrt(K)
    g_t = -exp(A) softplus(W_2 W_1 x_t + dt)

Per state: S [K, V], q, k, g and dt [K], v [V]; beta and A are scalars. The rank of W_1 is the size of a head,
as in Kimi Linear. With `v_activation="silu"`, `biases=False` and `low_rank_gate=True` it equals a layer of Kimi Linear
(docs/serving.md).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.base import Mixer
from subquad.mixers.deltanet import DeltaNet
from subquad.mixers.exportable import ExportableDeltaNet
from subquad.mixers.gate_init import HALF_LIVES, inverse_softplus
from subquad.mixers.norms import upcast
from subquad.mixers.options import KDAOptions


class KDA(ExportableDeltaNet):
    name = "kda"
    Options = KDAOptions  # type: ignore[assignment]
    CALIBRATED_PARAMS = (*DeltaNet.CALIBRATED_PARAMS, ("half_life", HALF_LIVES))
    VALUE_PATH_PARAMS = Mixer.VALUE_PATH_PARAMS | {"g_down"}
    options: KDAOptions

    def build_gates(self) -> None:
        super().build_gates()
        G, K, rank = self.num_states, self.feature_dim, self.spec.head_dim
        self.decay_down = nn.Linear(self.spec.hidden_size, rank, bias=False)
        self.decay_up = nn.Linear(rank, G * K, bias=False)
        self.A_log = nn.Parameter(torch.empty(G))
        self.dt_bias = nn.Parameter(torch.empty(G, K))
        if self.options.low_rank_gate:
            self.g_down = nn.Linear(self.spec.hidden_size, rank, bias=False)
            self.g_proj = nn.Linear(rank, self.g_proj.out_features, bias=self.has_biases)

    def reset_gates(self) -> None:
        super().reset_gates()
        for projection in (self.decay_down, self.g_down) if self.options.low_rank_gate else (self.decay_down,):
            nn.init.normal_(projection.weight, std=self.spec.hidden_size**-0.5)

    def set_log_decay(self, log_decay: Tensor) -> None:
        self.dt_bias.copy_(inverse_softplus(-log_decay).unsqueeze(-1).expand_as(self.dt_bias))

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = upcast(self.decay_up(self.decay_down(x))).unflatten(-1, (self.num_states, -1))
        log_decay = -upcast(self.A_log).exp().unsqueeze(-1) * F.softplus(logits + upcast(self.dt_bias))
        return {**super().gates(x, inputs), "log_decay": log_decay}

    def output_gate(self, x: Tensor) -> Tensor | None:
        return super().output_gate(self.g_down(x) if self.options.low_rank_gate else x)
