"""A `mamba2` student as a plain Bamba checkpoint (`BambaForCausalLM`), weight for weight.

Bamba is Mamba-2 inside Llama's layers, with Llama's attention wherever it is wanted. Its groups are our heads: each has
its own B and C (our k and q), and a norm of its own behind the gate. It does not scale what it reads by 1 / sqrt(K),
which the norm takes back: D grows by sqrt(K), and the norm's epsilon by K (`exportable.Target.norm_eps`). One layer
that adds nothing stands behind the others where none keeps attention. See docs/serving.md.
"""

from inspect import signature
from typing import Any

import torch
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
from subquad.mixers.mamba2 import Mamba2
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.attention.tracing import AttentionCall
from subquad.modeling.export_target import TARGETS
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError


def to_bamba(student: SubquadForCausalLM) -> PreTrainedModel:
    """The same model as `BambaForCausalLM`; see `host.convert`."""
    return convert(student, Bamba())


def has_group_norm() -> bool:
    """Whether this version of `transformers` norms each group of a Bamba by itself, as Mamba-2 and vLLM do."""
    from transformers.models.bamba.modeling_bamba import BambaRMSNormGated

    return "group_size" in signature(BambaRMSNormGated.__init__).parameters


class Bamba(Converter):
    target = TARGETS["bamba"]
    final_norm = "model.final_layernorm.weight"
    mlp = "feed_forward"
    mlp_norm = "pre_ff_layernorm"

    def classes(self) -> tuple[Any, Any]:
        config, model = classes_named("BambaConfig", "BambaForCausalLM")
        if not has_group_norm():
            raise UserError(
                "Bamba in this version of transformers has one norm for all heads, where a student has one for each; "
                "expected a later version (5.24 has it)"
            )
        return config, model

    def config(self, student: SubquadForCausalLM, sizes: Sizes, kept: AttentionTraces) -> Any:
        inner, hidden = sizes.mixer_spec.num_heads * sizes.mixer_spec.value_dim, sizes.common["hidden_size"]
        if inner % hidden:
            raise Unfit(f"its mixers have {inner} channels, which is no multiple of its {hidden} hidden ones")
        return self.classes()[0](
            **sizes.common,
            attn_layer_indices=sorted(kept) or [sizes.common["num_hidden_layers"] - 1],
            mamba_n_heads=sizes.mixer_spec.num_heads,
            mamba_n_groups=sizes.mixer_spec.num_heads,
            mamba_d_head=sizes.mixer_spec.value_dim,
            mamba_d_state=sizes.mixer_spec.head_dim,
            mamba_d_conv=sizes.conv_width,
            mamba_expand=inner // hidden,
            mamba_conv_bias=False,
            mamba_proj_bias=False,
            rope_parameters=rope_parameters(student, kept, sizes.attention_heads[2])[0],
        )

    def mixer(self, mixer: Mamba2, width: int, factor: float) -> Weights:
        W = {name: projection.weight.detach() for name, projection in mixer.projections().items()}
        own = {
            "in_proj.weight": torch.cat([mixer.g_proj.weight, W["v"], W["k"], W["q"], mixer.a_proj.weight]).detach(),
            "conv1d.weight": conv_weight(mixer, ("v", "k", "q"), width),
            "dt_bias": mixer.a_proj.bias.detach(),
            "A_log": mixer.A_log.detach(),
            "D": mixer.D.detach() * mixer.spec.head_dim**0.5,
            "norm.weight": mixer.o_norm.detach().flatten(),
            "out_proj.weight": W["o"] * factor,
        }
        return {f"mamba.{name}": weight for name, weight in own.items()}

    def attention(self, site: AttentionInfo, call: AttentionCall, factor: float) -> Weights:
        q, k, v, o = (site.projection_weights(name)[0] for name in "qkvo")
        K = site.spec.head_dim
        scale = float(call.attention_kwargs.get("scaling") or K**-0.5) * K**0.5
        return {
            "self_attn.q_proj.weight": q if abs(scale - 1) < 1e-6 else q * scale,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": o * factor,
        }

    def identity_attention(self, hidden: int, channels: int) -> dict[str, tuple[int, ...]]:
        return {
            "self_attn.q_proj.weight": (channels, hidden),
            "self_attn.k_proj.weight": (channels, hidden),
            "self_attn.v_proj.weight": (channels, hidden),
            "self_attn.o_proj.weight": (hidden, channels),
        }
