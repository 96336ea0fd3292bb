"""A student as a plain Qwen3.5 checkpoint (`Qwen3_5ForCausalLM`, `qwen3_5_text`), weight for weight.

What Qwen3.5 has and a student has not stands where it does nothing: convolutions as the identity, the gate of its
attention at one half, which the output projection takes back, and one layer that adds nothing where no layer keeps
attention. What stands for one weight in a student and for another there is folded: scales of heads into the projection
behind them, norms less one. See docs/serving.md.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.export.target import (
    AttentionTraces,
    Converter,
    Sizes,
    Unfit,
    Weights,
    classes_named,
    conv_weight,
    convert,
    rope_parameters,
)
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.attention.tracing import AttentionCall
from subquad.modeling.export_target import TARGETS
from subquad.modeling.modeling_subquad import SubquadForCausalLM


def to_qwen3_5(student: SubquadForCausalLM) -> PreTrainedModel:
    """The same model as `Qwen3_5ForCausalLM`; see `host.convert`."""
    return convert(student, Qwen3_5())


class Qwen3_5(Converter):
    target = TARGETS["qwen3_5"]
    final_norm = "model.norm.weight"
    mlp = "mlp"
    mlp_norm = "post_attention_layernorm"
    norm_shift = 1.0

    def classes(self) -> tuple[Any, Any]:
        return classes_named("Qwen3_5TextConfig", "Qwen3_5ForCausalLM")

    def config(self, student: SubquadForCausalLM, sizes: Sizes, kept: AttentionTraces) -> Any:
        types = ["full_attention" if keep else "linear_attention" for keep in student.config.keeps_attention]
        rope, channels = rope_parameters(student, kept, sizes.attention_heads[2])
        pairs = channels // 2  # text has one position for three sections, which must only cover all frequencies
        return self.classes()[0](
            **sizes.common,
            layer_types=types if kept else [*types, "full_attention"],
            attn_output_gate=True,
            linear_num_key_heads=sizes.mixer_spec.num_heads,
            linear_num_value_heads=sizes.mixer_spec.num_heads,
            linear_key_head_dim=sizes.mixer_spec.head_dim,
            linear_value_head_dim=sizes.mixer_spec.value_dim,
            linear_conv_kernel_dim=sizes.conv_width,
            rope_parameters={
                **rope,
                "mrope_section": [-(-pairs // 3), (pairs + 1) // 3, pairs // 3],
                "mrope_interleaved": True,
            },
        )

    def mixer(self, mixer: GatedDeltaNet, width: int, factor: float) -> Weights:
        """One norm for all heads: ours goes into the output projection."""
        W = {name: projection.weight.detach() for name, projection in mixer.projections().items()}
        own = {
            "in_proj_qkv.weight": torch.cat([W["q"], W["k"], W["v"]]),
            "in_proj_z.weight": mixer.g_proj.weight.detach(),
            "in_proj_b.weight": mixer.b_proj.weight.detach(),
            "in_proj_a.weight": mixer.a_proj.weight.detach(),
            "conv1d.weight": conv_weight(mixer, ("q", "k", "v"), width),
            "A_log": mixer.A_log.detach(),
            "dt_bias": mixer.dt_bias.detach(),
            "norm.weight": W["o"].new_ones(mixer.spec.value_dim),
            "out_proj.weight": W["o"] * mixer.o_norm.detach().flatten() * factor,
        }
        return {f"linear_attn.{name}": weight for name, weight in own.items()}

    def attention(self, site: AttentionInfo, call: AttentionCall, factor: float) -> Weights:
        """The gate of each head, which stands behind its queries, is sigmoid(0)."""
        H, K = site.spec.num_heads, site.spec.head_dim
        q, k, v, o = (site.projection_weights(name)[0] for name in "qkvo")
        by_head = q.unflatten(0, (H, K))
        scale = float(call.attention_kwargs.get("scaling") or K**-0.5) * K**0.5
        norms = {name: exact_norm(site, name) for name in "qk"}
        return {
            "self_attn.q_proj.weight": torch.cat([by_head, torch.zeros_like(by_head)], dim=1).flatten(0, 1),
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": o * (2 * factor),
            "self_attn.q_norm.weight": norms["q"] * (1.0 if abs(scale - 1) < 1e-6 else scale) - 1,
            "self_attn.k_norm.weight": norms["k"] - 1,
        }

    def identity_attention(self, hidden: int, channels: int) -> dict[str, tuple[int, ...]]:
        return {
            "self_attn.q_proj.weight": (2 * channels, hidden),
            "self_attn.k_proj.weight": (channels, hidden),
            "self_attn.v_proj.weight": (channels, hidden),
            "self_attn.o_proj.weight": (hidden, channels),
            "self_attn.q_norm.weight": (channels,),
            "self_attn.k_norm.weight": (channels,),
        }


def exact_norm(site: AttentionInfo, name: str) -> Tensor:
    """Weight `[K]` of a norm that was read off what it does, to the last bit."""
    read = site.norms[name][2]
    if float((read - read[:1]).abs().max()) > 1e-3 * float(read.abs().max()):
        raise Unfit(f"layer {site.index}: its norm of {name} is not the same for every head")
    module = site.module.get_submodule(site.slices[name].norm or "")
    own: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    return min((own, own + 1), key=lambda weight: float((weight - read[0]).abs().max()))
