"""Gated linear attention (arXiv 2312.06635, section 4): a decay per channel, from a low-rank projection.

    S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t / sqrt(K)      g_t = logsigmoid(W_2 W_1 x_t + b) / 16

Per state: S [K, V], q, k and g [K], v [V].
"""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.base import CalibrationGrid, Mixer
from subquad.mixers.gate_init import HALF_LIVES, inverse_logsigmoid
from subquad.mixers.norms import upcast
from subquad.mixers.options import GLAOptions

GATE_LOGIT_NORMALIZER = 16.0
"""tau of the paper, by which the log of the gate is divided: decays are near one for logits near zero."""


class GLA(Mixer):
    name = "gla"
    Options = GLAOptions
    options: GLAOptions
    CALIBRATED_PARAMS: CalibrationGrid = (("half_life", HALF_LIVES),)

    def build_gates(self) -> None:
        self.decay_down = nn.Linear(self.spec.hidden_size, self.options.decay_rank, bias=False)
        self.decay_up = nn.Linear(self.options.decay_rank, self.num_states * self.feature_dim)

    def reset_gates(self) -> None:
        super().reset_gates()
        nn.init.normal_(self.decay_down.weight, std=self.spec.hidden_size**-0.5)

    def set_log_decay(self, log_decay: Tensor) -> None:
        log_decay = log_decay.view(self.num_states, -1).expand(-1, self.feature_dim)
        self.decay_up.bias.copy_(inverse_logsigmoid(GATE_LOGIT_NORMALIZER * log_decay).flatten())

    def log_decay(self, x: Tensor) -> Tensor:
        """g, `[B, T, G, K]`, in float32 at least."""
        logits = upcast(self.decay_up(self.decay_down(x)))
        return (F.logsigmoid(logits) / GATE_LOGIT_NORMALIZER).unflatten(-1, (self.num_states, -1))

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": self.log_decay(x)}
