"""Mixers with `ExportOptions`, whose layers can equal those of a published architecture."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.base import Mixer
from subquad.mixers.deltanet import DeltaNet
from subquad.mixers.gate_init import GATE_BIAS_INIT, fit_bias_direction
from subquad.mixers.options import ExportOptions, GatedDeltaNetOptions, KDAOptions

VALUE_RMS_INIT = 0.1
"""Root mean square of values before SiLU at which SiLU(v) is nearly v / 2; the output norm compensates the scale."""
VALUE_SCALES = 0.03, 0.1, 0.3, 1.0, 3.0, 10.0
QK_SCALES = 0.3, 1.0, 3.0, 10.0
"""Scales of q and k before their SiLU, which is nearly linear far below 1 and nearly ReLU far above; the norm that
follows compensates the scale."""


class ExportableMixer(Mixer):
    """Adds an activation of values and gates without biases; list it before a mixer's other base class."""

    options: ExportOptions

    def build_gates(self) -> None:
        super().build_gates()
        self.norm_eps = self.options.norm_eps
        if self.scales_values:
            self.CALIBRATED_PARAMS = (("qk_scale", QK_SCALES), ("value_scale", VALUE_SCALES), *self.CALIBRATED_PARAMS)

    @property
    def scales_values(self) -> bool:
        """Whether the convolution initially scales values down, so that SiLU is nearly linear on them."""
        return self.options.v_activation == "silu" and self.options.short_conv > 0

    def value_map(self, v: Tensor) -> Tensor:
        return F.silu(v) if self.options.v_activation == "silu" else v

    def reset_gates(self) -> None:
        super().reset_gates()
        if self.scales_values:
            self.set_value_scale(self.per_state(VALUE_RMS_INIT))
        if self.options.output_gate == "swish" and not self.has_biases:
            # Zero weights would close the gate; see also `init_bias_free_gates`.
            nn.init.normal_(self.g_proj.weight, std=self.spec.initializer_range)

    @torch.no_grad()
    def init_from_teacher(self, rms: Tensor, x: Tensor) -> None:
        super().init_from_teacher(rms, x)
        if self.scales_values:
            of_states = rms.view(self.num_states, -1).square().mean(-1).sqrt()
            self.set_value_scale(VALUE_RMS_INIT / of_states.clamp_min(1e-4))
        if not self.has_biases:
            self.init_bias_free_gates(fit_bias_direction(x.flatten(0, -2)))

    def init_bias_free_gates(self, bias_direction: Tensor) -> None:
        """Sets gate weights so that the gates have their initial values on tokens with x . `bias_direction` = 1."""
        if self.options.output_gate == "swish":
            self.g_proj.weight.copy_(bias_direction * GATE_BIAS_INIT["swish"])

    def set_value_scale(self, scale: Tensor) -> None:
        """Scales the values of each state by `scale: [G]` before their SiLU."""
        self.v_conv[:, -1] = scale.to(self.v_conv).repeat_interleave(self.spec.value_dim)

    def set_qk_scale(self, scale: Tensor) -> None:
        """Scales the queries and keys of each state by `scale: [G]` before their SiLU."""
        for weight in (self.q_conv, self.k_conv):
            weight[:, -1] = scale.to(weight).repeat_interleave(len(weight) // self.num_states)


class ExportableDeltaNet(ExportableMixer, DeltaNet):
    """The delta rule, whose beta can do without a bias."""

    options: GatedDeltaNetOptions | KDAOptions
    bias_direction: Tensor | None = None
    """Without biases: a vector d `[hidden]` with x . d near 1 on the teacher's tokens, so that a weight c d acts as a
    bias c. `init_from_teacher` sets it, before any call of `set_beta_init`."""

    def init_bias_free_gates(self, bias_direction: Tensor) -> None:
        super().init_bias_free_gates(bias_direction)
        self.bias_direction = bias_direction
        self.set_beta_init(self.per_state(self.options.beta_init))

    def set_beta_init(self, beta: Tensor) -> None:
        if self.has_biases:
            super().set_beta_init(beta)
            return
        if self.bias_direction is None:
            raise RuntimeError("set_beta_init: a mixer without biases needs init_from_teacher first")
        logit = torch.logit(beta).unsqueeze(-1)
        self.b_proj.weight.copy_(logit * self.bias_direction.to(logit))
