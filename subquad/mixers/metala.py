"""MetaLA (arXiv 2411.10741, section 4): GLA's decay per channel, no key projection, and self-augmentation.

    k_t = 1 - exp(g_t)     S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T    o_t = S_t^T q_t / sqrt(K) + (q_t . (w * k_t)) v_t

Per state: S [K, V], q, k, g and w [K], v [V]; w is one per query head. k = 1 - exp(g) ties input to forgetting. The
last term is the self-augmentation, with w = 0 at initialization. Initial half-lives run from 1 to 256 tokens across the
channels of a state, because channels with equal half-lives would all hold the same average.
"""

import torch
import torch.nn as nn
from torch import Tensor

from subquad.mixers.gate_init import LONGEST_HALF_LIVES, spread_half_lives
from subquad.mixers.gla import GLA
from subquad.mixers.options import MetaLAOptions


class MetaLA(GLA):
    name = "metala"
    Options = MetaLAOptions
    has_key_projection = False
    CALIBRATED_PARAMS = (("half_life", LONGEST_HALF_LIVES),)

    def build_gates(self) -> None:
        super().build_gates()
        if not self.memory_only:
            self.self_augmentation = nn.Parameter(torch.empty(self.spec.num_heads, self.feature_dim))

    def set_half_life(self, half_life: Tensor) -> None:
        """Sets the biases to half-lives from one token to `half_life: [G]` tokens where the projection is zero."""
        super().set_half_life(spread_half_lives(half_life, self.feature_dim))

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        log_decay = self.log_decay(x)
        return {"log_decay": log_decay, "k": -torch.expm1(log_decay).to(inputs["q"].dtype)}

    def add_skip(self, o: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        k, v = self.for_queries(inputs["k"]), self.for_queries(inputs["v"])
        qwk = (inputs["q"] * k * self.self_augmentation).sum(-1, keepdim=True)
        return o + qwk * self.feature_dim**-0.5 * v
