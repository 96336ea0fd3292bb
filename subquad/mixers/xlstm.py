"""mLSTM, the matrix memory of xLSTM (arXiv 2405.04517, equations 19 to 27; 2503.13427 for the normaliser).

    S_t = f_t S_{t-1} + i_t k_t v_t^T       n_t = f_t n_{t-1} + i_t k_t       f_t = sigmoid(.), i_t = exp(.)
    o_t = S_t^T q_t / sqrt(K) / max(|n_t . q_t| / sqrt(K), 1)

computed with the running maximum m_t of the log gates taken out of S and n. Head norm, sigmoid output gate.
"""

from typing import Any

import torch.nn as nn
from torch import Tensor

from subquad import ops
from subquad.mixers.base import HALF_LIVES, Mixer, State, half_life_decay, inverse_softplus
from subquad.mixers.options import XLSTMOptions


class XLSTM(Mixer):
    name = "xlstm"
    Options = XLSTMOptions
    CALIBRATED_PARAMS = (("half_life", HALF_LIVES),)

    def build(self) -> None:
        self.i_proj = nn.Linear(self.spec.hidden_size, self.spec.num_heads)
        self.f_proj = nn.Linear(self.spec.hidden_size, self.spec.num_heads)

    def reset_gates(self) -> None:
        for projection in (self.i_proj, self.f_proj):
            nn.init.zeros_(projection.weight)
        nn.init.zeros_(self.i_proj.bias)
        self.set_half_life(self.per_head(self.options.half_life))

    def set_half_life(self, half_life: Tensor) -> None:
        """Of the memory of each head, `[H]`, in tokens, where the gate's projection gives zero."""
        # logsigmoid(f) = -softplus(-f)
        self.f_proj.bias.copy_(-inverse_softplus(-half_life_decay(half_life)))

    def gates(self, x: Tensor, core: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"input_gate": self.i_proj(x), "forget_gate": self.f_proj(x)}

    def mixing_matrix(self, core: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        return ops.mlstm_matrix(core["q"], core["k"], core["input_gate"], core["forget_gate"], rows=rows)

    def run_op(self, core: dict[str, Any], state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        form = "step" if core["q"].shape[1] == 1 and cu_seqlens is None else "chunk"
        return ops.mlstm(**core, initial_state=state or None, form=form, cu_seqlens=cu_seqlens)  # type: ignore[arg-type]
