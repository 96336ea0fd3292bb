"""Converts a `kda` student to a Kimi Linear without experts (`KimiLinearForCausalLM`).

Kimi Linear has KDA, or multi-head latent attention (MLA) without positions, in Llama's layers. MLA norms the latent
that keys and values are computed from, so that it is not equal to a teacher's attention; only the identity layer has
it. The student's norm weights, one per head and channel, are folded into the output projection. The configuration has
the names of `transformers` and those of Moonshot's own, which mlx-lm and vLLM read. See docs/serving.md.
"""

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from subquad.export.converter import Converter, Weights, conv_weight
from subquad.mixers import AttentionSpec
from subquad.mixers.kda import KDA
from subquad.modeling.export_target import KIMI_LINEAR, ExportError

LINEAR_TYPES = {True: "linear_attention", False: "full_attention"}


class KimiLinearConverter(Converter):
    target = KIMI_LINEAR
    class_names = ("KimiLinearConfig", "KimiLinearForCausalLM")
    latent_sizes: ClassVar[dict[str, int]] = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
    """Sizes of the identity layer's attention: Kimi Linear's own, for which vLLM has kernels."""

    def config(
        self, common: dict[str, Any], spec: AttentionSpec, conv_width: int, attention_layers: list[int]
    ) -> dict[str, Any]:
        if spec.head_dim != spec.value_dim:
            raise ExportError(
                f"its mixers have values of {spec.value_dim} channels per head and keys of {spec.head_dim}, expected "
                "the same"
            )
        count = common["num_hidden_layers"]
        is_linear = [i not in attention_layers for i in range(count)]
        dropped = ("head_dim", "rope_parameters", "tie_word_embeddings")
        return {
            **{name: value for name, value in common.items() if name not in dropped},
            **self.latent_sizes,
            "tie_word_embeddings": False,  # KimiLinearForCausalLM ties none
            "layer_types": [LINEAR_TYPES[linear] for linear in is_linear],
            "mlp_layer_types": ["dense"] * count,
            "linear_head_dim": spec.head_dim,
            "linear_num_heads": spec.num_heads,
            "linear_conv_kernel_dim": conv_width,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "moe_intermediate_size": 0,
            "first_k_dense_replace": count,
            "mla_use_nope": True,
            "rope_theta": 10_000.0,
            "linear_attn_config": {
                "head_dim": spec.head_dim,
                "num_heads": spec.num_heads,
                "short_conv_kernel_size": conv_width,
                "kda_layers": [i + 1 for i, linear in enumerate(is_linear) if linear],
                "full_attn_layers": [i + 1 for i, linear in enumerate(is_linear) if not linear],
            },
        }

    def mixer_weights(self, mixer: KDA, conv_width: int, factor: float) -> Weights:
        """Kimi Linear has one norm weight for all heads; the student's are folded into the output projection."""
        W = {name: projection.weight.detach() for name, projection in mixer.projections().items()}
        weights: dict[str, Tensor] = {
            **{f"{name}_proj.weight": W[name] for name in "qkv"},
            "conv1d.weight": conv_weight(mixer, ("q", "k", "v"), conv_width),
            "forget_gate.f_a_proj.weight": mixer.decay_down.weight,
            "forget_gate.f_b_proj.weight": mixer.decay_up.weight,
            "forget_gate.A_log": mixer.A_log.view(1, 1, -1, 1),
            "forget_gate.dt_bias": mixer.dt_bias.flatten(),
            "b_proj.weight": mixer.b_proj.weight,
            "g_a_proj.weight": mixer.g_down.weight,
            "g_b_proj.weight": mixer.g_proj.weight,
            "o_norm.weight": W["o"].new_ones(mixer.spec.value_dim),
            "o_proj.weight": W["o"] * mixer.o_norm.flatten() * factor,
        }
        return {f"self_attn.{name}": weight.detach() for name, weight in weights.items()}

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        model.save_pretrained(directory, state_dict=checkpoint_weights(model), save_original_format=False)


class LlamaCppConverter(KimiLinearConverter):
    """For llama.cpp, whose attention layers have as many heads as the mixers: the identity layer has smaller ones."""

    latent_sizes = dict.fromkeys(KimiLinearConverter.latent_sizes, 32)

    def config(
        self, common: dict[str, Any], spec: AttentionSpec, conv_width: int, attention_layers: list[int]
    ) -> dict[str, Any]:
        return {
            **super().config(common, spec, conv_width, attention_layers),
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_heads,
        }


def checkpoint_weights(model: PreTrainedModel) -> Weights:
    """The weights with the names of Moonshot's checkpoints, in which all hosts read them.

    `transformers` reads them too, but would write a dense MLP with the name of experts.
    """
    found: Weights = {}
    for name, weight in model.state_dict().items():
        weight = weight.detach().cpu()
        if name.endswith("conv1d.weight"):
            parts = zip("qkv", weight.chunk(3), strict=True)
            found |= {name.replace("conv1d", f"{part}_conv1d"): kernel.contiguous() for part, kernel in parts}
        else:
            found[name.replace("forget_gate.", "")] = weight
    return found
