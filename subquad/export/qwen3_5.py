"""A student as a plain Qwen3.5 checkpoint (`Qwen3_5ForCausalLM`, `qwen3_5_text`), weight for weight.

What Qwen3.5 has and a student has not stands where it does nothing: convolutions as the identity, the gate of its
attention at one half, which the output projection takes back, and one layer that adds nothing where no layer keeps
attention. What stands for one weight in a student and for another there is folded: scales of heads into the projection
behind them, norms less one. See docs/serving.md.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.errors import UserError
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.modeling.body import Body, has_bias, read_body
from subquad.modeling.exportable import QWEN3_5_MIXER, WHAT_CAN_GO, attention_misfit
from subquad.modeling.families import AttentionSite, random_tokens, read_site
from subquad.modeling.hub import SubquadForCausalLM
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.linearize import evaluating
from subquad.modeling.watch import Call, watch

TOLERANCE = 1e-5
"""Difference of logits, over their size, that rounding in float32 leaves between two ways to compute the same, where a
student does not show that it makes more of it."""
IDENTITY_HEAD = 64
"""Channels of the one head of a layer that adds nothing: a size that every host has kernels for."""
Weights = dict[str, Tensor]


class CannotGo(UserError):
    def __init__(self, reason: str):
        super().__init__(f"this student cannot be exported to Qwen3.5: {reason}; {WHAT_CAN_GO}")


@torch.no_grad()
def to_qwen3_5(student: SubquadForCausalLM) -> PreTrainedModel:
    """The same model as `Qwen3_5ForCausalLM`, in evaluation mode and the student's dtype, with its generation config;
    it has given the student's logits on random tokens far apart.

    Raises:
        UserError: a student that computes what Qwen3.5 does not, with the first reason.
    """
    with evaluating(student):
        check_layers(student)
        body = read_body(student, [f"base.{place['path']}" for place in student.config.attention])
        kept = read_kept(student)
        check_epsilons(student, body.eps, kept)
        weights: Weights = {"model.embed_tokens.weight": body.embedding, "model.norm.weight": body.norm - 1}
        if body.head is not None:
            weights["lm_head.weight"] = body.head
        width = max([b.mixer.options.short_conv for b in student.blocks if isinstance(b, MixerLayer)] or [4]) or 4
        for i, (block, layer) in enumerate(zip(student.blocks, body.layers, strict=True)):
            if isinstance(block, MixerLayer):
                own = mixer_weights(block.mixer, width, layer.attention_factor)  # type: ignore[arg-type]
            else:
                own = attention_weights(*kept[i], layer.attention_factor)
            own |= {
                "input_layernorm.weight": layer.norm - 1,
                "post_attention_layernorm.weight": layer.mlp_norm - 1,
                "mlp.gate_proj.weight": layer.gate,
                "mlp.up_proj.weight": layer.up,
                "mlp.down_proj.weight": layer.down,
            }
            weights |= {f"model.layers.{i}.{name}": weight for name, weight in own.items()}
        model = build(make_config(student, body, kept, width), weights, student)
        compare(student, model)
    return model


# ---------------------------------------------------------------------- what can go


def check_layers(student: SubquadForCausalLM) -> None:
    """CannotGo where a layer is nothing that Qwen3.5 has, as far as plan and weights tell."""
    for i, (block, entry) in enumerate(zip(student.blocks, student.config.layers, strict=True)):
        if isinstance(block, AttentionLayer):
            wrong = attention_misfit(entry, block.layout)
            if wrong is None and block.layout.qk_norm is None and not block.added_norms():
                wrong = "it has no norm of queries and keys, as Qwen3.5 has"
        elif isinstance(block.mixer, GatedDeltaNet):
            wrong = mixer_misfit(block.mixer)
        else:
            wrong = f"it is {entry['mixer']}"
        if wrong is not None:
            raise CannotGo(f"layer {i}: {wrong}")


def mixer_misfit(mixer: GatedDeltaNet) -> str | None:
    options = {name: getattr(mixer.options, name) for name in QWEN3_5_MIXER if name != "biases"}
    for name, value in options.items():
        if value != QWEN3_5_MIXER[name]:
            return f"its {name} is {value!r}, a layer of Qwen3.5 has {QWEN3_5_MIXER[name]!r}"
    biased = [name for name, part in mixer.named_children() if has_bias(part)]
    return f"its {', '.join(biased)} have biases" if biased else None


def check_epsilons(student: SubquadForCausalLM, eps: float, kept: dict[int, tuple[AttentionSite, Call]]) -> None:
    """CannotGo where a norm has another epsilon than those of the layers: Qwen3.5 has one."""
    found = {i: site.layout.qk_norm_eps for i, (site, _) in kept.items()}
    found |= {i: block.mixer.norm_eps for i, block in enumerate(student.blocks) if isinstance(block, MixerLayer)}
    for i, other in sorted(found.items()):
        if other != eps:
            raise CannotGo(f"layer {i}: a norm in it has the epsilon {other:g}, where the model's is {eps:g}")


def read_kept(student: SubquadForCausalLM) -> dict[int, tuple[AttentionSite, Call]]:
    """The attentions that are kept, read at work, by layer."""
    if not any(student.config.keeps_attention):
        return {}
    numbers = {id(b.attention): i for i, b in enumerate(student.blocks) if isinstance(b, AttentionLayer)}
    found = {}
    for call in watch(student, random_tokens(student)):
        i = numbers[id(call.module)]
        found[i] = read_site(i, student.config.attention[i]["path"], call, student.config.base_config), call
    return found


# ---------------------------------------------------------------------- weights


def mixer_weights(mixer: GatedDeltaNet, width: int, factor: float) -> Weights:
    """Of a linear layer. Qwen3.5 has one norm for all heads: ours goes into the output projection."""
    W = {name: projection.weight.detach() for name, projection in mixer.projections().items()}
    kernels = mixer.kernels()
    taps = [identity_taps(len(W[n]), kernels.get(n), width).to(W[n]) for n in ("q", "k", "v")]
    own = {
        "in_proj_qkv.weight": torch.cat([W["q"], W["k"], W["v"]]),
        "in_proj_z.weight": mixer.g_proj.weight.detach(),
        "in_proj_b.weight": mixer.b_proj.weight.detach(),
        "in_proj_a.weight": mixer.a_proj.weight.detach(),
        "conv1d.weight": torch.cat(taps).unsqueeze(1),
        "A_log": mixer.A_log.detach(),
        "dt_bias": mixer.dt_bias.detach(),
        "norm.weight": W["o"].new_ones(mixer.layout.value_dim),
        "out_proj.weight": W["o"] * mixer.o_norm.detach().flatten() * factor,
    }
    return {f"linear_attn.{name}": weight for name, weight in own.items()}


def identity_taps(channels: int, kernel: Tensor | None, width: int) -> Tensor:
    """`[channels, width]`: a kernel with zeros in front, or one that changes nothing."""
    taps = torch.zeros(channels, width)
    if kernel is None:
        taps[:, -1] = 1.0
    else:
        taps[:, width - kernel.shape[1] :] = kernel.detach()
    return taps


def attention_weights(site: AttentionSite, call: Call, factor: float) -> Weights:
    """Of an attention that is kept: the gate of each head, which stands behind its queries, is sigmoid(0)."""
    H, K = site.layout.num_heads, site.layout.head_dim
    q, k, v, o = (site.own_projection(name)[0] for name in "qkvo")
    by_head = q.unflatten(0, (H, K))
    scale = float(call.options.get("scaling") or K**-0.5) * K**0.5
    norms = {name: exact_norm(site, name) for name in "qk"}
    return {
        "self_attn.q_proj.weight": torch.cat([by_head, torch.zeros_like(by_head)], dim=1).flatten(0, 1),
        "self_attn.k_proj.weight": k,
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": o * (2 * factor),
        "self_attn.q_norm.weight": norms["q"] * (1.0 if abs(scale - 1) < 1e-6 else scale) - 1,
        "self_attn.k_norm.weight": norms["k"] - 1,
    }


def exact_norm(site: AttentionSite, name: str) -> Tensor:
    """Weight `[K]` of a norm that was read off what it does, to the last bit."""
    read = site.norms[name][2]
    if float((read - read[:1]).abs().max()) > 1e-3 * float(read.abs().max()):
        raise CannotGo(f"layer {site.index}: its norm of {name} is not the same for every head")
    module = site.module.get_submodule(site.sources[name].norm or "")
    own: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    return min((own, own + 1), key=lambda weight: float((weight - read[0]).abs().max()))


def identity_layer(config: Any, like: Tensor) -> Weights:
    """A layer that adds nothing: everything in it is zero."""
    D, inner, K = config.hidden_size, config.intermediate_size, config.head_dim
    shapes = {
        "self_attn.q_proj.weight": (2 * K, D),
        "self_attn.k_proj.weight": (K, D),
        "self_attn.v_proj.weight": (K, D),
        "self_attn.o_proj.weight": (D, K),
        "self_attn.q_norm.weight": (K,),
        "self_attn.k_norm.weight": (K,),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (inner, D),
        "mlp.up_proj.weight": (inner, D),
        "mlp.down_proj.weight": (D, inner),
    }
    return {name: like.new_zeros(shape) for name, shape in shapes.items()}


# ---------------------------------------------------------------------- the model


def make_config(
    student: SubquadForCausalLM, body: Body, kept: dict[int, tuple[AttentionSite, Call]], width: int
) -> Any:
    """`Qwen3_5TextConfig`, with an identity layer behind the others where none keeps attention."""
    base: Any = student.config.base_config.get_text_config()  # type: ignore[union-attr]
    keeps = student.config.keeps_attention
    mixers = [block.layout for block in student.blocks if isinstance(block, MixerLayer)]
    linear = only([(m.num_heads, m.head_dim, m.value_dim) for m in mixers], "mixers")
    heads = only(
        [(s.layout.num_heads, s.layout.num_kv_heads, s.layout.head_dim) for s, _ in kept.values()]
        or [(1, 1, IDENTITY_HEAD)],
        "attentions",
    )
    types = ["full_attention" if keep else "linear_attention" for keep in keeps]
    return qwen3_5_classes()[0](
        vocab_size=len(body.embedding),
        hidden_size=body.embedding.shape[1],
        intermediate_size=only([len(layer.gate) for layer in body.layers], "MLPs"),
        num_hidden_layers=len(types) + (not kept),
        layer_types=types if kept else [*types, "full_attention"],
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        attn_output_gate=True,
        linear_num_key_heads=linear[0],
        linear_num_value_heads=linear[0],
        linear_key_head_dim=linear[1],
        linear_value_head_dim=linear[2],
        linear_conv_kernel_dim=width,
        rms_norm_eps=body.eps,
        rope_parameters=rope_parameters(base, kept, heads[2]),
        max_position_embeddings=getattr(base, "max_position_embeddings", 32768),
        tie_word_embeddings=body.head is None,
        initializer_range=getattr(base, "initializer_range", 0.02),
        dtype=student.dtype,
        **{name: getattr(base, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def only(found: list[Any], what: str) -> Any:
    if not found:
        raise CannotGo(f"it has no {what}")
    if len(set(found)) != 1:
        raise CannotGo(f"its {what} have different sizes ({', '.join(map(str, sorted(set(found))))})")
    return found[0]


def rope_parameters(base: Any, kept: dict[int, tuple[AttentionSite, Call]], head_dim: int) -> dict[str, Any]:
    """The teacher's rotary embedding in Qwen3.5's words. Text has one position for its three sections, which must only
    cover all frequencies."""
    own = getattr(base, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10_000.0}
    turned = {int(call.position_embeddings[0].shape[-1]) for _, call in kept.values() if call.position_embeddings}
    turned = turned or {head_dim}
    if any(isinstance(value, dict) for value in own.values()) or len(turned) != 1:
        raise CannotGo("its layers turn queries and keys by position differently")
    pairs = turned.pop() // 2
    own = (
        {name: value for name, value in own.items() if name != "partial_rotary_factor"}
        if kept
        else {"rope_type": "default", "rope_theta": own.get("rope_theta", 10_000.0)}
    )
    return {
        **own,
        "partial_rotary_factor": 2 * pairs / head_dim,
        "mrope_section": [-(-pairs // 3), (pairs + 1) // 3, pairs // 3],
        "mrope_interleaved": True,
    }


@contextmanager
def without_fla() -> Iterator[None]:
    """Hides `fla` where there is no GPU: `transformers` binds its kernels when a model is imported, and they could not
    run."""
    before = {"fla": sys.modules["fla"]} if "fla" in sys.modules else {}
    if not torch.cuda.is_available():
        sys.modules["fla"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop("fla", None)
        sys.modules.update(before)


def qwen3_5_classes() -> tuple[Any, Any]:
    try:
        with without_fla():
            from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
    except ImportError:
        raise UserError("this version of transformers has no Qwen3.5; expected one that has") from None
    return Qwen3_5TextConfig, Qwen3_5ForCausalLM


def build(config: Any, weights: Weights, student: SubquadForCausalLM) -> PreTrainedModel:
    """The model with these weights, each a copy of its own, and the student's generation config."""
    if config.num_hidden_layers > len(student.blocks):
        layer = identity_layer(config, weights["model.norm.weight"])
        weights = weights | {f"model.layers.{len(student.blocks)}.{name}": weight for name, weight in layer.items()}
    with torch.device(student.device):
        model = qwen3_5_classes()[1](config).to(student.dtype)
    own = model.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in own.items() if name != "lm_head.weight" or name in weights}
    if shapes != {name: list(weight.shape) for name, weight in weights.items()}:
        wrong = sorted(set(shapes) ^ set(weights)) or [n for n, s in shapes.items() if list(weights[n].shape) != s]
        raise CannotGo(f"its weights do not fit Qwen3.5 ({', '.join(wrong[:3])})")
    for name, weight in weights.items():
        own[name].copy_(weight)
    model.generation_config = student.generation_config
    return model.eval()


def compare(student: SubquadForCausalLM, model: PreTrainedModel) -> None:
    """CannotGo where the two do not give the same logits, on random tokens at places as far apart as the teacher knows,
    in float32."""
    wide, narrow = (m if m.dtype == torch.float32 else copy_of(m) for m in (student, model))
    tokens = random_tokens(student)
    last = min(getattr(student.config, "max_position_embeddings", 2048), student.config.positions or 2**31) - 1
    places = torch.linspace(0, last, tokens.shape[1], device=tokens.device).long().expand_as(tokens)
    given = {"input_ids": tokens, "position_ids": places, "attention_mask": torch.ones_like(tokens)}
    error = distance(*(m(**given, use_cache=False).logits for m in (narrow, wide)))
    allowed = max(TOLERANCE, 3 * rounding(wide, tokens)) if student.dtype == torch.float32 else 3e-2
    if not error < allowed:
        raise CannotGo(
            f"its logits differ from those of the new model by {error:.1e} of their size, where rounding leaves "
            f"{allowed:.0e}; it computes something that was not seen"
        )


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def rounding(student: PreTrainedModel, tokens: Tensor) -> float:
    """What rounding leaves between two ways of a student to compute the same: a text at once, and token by token."""
    cache = student.new_cache()  # type: ignore[operator]
    steps = [student(input_ids=piece, past_key_values=cache).logits for piece in tokens.split(1, dim=1)]
    return distance(torch.cat(steps, dim=1), student(input_ids=tokens, use_cache=False).logits)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """In float32."""
    return copy.deepcopy(model).float()
