"""Gated DeltaNet (arXiv 2412.06464, equation 10): the delta rule with Mamba-2's decay.

    S~_t = exp(g_t) S_{t-1}     S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T     o_t = S_t^T q_t / sqrt(K)
    g_t = -exp(A) softplus(a_t + dt)

Per state: S [K, V], q and k [K], v [V]; g, beta, A and dt are scalars. The decay shrinks the whole state, the delta
rule replaces single associations. With `v_activation="silu"`, `biases=False` and Qwen3.5's `norm_eps` it equals a layer
of Qwen3.5 (docs/serving.md).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.deltanet import DeltaNet
from subquad.mixers.exportable import ExportableDeltaNet
from subquad.mixers.gate_init import HALF_LIVES, inverse_softplus
from subquad.mixers.norms import upcast
from subquad.mixers.options import GatedDeltaNetOptions


class GatedDeltaNet(ExportableDeltaNet):
    name = "gated_deltanet"
    Options = GatedDeltaNetOptions  # type: ignore[assignment]
    CALIBRATED_PARAMS = (*DeltaNet.CALIBRATED_PARAMS, ("half_life", HALF_LIVES))
    options: GatedDeltaNetOptions

    def build_gates(self) -> None:
        super().build_gates()
        self.a_proj = nn.Linear(self.spec.hidden_size, self.num_states, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_states))
        self.dt_bias = nn.Parameter(torch.empty(self.num_states))

    def set_log_decay(self, log_decay: Tensor) -> None:
        self.dt_bias.copy_(inverse_softplus(-log_decay))

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        dt = F.softplus(upcast(self.a_proj(x)) + upcast(self.dt_bias))
        return {**super().gates(x, inputs), "log_decay": -upcast(self.A_log).exp() * dt}
