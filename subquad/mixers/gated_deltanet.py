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
from subquad.mixers.exportable import ExportableMixer
from subquad.mixers.gate_init import HALF_LIVES, inverse_softplus
from subquad.mixers.norms import upcast
from subquad.mixers.options import GatedDeltaNetOptions


class GatedDeltaNet(ExportableMixer, DeltaNet):
    name = "gated_deltanet"
    Options = GatedDeltaNetOptions  # type: ignore[assignment]
    CALIBRATED_PARAMS = (*DeltaNet.CALIBRATED_PARAMS, ("half_life", HALF_LIVES))
    options: GatedDeltaNetOptions
    bias_direction: Tensor | None = None
    """Without biases: a vector d `[hidden]` with x . d near 1 on the teacher's tokens, so that a weight c d acts as a
    bias c. `init_from_teacher` sets it, before any call of `set_beta_init`."""

    def build_gates(self) -> None:
        super().build_gates()
        self.a_proj = nn.Linear(self.spec.hidden_size, self.num_states, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_states))
        self.dt_bias = nn.Parameter(torch.empty(self.num_states))

    def init_bias_free_gates(self, bias_direction: Tensor) -> None:
        super().init_bias_free_gates(bias_direction)
        self.bias_direction = bias_direction
        self.set_beta_init(self.per_state(self.options.beta_init))

    def set_beta_init(self, beta: Tensor) -> None:
        if self.has_biases:
            super().set_beta_init(beta)
            return
        if self.bias_direction is None:
            raise RuntimeError("set_beta_init: a mixer without biases needs init_from_teacher first")
        logit = torch.logit(beta).unsqueeze(-1)
        self.b_proj.weight.copy_(logit * self.bias_direction.to(logit))

    def set_log_decay(self, log_decay: Tensor) -> None:
        self.dt_bias.copy_(inverse_softplus(-log_decay))

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        dt = F.softplus(upcast(self.a_proj(x)) + upcast(self.dt_bias))
        return {**super().gates(x, inputs), "log_decay": -upcast(self.A_log).exp() * dt}
