"""Converts a `mamba2` student to a Granite 4 hybrid without experts (`GraniteMoeHybridForCausalLM`).

Granite 4 has Mamba-2, or attention, in Llama's layers. Each head of the student becomes a group with its own B and C (k
and q), and a norm behind its gate. Mamba-2 does not scale queries by 1 / sqrt(K): D is multiplied by sqrt(K), and the
norm's epsilon by K (`ExportTarget.mixer_norm_eps`). See docs/serving.md.
"""

from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.export.converter import IDENTITY_HEAD_DIM, Converter, Weights, conv_weight
from subquad.mixers import AttentionSpec
from subquad.mixers.mamba2 import Mamba2
from subquad.modeling.decoder_weights import DecoderLayerWeights
from subquad.modeling.export_target import GRANITE_HYBRID, ExportError
from subquad.utils import UserError


def has_group_norm() -> bool:
    """Whether Granite 4 in this version of `transformers` norms each group by itself, as Mamba-2, vLLM and llama.cpp
    do."""
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

    return "group_size" in signature(GraniteMoeHybridRMSNormGated.__init__).parameters


class GraniteHybridConverter(Converter):
    target = GRANITE_HYBRID
    class_names = ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM")
    expand: ClassVar[int | None] = None
    """Channels of a mixer, relative to the hidden size, if only one number is possible: heads of zeros fill it up."""

    def classes(self) -> tuple[Any, Any]:
        if not has_group_norm():
            raise UserError(
                "Granite 4 in this version of transformers has one norm for all heads, a student one for each; "
                "expected a later version (5.24 has it)"
            )
        return super().classes()

    def identity_heads(self, hidden: int) -> tuple[int, int, int]:
        """vLLM computes the channels of a head from the hidden size."""
        heads = hidden // IDENTITY_HEAD_DIM if hidden % IDENTITY_HEAD_DIM == 0 else 1
        return heads, 1, hidden // heads

    def config(
        self, common: dict[str, Any], spec: AttentionSpec, conv_width: int, attention_layers: list[int]
    ) -> dict[str, Any]:
        heads, hidden = self.num_heads(spec), common["hidden_size"]
        if common["rope_parameters"]["partial_rotary_factor"] != 1:
            raise ExportError("its attention rotates some of the channels of a head, expected all")
        layers = range(common["num_hidden_layers"])
        return {
            **common,
            "layer_types": ["full_attention" if i in attention_layers else "linear_attention" for i in layers],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": common["intermediate_size"],
            "position_embedding_type": "rope",
            "attention_multiplier": common["head_dim"] ** -0.5,
            "mamba_n_heads": heads,
            "mamba_n_groups": heads,
            "mamba_d_head": spec.value_dim,
            "mamba_d_state": spec.head_dim,
            "mamba_d_conv": conv_width,
            "mamba_expand": heads * spec.value_dim // hidden,
            "mamba_conv_bias": False,
            "mamba_proj_bias": False,
        }

    def num_heads(self, spec: AttentionSpec) -> int:
        """Heads of a mixer in the target, with those of zeros."""
        inner, hidden = spec.num_heads * spec.value_dim, spec.hidden_size
        wanted = inner if self.expand is None else self.expand * hidden
        if wanted % hidden or wanted % spec.value_dim or wanted < inner:
            expected = f"expected a multiple of its hidden size {hidden}"
            if self.expand is not None:
                expected = f"llama.cpp expects {wanted}, or fewer in heads whose size divides it"
            raise ExportError(f"its mixers have {inner} channels in heads of {spec.value_dim}; {expected}")
        return wanted // spec.value_dim

    def mlp_weights(self, layer: DecoderLayerWeights) -> Weights:
        return {
            "shared_mlp.input_linear.weight": torch.cat([layer.gate, layer.up]),
            "shared_mlp.output_linear.weight": layer.down,
        }

    def mixer_weights(self, mixer: Mamba2, conv_width: int, factor: float) -> Weights:
        W = {name: projection.weight.detach() for name, projection in mixer.projections().items()}
        spec, names = mixer.spec, ("v", "k", "q")
        sizes = {"v": spec.value_dim, "k": spec.head_dim, "q": spec.head_dim}
        zeros = self.num_heads(spec) - spec.num_heads

        def padded(weight: Tensor, channels: int) -> Tensor:
            """`weight`, whose rows are the channels of all heads, with rows of zeros for the heads that are added."""
            return F.pad(weight.detach(), [0, 0] * (weight.dim() - 1) + [0, zeros * channels])

        rows = [padded(mixer.g_proj.weight, spec.value_dim), *(padded(W[name], sizes[name]) for name in names)]
        weights = {
            "in_proj.weight": torch.cat([*rows, padded(mixer.a_proj.weight, 1)]),
            "conv1d.weight": torch.cat([padded(conv_weight(mixer, (n,), conv_width), sizes[n]) for n in names]),
            "dt_bias": padded(mixer.a_proj.bias, 1),
            "A_log": padded(mixer.A_log, 1),
            "D": padded(mixer.D * spec.head_dim**0.5, 1),
            "norm.weight": padded(mixer.o_norm.flatten(), spec.value_dim),
            "out_proj.weight": padded((W["o"] * factor).T, spec.value_dim).T,
        }
        return {f"mamba.{name}": weight for name, weight in weights.items()}


class LlamaCppConverter(GraniteHybridConverter):
    """For llama.cpp, whose Granite 4 has mixers of twice the hidden size."""

    expand = 2
