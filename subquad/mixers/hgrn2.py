"""HGRN2 (arXiv 2404.07904, section 3): a gated linear RNN whose state is expanded by outer products.

    f_t = l + (1 - l) sigmoid(W x_t + b)      k_t = 1 - f_t
    S_t = Diag(f_t) S_{t-1} + k_t v_t^T       o_t = S_t^T q_t / sqrt(K)

No key projection: what a channel forgets is what it takes up, as in MetaLA, but from a projection of full rank, with a
lower bound l on what it keeps. Head norm, no gate.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.base import LONGEST_HALF_LIVES, Mixer
from subquad.mixers.norms import upcast
from subquad.mixers.options import HGRN2Options


class HGRN2(Mixer):
    name = "hgrn2"
    Options = HGRN2Options
    options: HGRN2Options
    has_key_projection = False
    CALIBRATED_PARAMS = (("half_life", LONGEST_HALF_LIVES),)

    def build(self) -> None:
        self.f_proj = nn.Linear(self.spec.hidden_size, self.spec.num_heads * self.spec.head_dim)

    def reset_gates(self) -> None:
        nn.init.zeros_(self.f_proj.weight)
        self.set_half_life(self.per_head(self.options.half_life))

    def set_half_life(self, half_life: Tensor) -> None:
        """The longest of each head, `[H]`, in tokens, where the gate's projection gives zero."""
        half_lives = half_life.unsqueeze(-1) ** torch.linspace(0, 1, self.spec.head_dim).to(half_life)
        kept, bound = torch.exp2(-1 / half_lives), self.options.lower_bound
        bias = torch.logit((kept - bound) / (1 - bound))
        self.f_proj.bias.copy_(bias.flatten())

    def gates(self, x: Tensor, core: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = upcast(self.f_proj(x)).unflatten(-1, (self.spec.num_heads, -1))
        bound = self.options.lower_bound
        # log f without rounding where f is near one, and k = 1 - f = (1 - l) sigmoid(-logits) where it is near zero
        log_decay = F.logsigmoid(logits) if bound == 0 else torch.log1p(-(1 - bound) * torch.sigmoid(-logits))
        return {"log_decay": log_decay, "k": ((1 - bound) * torch.sigmoid(-logits)).to(core["q"].dtype)}
