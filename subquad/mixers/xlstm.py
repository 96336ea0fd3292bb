"""mLSTM, the matrix memory of xLSTM (arXiv 2405.04517, equations 19 to 27; normalizer of arXiv 2503.13427).

    S_t = f_t S_{t-1} + i_t k_t v_t^T       n_t = f_t n_{t-1} + i_t k_t       f_t = sigmoid(.), i_t = exp(.)
    o_t = S_t^T q_t / sqrt(K) / max(|n_t . q_t| / sqrt(K), 1)

Per state: S [K, V], q, k and n [K], v [V]; f and i are scalars. S and n are computed relative to the running maximum of
the log gates, for numerical stability.
"""

import torch.nn as nn
from torch import Tensor

from subquad import ops
from subquad.mixers.base import Mixer
from subquad.mixers.gate_init import HALF_LIVES, inverse_softplus
from subquad.mixers.options import XLSTMOptions


class XLSTM(Mixer):
    name = "xlstm"
    Options = XLSTMOptions
    options: XLSTMOptions
    normalized_ops = (ops.mlstm, ops.mlstm_matrix)
    CALIBRATED_PARAMS = (("half_life", HALF_LIVES),)

    def build_gates(self) -> None:
        self.i_proj = nn.Linear(self.spec.hidden_size, self.num_states)
        self.f_proj = nn.Linear(self.spec.hidden_size, self.num_states)

    def reset_gates(self) -> None:
        super().reset_gates()
        nn.init.constant_(self.i_proj.bias, self.options.input_gate_bias)

    def set_log_decay(self, log_decay: Tensor) -> None:
        # log f = logsigmoid(b) = -softplus(-b)
        self.f_proj.bias.copy_(-inverse_softplus(-log_decay))

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"input_gate": self.i_proj(x), "forget_gate": self.f_proj(x)}
