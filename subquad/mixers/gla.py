"""Gated linear attention (arXiv 2312.06635, section 4): a decay per channel, from a low-rank projection.

S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T       o_t = S_t^T q_t / sqrt(K)       g_t = logsigmoid(W_2 W_1 x_t + b) / 16
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.base import HALF_LIVES, CalibrationGrid, Mixer, half_life_decay
from subquad.mixers.norms import upcast
from subquad.mixers.options import GLAOptions

TEMPERATURE = 16.0
"""tau of the paper: it keeps decays near one where the gate's logits are near zero."""


class GLA(Mixer):
    name = "gla"
    Options = GLAOptions
    options: GLAOptions
    CALIBRATED_PARAMS: CalibrationGrid = (("half_life", HALF_LIVES),)

    def build(self) -> None:
        H, K = self.spec.num_heads, self.spec.head_dim
        self.decay_down = nn.Linear(self.spec.hidden_size, self.options.decay_rank, bias=False)
        self.decay_up = nn.Linear(self.options.decay_rank, H * K)

    def reset_gates(self) -> None:
        nn.init.normal_(self.decay_down.weight, std=self.spec.hidden_size**-0.5)
        nn.init.zeros_(self.decay_up.weight)
        self.set_half_life(self.per_head(self.options.half_life))

    def set_half_life(self, half_life: Tensor) -> None:
        """Of each head, `[H]`, in tokens, where the gate's projection gives zero."""
        log_decay = half_life_decay(self.channel_half_lives(half_life))
        self.decay_up.bias.copy_(logsigmoid_inverse(TEMPERATURE * log_decay).flatten())

    def channel_half_lives(self, half_life: Tensor) -> Tensor:
        """The half-life of every channel, `[H, K]`, from that of its head."""
        return half_life.unsqueeze(-1).expand(-1, self.spec.head_dim)

    def log_decay(self, x: Tensor) -> Tensor:
        """[B, T, H, K] in float32 at least."""
        logits = upcast(self.decay_up(self.decay_down(x)))
        return (F.logsigmoid(logits) / TEMPERATURE).unflatten(-1, (self.spec.num_heads, -1))

    def gates(self, x: Tensor, core: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": self.log_decay(x)}


def logsigmoid_inverse(y: Tensor) -> Tensor:
    """x with logsigmoid(x) = y < 0: y - log(1 - exp(y)), in the dtype of y, which should be float64."""
    return y - torch.log(-torch.expm1(y))
