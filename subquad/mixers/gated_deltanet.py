"""Gated DeltaNet (arXiv 2412.06464, equation 10): the delta rule with Mamba-2's decay.

    S~_t = exp(g_t) S_{t-1}     S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T     o_t = S_t^T q_t / sqrt(K)
    g_t = -exp(A) softplus(a_t + dt)

Decay clears the whole state, the delta rule single associations. With `v_activation="silu"`, `biases=False` and the
`norm_eps` of its model it is a layer of Qwen3.5 (docs/serving.md).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.errors import UserError
from subquad.mixers.base import GATES, HALF_LIVES, half_life_decay, inverse_softplus
from subquad.mixers.deltanet import DeltaNet, DeltaNetOptions
from subquad.mixers.norms import constant_direction, widen

VALUE_SIZE = 0.1
"""Root mean square of values at which SiLU is nearly x / 2; the output norm takes the scale back."""
VALUE_SCALES = 0.03, 0.1, 0.3, 1.0, 3.0, 10.0
QK_SCALES = 0.3, 1.0, 3.0, 10.0
"""Of queries and keys in front of their SiLU, which is nearly linear far below 1 and nearly ReLU far above; the L2 norm
takes the scale back."""


@dataclass(frozen=True)
class GatedDeltaNetOptions(DeltaNetOptions):
    output_gate: str = "swish"
    half_life: float = 32.0
    write_strength: float = 0.1
    v_activation: str = "none"
    """On values behind their convolution: silu or none."""
    biases: bool = True
    """False: no projection has one, those of the gates neither."""
    norm_eps: float = 1e-8
    """Added to the mean square in the output norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.v_activation not in ("silu", "none"):
            raise UserError(f"v_activation: unknown {self.v_activation!r}; expected silu or none")
        if not 0 < self.norm_eps < 1:
            raise UserError(f"norm_eps: got {self.norm_eps}, expected a small positive number")


class GatedDeltaNet(DeltaNet):
    name = "gated_deltanet"
    Options = GatedDeltaNetOptions
    KNOBS = (*DeltaNet.KNOBS, ("half_life", HALF_LIVES))
    options: GatedDeltaNetOptions

    def build(self) -> None:
        super().build()
        self.norm_eps = self.options.norm_eps
        H = self.layout.num_heads
        self.a_proj = nn.Linear(self.layout.hidden_size, H, bias=False)
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        if self.scales_values:
            self.KNOBS = (("qk_scale", QK_SCALES), ("value_scale", VALUE_SCALES), *self.KNOBS)

    @property
    def scales_values(self) -> bool:
        """Whether a fresh mixer makes its values small, by their convolution, so that SiLU does not bend them."""
        return self.options.v_activation == "silu" and self.options.short_conv > 0

    def value(self, v: Tensor) -> Tensor:
        return F.silu(v) if self.options.v_activation == "silu" else v

    def reset_gates(self) -> None:
        super().reset_gates()
        nn.init.zeros_(self.a_proj.weight)
        nn.init.zeros_(self.A_log)
        self.set_half_life(self.per_head(self.options.half_life))
        if self.scales_values:
            self.set_value_scale(self.per_head(VALUE_SIZE))
        if self.options.output_gate == "swish" and not self.has_biases:  # at zero it would be closed; see `start_at`
            nn.init.normal_(self.g_proj.weight, std=self.layout.initializer_range)

    @torch.no_grad()
    def start_at(self, rms: Tensor, x: Tensor) -> None:
        super().start_at(rms, x)
        if self.scales_values:
            self.set_value_scale(VALUE_SIZE / rms.clamp_min(1e-4))
        self.stand_on(x)

    @torch.no_grad()
    def stand_on(self, x: Tensor) -> None:
        """Gates without a bias start, on tokens such as `x: [.., hidden]`, as near to where they should as a linear map
        of x comes."""
        if self.has_biases:
            return
        self.constant = constant_direction(x.flatten(0, -2))
        if self.options.output_gate == "swish":
            self.g_proj.weight.copy_(self.constant * (GATES["swish"] or 0.0))
        self.set_write_strength(self.per_head(self.options.write_strength))

    def set_write_strength(self, strength: Tensor) -> None:
        if self.has_biases:
            super().set_write_strength(strength)
        elif hasattr(self, "constant"):
            logit = torch.logit(strength).unsqueeze(-1)
            self.b_proj.weight.copy_(logit * self.constant.to(logit))

    def set_half_life(self, half_life: Tensor) -> None:
        """Of the memory of each head, `[H]`, in tokens, where the gate's projection gives zero."""
        self.dt_bias.copy_(inverse_softplus(-half_life_decay(half_life)))

    def set_value_scale(self, scale: Tensor) -> None:
        """What the values of each head are multiplied with, `[H]`, in front of their SiLU."""
        self.v_conv[:, -1] = scale.to(self.v_conv).repeat_interleave(self.layout.value_dim)

    def set_qk_scale(self, scale: Tensor) -> None:
        """The same of the queries and keys of each head."""
        for kernel in (self.q_conv, self.k_conv):
            kernel[:, -1] = scale.to(kernel).repeat_interleave(self.layout.head_dim)

    def gates(self, x: Tensor, core: dict[str, Tensor]) -> dict[str, Tensor]:
        step = F.softplus(widen(self.a_proj(x)) + widen(self.dt_bias))
        return {**super().gates(x, core), "log_decay": -widen(self.A_log).exp() * step}
