"""What a mixer needs to be a layer of a model that others serve: SiLU on values too, gates without biases, an epsilon
that is the model's. Off by default; `linearize(..., export_target=...)` turns it on (docs/serving.md)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.base import GATE_BIAS_INIT, Mixer
from subquad.mixers.norms import fit_bias_direction
from subquad.mixers.options import ExportOptions

VALUE_SIZE = 0.1
"""Root mean square of values at which SiLU is nearly x / 2; the output norm takes the scale back."""
VALUE_SCALES = 0.03, 0.1, 0.3, 1.0, 3.0, 10.0
QK_SCALES = 0.3, 1.0, 3.0, 10.0
"""Of queries and keys in front of their SiLU, which is nearly linear far below 1 and nearly ReLU far above; a norm
behind it takes the scale back."""


class ExportMixin(Mixer):
    """A mixer with these options; the other bases of a mixer stand behind it."""

    options: ExportOptions

    def build(self) -> None:
        super().build()
        self.norm_eps = self.options.norm_eps
        if self.scales_values:
            self.CALIBRATED_PARAMS = (("qk_scale", QK_SCALES), ("value_scale", VALUE_SCALES), *self.CALIBRATED_PARAMS)

    @property
    def scales_values(self) -> bool:
        """Whether a fresh mixer makes its values small, by their convolution, so that SiLU does not bend them."""
        return self.options.v_activation == "silu" and self.options.short_conv > 0

    def value(self, v: Tensor) -> Tensor:
        return F.silu(v) if self.options.v_activation == "silu" else v

    def reset_gates(self) -> None:
        super().reset_gates()
        if self.scales_values:
            self.set_value_scale(self.per_head(VALUE_SIZE))
        if self.options.output_gate == "swish" and not self.has_biases:  # at zero it would be closed; see `start_at`
            nn.init.normal_(self.g_proj.weight, std=self.spec.initializer_range)

    @torch.no_grad()
    def init_from_teacher(self, rms: Tensor, x: Tensor) -> None:
        super().init_from_teacher(rms, x)
        if self.scales_values:
            self.set_value_scale(VALUE_SIZE / rms.clamp_min(1e-4))
        if not self.has_biases:
            self.init_bias_free_gates(fit_bias_direction(x.flatten(0, -2)))

    def init_bias_free_gates(self, constant: Tensor) -> None:
        """Gates without a bias start, on tokens x with x `constant` near 1, where they should."""
        if self.options.output_gate == "swish":
            self.g_proj.weight.copy_(constant * GATE_BIAS_INIT["swish"])

    def set_value_scale(self, scale: Tensor) -> None:
        """What the values of each head are multiplied with, `[H]`, in front of their SiLU."""
        self.v_conv[:, -1] = scale.to(self.v_conv).repeat_interleave(self.spec.value_dim)

    def set_qk_scale(self, scale: Tensor) -> None:
        """The same of the queries and keys of each head."""
        for kernel in (self.q_conv, self.k_conv):
            kernel[:, -1] = scale.to(kernel).repeat_interleave(self.spec.head_dim)
