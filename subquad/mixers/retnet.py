"""Retention of RetNet (arXiv 2307.08621, equations 5 to 8): a fixed decay per head.

    S_t = gamma_h S_{t-1} + k_t v_t^T        o_t = S_t^T q_t / sqrt(K)        gamma_h = 1 - 2^(-5 - h)

Per state h = 0, 1, ...: S [K, V], q and k [K], v [V], gamma a scalar. Half-lives double from state to state, starting
at 22 tokens. The teacher's rotary embedding is kept.
"""

import torch
from torch import Tensor

from subquad.mixers.base import Mixer
from subquad.mixers.options import RetNetOptions


class RetNet(Mixer):
    name = "retnet"
    Options = RetNetOptions

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # A constant of the architecture, computed here so that no checkpoint needs to hold it.
        heads = torch.arange(self.num_states, device=x.device, dtype=torch.float32)
        log_decay = torch.log1p(-torch.exp2(-5 - heads))
        return {"log_decay": log_decay.expand(*x.shape[:2], -1)}
