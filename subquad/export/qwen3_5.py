"""Converts a `gated_deltanet` student to a Qwen3.5 model (`Qwen3_5ForCausalLM`, `qwen3_5_text`).

Parts of Qwen3.5 that a student does not have are set so that they do nothing: missing convolutions to the identity, the
gate of attention to 1/2, which the output projection compensates. The student's norm weights, one per head and channel,
are folded into the output projection. See docs/serving.md.
"""

from typing import Any

import torch
from torch import Tensor

from subquad.export.converter import Converter, Weights, conv_weight
from subquad.mixers import AttentionSpec
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.export_target import QWEN3_5, ExportError


class Qwen3_5Converter(Converter):
    target = QWEN3_5
    class_names = ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM")
    norm_offset = 1.0

    def config(
        self, common: dict[str, Any], spec: AttentionSpec, conv_width: int, attention_layers: list[int]
    ) -> dict[str, Any]:
        rope, layers = common["rope_parameters"], range(common["num_hidden_layers"])
        # text has one position in all three sections, which together must cover all rotated pairs of channels
        pairs = round(rope["partial_rotary_factor"] * common["head_dim"]) // 2
        sections = [-(-pairs // 3), (pairs + 1) // 3, pairs // 3]
        return {
            **common,
            "layer_types": ["full_attention" if i in attention_layers else "linear_attention" for i in layers],
            "attn_output_gate": True,
            "linear_num_key_heads": spec.num_heads,
            "linear_num_value_heads": spec.num_heads,
            "linear_key_head_dim": spec.head_dim,
            "linear_value_head_dim": spec.value_dim,
            "linear_conv_kernel_dim": conv_width,
            "rope_parameters": {**rope, "mrope_section": sections, "mrope_interleaved": True},
        }

    def mixer_weights(self, mixer: GatedDeltaNet, conv_width: int, factor: float) -> Weights:
        """Qwen3.5 has one norm weight for all heads; the student's are folded into the output projection."""
        W = {name: projection.weight.detach() for name, projection in mixer.projections().items()}
        weights = {
            "in_proj_qkv.weight": torch.cat([W["q"], W["k"], W["v"]]),
            "in_proj_z.weight": mixer.g_proj.weight.detach(),
            "in_proj_b.weight": mixer.b_proj.weight.detach(),
            "in_proj_a.weight": mixer.a_proj.weight.detach(),
            "conv1d.weight": conv_weight(mixer, ("q", "k", "v"), conv_width),
            "A_log": mixer.A_log.detach(),
            "dt_bias": mixer.dt_bias.detach(),
            "norm.weight": W["o"].new_ones(mixer.spec.value_dim),
            "out_proj.weight": W["o"] * mixer.o_norm.detach().flatten() * factor,
        }
        return {f"linear_attn.{name}": weight for name, weight in weights.items()}

    def attention_weights(self, info: AttentionInfo, query_scale: float, factor: float) -> Weights:
        """`q_proj` has rows of queries and of the gate for each head; zero gate weights give sigmoid(0) = 1/2."""
        q = info.projection_weights("q")[0].unflatten(0, (info.spec.num_heads, info.spec.head_dim))
        return super().attention_weights(info, query_scale, 2 * factor) | {
            "self_attn.q_proj.weight": torch.cat([q, torch.zeros_like(q)], dim=1).flatten(0, 1),
            "self_attn.q_norm.weight": exact_norm_weight(info, "q") * query_scale - 1,
            "self_attn.k_norm.weight": exact_norm_weight(info, "k") - 1,
        }


def attention_interval(config: Any) -> int | None:
    """n if layers n - 1, 2n - 1, ... have attention and no others, in a configuration of Qwen3.5; None otherwise."""
    full = [layer_type == "full_attention" for layer_type in config.layer_types]
    interval = full.index(True) + 1
    return interval if full == [(i + 1) % interval == 0 for i in range(len(full))] else None


def exact_norm_weight(info: AttentionInfo, name: str) -> Tensor:
    """Weight `[head_dim]` of the norm of "q" or "k": the parameter itself, or plus one, whichever the fitted weight is
    near to."""
    fitted = info.norms[name].weight
    if float((fitted - fitted[:1]).abs().max()) > 1e-3 * float(fitted.abs().max()):
        raise ExportError(f"layer {info.index}: its norm of {name} differs between heads")
    module = info.module.get_submodule(info.slices[name].norm or "")
    own: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    return min((own, own + 1), key=lambda weight: float((weight - fitted[0]).abs().max()))
