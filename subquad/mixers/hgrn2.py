"""HGRN2 (arXiv 2404.07904, section 3): a decay per channel and no key projection.

    f_t = l + (1 - l) sigmoid(W x_t + b)      k_t = 1 - f_t
    S_t = Diag(f_t) S_{t-1} + k_t v_t^T       o_t = S_t^T q_t / sqrt(K)

Per state: S [K, V], q, k and f [K], v [V], l a constant. As in MetaLA, k = 1 - f ties input to forgetting, but f comes
from a full-rank projection and has the lower bound l.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.base import Mixer
from subquad.mixers.gate_init import LONGEST_HALF_LIVES, spread_half_lives
from subquad.mixers.norms import upcast
from subquad.mixers.options import HGRN2Options


class HGRN2(Mixer):
    name = "hgrn2"
    Options = HGRN2Options
    options: HGRN2Options
    has_key_projection = False
    CALIBRATED_PARAMS = (("half_life", LONGEST_HALF_LIVES),)

    def build_gates(self) -> None:
        self.f_proj = nn.Linear(self.spec.hidden_size, self.num_states * self.feature_dim)

    def set_half_life(self, half_life: Tensor) -> None:
        """Sets the biases to half-lives from one token to `half_life: [G]` tokens where the projection is zero."""
        decay = torch.exp2(-1 / spread_half_lives(half_life, self.feature_dim))
        bound = self.options.lower_bound
        self.f_proj.bias.copy_(torch.logit((decay - bound) / (1 - bound)).flatten())

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = upcast(self.f_proj(x)).unflatten(-1, (self.num_states, -1))
        bound = self.options.lower_bound
        # Both forms avoid cancellation: log f where f is near one, and k = 1 - f = (1 - l) sigmoid(-logits) near zero.
        log_decay = F.logsigmoid(logits) if bound == 0 else torch.log1p(-(1 - bound) * torch.sigmoid(-logits))
        return {"log_decay": log_decay, "k": ((1 - bound) * torch.sigmoid(-logits)).to(inputs["q"].dtype)}
