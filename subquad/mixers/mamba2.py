"""Mamba-2's state space duality (arXiv 2405.21060, section 5), in the discrete form of MOHAWK (arXiv 2408.10189).

    S_t = exp(g_t) S_{t-1} + k_t v_t^T       o_t = S_t^T q_t / sqrt(K) + D v_t       g_t = -softplus(a_t)

Per state: S [K, V], q and k [K], v [V]; g and a are scalars; D is one per query head. q, k and v are Mamba's C, B
and x after the short convolution. `discretization="zoh"` is Mamba-2's own form: dt_t = softplus(a_t), g_t = -dt_t
exp(A), and k_t is multiplied by dt_t. The gate precedes the norm, as in Mamba-2. In the zoh form, with
`v_activation="silu"` and `biases=False`, it equals a layer of Granite 4 (docs/serving.md).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.exportable import ExportableMixer
from subquad.mixers.gate_init import HALF_LIVES, inverse_softplus
from subquad.mixers.norms import upcast
from subquad.mixers.options import Mamba2Options


class Mamba2(ExportableMixer):
    name = "mamba2"
    Options = Mamba2Options
    options: Mamba2Options
    gate_before_norm = True
    CALIBRATED_PARAMS = (("half_life", HALF_LIVES),)

    def build_gates(self) -> None:
        super().build_gates()
        self.a_proj = nn.Linear(self.spec.hidden_size, self.num_states)
        if not self.memory_only:
            self.D = nn.Parameter(torch.empty(self.spec.num_heads))
        if self.options.discretization == "zoh":
            self.A_log = nn.Parameter(torch.empty(self.num_states))

    def set_log_decay(self, log_decay: Tensor) -> None:
        self.a_proj.bias.copy_(inverse_softplus(-log_decay))

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        dt = F.softplus(upcast(self.a_proj(x)))
        if self.options.discretization == "unit":
            return {"log_decay": -dt}
        return {"log_decay": -dt * upcast(self.A_log).exp(), "k": inputs["k"] * dt.unsqueeze(-1).to(inputs["k"].dtype)}

    def add_skip(self, o: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return o + self.D.to(o.dtype).unsqueeze(-1) * self.for_queries(inputs["v"])

    def mixing_matrix(self, inputs: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        M = super().mixing_matrix(inputs, rows)
        if self.memory_only:
            return M
        identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)[rows or slice(None)]
        return M + self.D.to(M.dtype).view(-1, 1, 1) * identity
