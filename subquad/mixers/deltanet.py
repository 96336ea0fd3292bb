"""DeltaNet (arXiv 2406.06484, equations 3 to 5): the delta rule, without decay.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T     o_t = S_t^T q_t / sqrt(K)     beta_t = sigmoid(w . x_t + b)

Per state: S [K, V], q and k [K], v [V], beta a scalar. An update replaces what the state returns for its key. q and k
are L2-normalized after short convolution and activation.
"""

from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from subquad.mixers.base import CalibrationGrid, Mixer
from subquad.mixers.norms import l2_norm
from subquad.mixers.options import DeltaNetOptions, MixerOptions


class DeltaNet(Mixer):
    name = "deltanet"
    Options: ClassVar[type[MixerOptions]] = DeltaNetOptions
    CALIBRATED_PARAMS: CalibrationGrid = (("beta_init", (0.03, 0.06, 0.12, 0.25, 0.5)),)
    options: DeltaNetOptions

    def build_gates(self) -> None:
        self.b_proj = nn.Linear(self.spec.hidden_size, self.num_states, bias=self.has_biases)

    def reset_gates(self) -> None:
        super().reset_gates()
        if self.has_biases:  # else `init_from_teacher` sets it
            self.set_beta_init(self.per_state(self.options.beta_init))

    def set_beta_init(self, beta: Tensor) -> None:
        """Sets the bias of each state so that beta is `beta: [G]` where the projection is zero."""
        self.b_proj.bias.copy_(torch.logit(beta))

    def feature_map(self, *args: Any, **kwargs: Any) -> Tensor:
        return l2_norm(super().feature_map(*args, **kwargs))

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"beta": torch.sigmoid(self.b_proj(x))}
