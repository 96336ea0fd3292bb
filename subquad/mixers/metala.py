"""MetaLA (arXiv 2411.10741, section 4): no key projection; what a channel forgets is what it can take up.

    k_t = 1 - exp(g_t)     S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T    o_t = S_t^T q_t / sqrt(K) + (q_t . (w * k_t)) v_t

The last term is the self-augmentation, whose w starts at zero. The decay is GLA's, but a fresh one spreads half-lives
over the channels of each head, from 1 to 256 tokens: channels that all forgot alike would all hold the same average.
"""

import torch
import torch.nn as nn
from torch import Tensor

from subquad.mixers.base import LONGEST_HALF_LIVES
from subquad.mixers.gla import GLA
from subquad.mixers.options import MetaLAOptions


class MetaLA(GLA):
    name = "metala"
    Options = MetaLAOptions
    has_key_projection = False
    CALIBRATED_PARAMS = (("half_life", LONGEST_HALF_LIVES),)

    def build(self) -> None:
        super().build()
        self.augmentation = nn.Parameter(torch.empty(self.spec.num_heads, self.spec.head_dim))

    def reset_gates(self) -> None:
        super().reset_gates()
        nn.init.zeros_(self.augmentation)

    def channel_half_lives(self, half_life: Tensor) -> Tensor:
        return half_life.unsqueeze(-1) ** torch.linspace(0, 1, self.spec.head_dim).to(half_life)

    def gates(self, x: Tensor, core: dict[str, Tensor]) -> dict[str, Tensor]:
        log_decay = self.log_decay(x)
        return {"log_decay": log_decay, "k": -torch.expm1(log_decay).to(core["q"].dtype)}

    def add_skip(self, o: Tensor, core: dict[str, Tensor]) -> Tensor:
        weight = (core["q"] * core["k"] * self.augmentation).sum(-1, keepdim=True) * self.spec.head_dim**-0.5
        return o + weight * core["v"]
