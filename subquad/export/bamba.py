"""Converts a `mamba2` student to a Bamba model (`BambaForCausalLM`).

Bamba has Mamba-2, or attention, in Llama's layers. Each head of the student becomes a group with its own B and C (k and
q), and a norm behind its gate. Bamba does not scale queries by 1 / sqrt(K): D is multiplied by sqrt(K), and the norm's
epsilon by K (`ExportTarget.mixer_norm_eps`). See docs/serving.md.
"""

from inspect import signature
from typing import Any

import torch

from subquad.export.converter import Converter, Weights, conv_weight
from subquad.mixers import AttentionSpec
from subquad.mixers.mamba2 import Mamba2
from subquad.modeling.export_target import BAMBA, ExportError
from subquad.utils import UserError


def has_group_norm() -> bool:
    """Whether Bamba in this version of `transformers` norms each group by itself, as Mamba-2 and vLLM do."""
    from transformers.models.bamba.modeling_bamba import BambaRMSNormGated

    return "group_size" in signature(BambaRMSNormGated.__init__).parameters


class BambaConverter(Converter):
    target = BAMBA
    class_names = ("BambaConfig", "BambaForCausalLM")
    final_norm = "model.final_layernorm.weight"
    mlp = "feed_forward"
    mlp_norm = "pre_ff_layernorm"

    def classes(self) -> tuple[Any, Any]:
        if not has_group_norm():
            raise UserError(
                "Bamba in this version of transformers has one norm for all heads, a student one for each; expected a "
                "later version (5.24 has it)"
            )
        return super().classes()

    def config(
        self, common: dict[str, Any], spec: AttentionSpec, conv_width: int, attention_layers: list[int]
    ) -> dict[str, Any]:
        inner, hidden = spec.num_heads * spec.value_dim, common["hidden_size"]
        if inner % hidden:
            raise ExportError(f"its mixers have {inner} channels, expected a multiple of its hidden size {hidden}")
        return {
            **common,
            "attn_layer_indices": attention_layers,
            "mamba_n_heads": spec.num_heads,
            "mamba_n_groups": spec.num_heads,
            "mamba_d_head": spec.value_dim,
            "mamba_d_state": spec.head_dim,
            "mamba_d_conv": conv_width,
            "mamba_expand": inner // hidden,
            "mamba_conv_bias": False,
            "mamba_proj_bias": False,
        }

    def mixer_weights(self, mixer: Mamba2, conv_width: int, factor: float) -> Weights:
        W = {name: projection.weight.detach() for name, projection in mixer.projections().items()}
        weights = {
            "in_proj.weight": torch.cat([mixer.g_proj.weight, W["v"], W["k"], W["q"], mixer.a_proj.weight]).detach(),
            "conv1d.weight": conv_weight(mixer, ("v", "k", "q"), conv_width),
            "dt_bias": mixer.a_proj.bias.detach(),
            "A_log": mixer.A_log.detach(),
            "D": mixer.D.detach() * mixer.spec.head_dim**0.5,
            "norm.weight": mixer.o_norm.detach().flatten(),
            "out_proj.weight": W["o"] * factor,
        }
        return {f"mamba.{name}": weight for name, weight in weights.items()}
