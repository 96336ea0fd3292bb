"""DeltaNet (arXiv 2406.06484, equations 3 to 5): a write corrects what the state already answers to its key.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T     o_t = S_t^T q_t / sqrt(K)     beta_t = sigmoid(w . x_t + b)

Queries and keys are L2-normalised behind short convolution and activation. Nothing decays: old content goes where new
content is written over it.
"""

import torch
import torch.nn as nn
from torch import Tensor

from subquad.mixers.base import CalibrationGrid, Mixer
from subquad.mixers.norms import l2_norm
from subquad.mixers.options import DeltaNetOptions


class DeltaNet(Mixer):
    name = "deltanet"
    Options = DeltaNetOptions
    CALIBRATED_PARAMS: CalibrationGrid = (("beta_init", (0.03, 0.06, 0.12, 0.25, 0.5)),)
    options: DeltaNetOptions

    def build(self) -> None:
        self.b_proj = nn.Linear(self.spec.hidden_size, self.spec.num_heads, bias=self.has_biases)

    def reset_gates(self) -> None:
        nn.init.zeros_(self.b_proj.weight)
        self.set_beta_init(self.per_head(self.options.beta_init))

    def set_beta_init(self, strength: Tensor) -> None:
        """beta of each head, `[H]`, where its projection gives zero."""
        self.b_proj.bias.copy_(torch.logit(strength))

    def feature_map(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        return l2_norm(super().feature_map(x, position_embeddings))

    def gates(self, x: Tensor, core: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"beta": torch.sigmoid(self.b_proj(x))}
