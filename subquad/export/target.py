"""From a student to a model that others run: what every target has in common. `qwen3_5.py` and `bamba.py` say what is
theirs.

A target is built of Llama's layers. Nothing leaves before the new model has given the student's logits.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from subquad.mixers import AttentionSpec
from subquad.modeling.attention.discovery import AttentionInfo, random_tokens, read_attention
from subquad.modeling.attention.tracing import AttentionCall, trace_attention
from subquad.modeling.decoder_weights import DecoderWeights, has_bias, read_decoder
from subquad.modeling.export_target import ExportTarget, unsupported_attention
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError, eval_mode

TOLERANCE = 1e-5
"""Difference of logits, over their size, that rounding in float32 leaves between two ways to compute the same, where a
student does not show that it makes more of it."""
IDENTITY_HEAD = 64
"""Channels of the one head of a layer that adds nothing: a size that every host has kernels for."""
Weights = dict[str, Tensor]
AttentionTraces = dict[int, tuple[AttentionInfo, AttentionCall]]
"""Attentions that are kept, by layer."""


class Unfit(Exception):
    """Why a student cannot go."""


@dataclass(frozen=True)
class Sizes:
    """What the configuration of every target says."""

    conv_width: int
    """Taps of the short convolutions."""
    mixer_spec: AttentionSpec
    """Of every mixer."""
    attention_heads: tuple[int, int, int]
    """Query heads, key heads and channels of the attentions that are kept, or of the layer that adds nothing."""
    common: dict[str, Any]
    """Names and values that they share."""


class Converter:
    """A target: its names of weights, and what stands there."""

    target: ClassVar[ExportTarget]
    final_norm: ClassVar[str]
    mlp: ClassVar[str]
    mlp_norm: ClassVar[str]
    norm_shift: ClassVar[float] = 0.0
    """What the norms of its layers store less."""

    def classes(self) -> tuple[Any, Any]:
        """Its configuration and its model; UserError where this `transformers` has none."""
        raise NotImplementedError

    def config(self, student: SubquadForCausalLM, sizes: Sizes, kept: AttentionTraces) -> Any:
        raise NotImplementedError

    def mixer(self, mixer: Any, width: int, factor: float) -> Weights:
        """Of a layer that mixes; its output times `factor`."""
        raise NotImplementedError

    def attention(self, site: AttentionInfo, call: AttentionCall, factor: float) -> Weights:
        raise NotImplementedError

    def identity_attention(self, hidden: int, channels: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an attention of one head, all of whose weights will be zero."""
        raise NotImplementedError


@torch.no_grad()
def convert(student: SubquadForCausalLM, host: Converter) -> PreTrainedModel:
    """The same model as the host's, in evaluation mode and the student's dtype, with its generation config; it has
    given the student's logits on random tokens far apart.

    Raises:
        UserError: a student that computes what the host does not, with the first reason.
    """
    target = host.target
    try:
        with eval_mode(student):
            return converted(student, host)
    except Unfit as reason:
        raise UserError(
            f"this student cannot be exported to {target.title}: {reason}; {target.supported_layers}"
        ) from None


def converted(student: SubquadForCausalLM, host: Converter) -> PreTrainedModel:
    check_layers(student, host.target)
    body = read_decoder(student, [f"base.{place['path']}" for place in student.config.attention_specs])
    kept = trace_kept_attention(student)
    check_epsilons(student, body.eps, kept, host.target)
    width = max([b.mixer.options.short_conv for b in student.mixer_layers if isinstance(b, MixerLayer)] or [4]) or 4
    weights: Weights = {"model.embed_tokens.weight": body.embedding, host.final_norm: body.norm - host.norm_shift}
    if body.head is not None:
        weights["lm_head.weight"] = body.head
    for i, (block, layer) in enumerate(zip(student.mixer_layers, body.layers, strict=True)):
        if isinstance(block, MixerLayer):
            own = host.mixer(block.mixer, width, layer.attention_factor)
        else:
            own = host.attention(*kept[i], layer.attention_factor)
        own |= {
            "input_layernorm.weight": layer.norm - host.norm_shift,
            f"{host.mlp_norm}.weight": layer.mlp_norm - host.norm_shift,
            f"{host.mlp}.gate_proj.weight": layer.gate,
            f"{host.mlp}.up_proj.weight": layer.up,
            f"{host.mlp}.down_proj.weight": layer.down,
        }
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in own.items()}
    if not kept:
        nothing = identity_layer(host, body)
        weights |= {f"model.layers.{len(body.layers)}.{name}": weight for name, weight in nothing.items()}
    model = build_model(host, host.config(student, read_sizes(student, body, kept, width), kept), weights, student)
    check_logits(student, model)
    return model


# ---------------------------------------------------------------------- what can go


def check_layers(student: SubquadForCausalLM, target: ExportTarget) -> None:
    """Unfit where a layer is nothing that the target has, as far as plan and weights tell."""
    for i, (block, entry) in enumerate(zip(student.mixer_layers, student.config.layer_specs, strict=True)):
        if isinstance(block, AttentionLayer):
            wrong = unsupported_attention(entry, block.spec, target)
            normed = block.spec.qk_norm is not None or block.added_qk_norms()
            if wrong is None and target.has_qk_norm and not normed:
                wrong = f"it has no norm of queries and keys, as {target.title} has"
        elif block.mixer.name == target.mixer:
            wrong = unsupported_mixer(block.mixer, target)
        else:
            wrong = f"it is {entry['mixer']}"
        if wrong is not None:
            raise Unfit(f"layer {i}: {wrong}")


def unsupported_mixer(mixer: Any, target: ExportTarget) -> str | None:
    for name, wanted in target.mixer_options.items():
        value = getattr(mixer.options, name)
        if name != "biases" and value != wanted:
            return f"its {name} is {value!r}, a layer of {target.title} has {wanted!r}"
    biased = [name for name, part in mixer.named_children() if has_bias(part) and name not in target.biased_projections]
    return f"its {', '.join(biased)} have biases" if biased else None


def check_epsilons(student: SubquadForCausalLM, eps: float, kept: AttentionTraces, target: ExportTarget) -> None:
    """Unfit where a norm has another epsilon than those of the layers: a target has one."""
    found = {i: (site.spec.qk_norm_eps, eps) for i, (site, _) in kept.items() if target.has_qk_norm}
    for i, block in enumerate(student.mixer_layers):
        if isinstance(block, MixerLayer):
            found[i] = block.mixer.norm_eps, target.norm_eps(eps, block.spec)
    for i, (own, wanted) in sorted(found.items()):
        if own != wanted:
            raise Unfit(f"layer {i}: a norm in it has the epsilon {own:g}, where the model's would be {wanted:g}")


def trace_kept_attention(student: SubquadForCausalLM) -> AttentionTraces:
    """The attentions that are kept, read at work, by layer."""
    if not any(student.config.keeps_attention):
        return {}
    numbers = {id(b.attention): i for i, b in enumerate(student.mixer_layers) if isinstance(b, AttentionLayer)}
    found = {}
    for call in trace_attention(student, random_tokens(student)):
        i = numbers[id(call.module)]
        found[i] = read_attention(i, student.config.attention_specs[i]["path"], call, student.config.base_config), call
    return found


# ---------------------------------------------------------------------- weights


def pad_kernel(channels: int, kernel: Tensor | None, width: int) -> Tensor:
    """`[channels, width]`: a kernel with zeros in front, or one that changes nothing."""
    taps = torch.zeros(channels, width)
    if kernel is None:
        taps[:, -1] = 1.0
    else:
        taps[:, width - kernel.shape[1] :] = kernel.detach()
    return taps


def conv_weight(mixer: Any, names: tuple[str, ...], width: int) -> Tensor:
    """The short convolutions of a mixer in this order, as one of `[channels, 1, width]`."""
    projections, kernels = mixer.projections(), mixer.conv_weights()
    taps = [pad_kernel(projections[n].out_features, kernels.get(n), width) for n in names]
    return torch.cat(taps).unsqueeze(1).to(mixer.o_proj.weight)


def identity_layer(host: Converter, body: DecoderWeights) -> Weights:
    """A layer that adds nothing: everything in it is zero."""
    hidden, inner = body.embedding.shape[1], len(body.layers[0].gate)
    shapes = {
        **host.identity_attention(hidden, IDENTITY_HEAD),
        "input_layernorm.weight": (hidden,),
        f"{host.mlp_norm}.weight": (hidden,),
        f"{host.mlp}.gate_proj.weight": (inner, hidden),
        f"{host.mlp}.up_proj.weight": (inner, hidden),
        f"{host.mlp}.down_proj.weight": (hidden, inner),
    }
    return {name: body.norm.new_zeros(shape) for name, shape in shapes.items()}


# ---------------------------------------------------------------------- the model


def read_sizes(student: SubquadForCausalLM, body: DecoderWeights, kept: AttentionTraces, width: int) -> Sizes:
    base: Any = student.config.base_config.get_text_config()  # type: ignore[union-attr]
    mixers = [block.spec for block in student.mixer_layers if isinstance(block, MixerLayer)]
    require_one_size([(m.num_heads, m.head_dim, m.value_dim) for m in mixers], "mixers")
    found = [(s.spec.num_heads, s.spec.num_kv_heads, s.spec.head_dim) for s, _ in kept.values()]
    heads = require_one_size(found or [(1, 1, IDENTITY_HEAD)], "attentions")
    common = {
        "vocab_size": len(body.embedding),
        "hidden_size": body.embedding.shape[1],
        "intermediate_size": require_one_size([len(layer.gate) for layer in body.layers], "MLPs"),
        "num_hidden_layers": len(student.mixer_layers) + (not kept),
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "rms_norm_eps": body.eps,
        "max_position_embeddings": getattr(base, "max_position_embeddings", 32768),
        "tie_word_embeddings": body.head is None,
        "initializer_range": getattr(base, "initializer_range", 0.02),
        "dtype": student.dtype,
        **{name: getattr(base, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    return Sizes(width, mixers[0], heads, common)


def require_one_size(found: list[Any], what: str) -> Any:
    if not found:
        raise Unfit(f"it has no {what}")
    if len(set(found)) != 1:
        raise Unfit(f"its {what} have different sizes ({', '.join(map(str, sorted(set(found))))})")
    return found[0]


def rope_parameters(student: SubquadForCausalLM, kept: AttentionTraces, head_dim: int) -> tuple[dict[str, Any], int]:
    """The teacher's rotary embedding where attention is kept, else one that does not matter; and the channels of a head
    that it turns."""
    base: Any = student.config.base_config.get_text_config()  # type: ignore[union-attr]
    own = getattr(base, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10_000.0}
    turned = {int(call.position_embeddings[0].shape[-1]) for _, call in kept.values() if call.position_embeddings}
    turned = turned or {head_dim}
    if any(isinstance(value, dict) for value in own.values()) or len(turned) != 1:
        raise Unfit("its layers turn queries and keys by position differently")
    if not kept:
        own = {"rope_type": "default", "rope_theta": own.get("rope_theta", 10_000.0)}
    return {**own, "partial_rotary_factor": (channels := turned.pop()) / head_dim}, channels


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


def classes_named(config: str, model: str) -> tuple[Any, Any]:
    """Two classes of `transformers`; UserError where it has none of that name."""
    with without_fla():
        found = [getattr(transformers, name, None) for name in (config, model)]
    if None in found:
        raise UserError(f"this version of transformers has no {model}; expected one that has")
    return found[0], found[1]


def build_model(host: Converter, config: Any, weights: Weights, student: SubquadForCausalLM) -> PreTrainedModel:
    """The model with these weights, each a copy of its own, and the student's generation config."""
    with torch.device(student.device):
        model = host.classes()[1](config).to(student.dtype)
    own = model.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in own.items() if name != "lm_head.weight" or name in weights}
    if shapes != {name: list(weight.shape) for name, weight in weights.items()}:
        wrong = sorted(set(shapes) ^ set(weights)) or [n for n, s in shapes.items() if list(weights[n].shape) != s]
        raise Unfit(f"its weights do not fit {host.target.title} ({', '.join(wrong[:3])})")
    for name, weight in weights.items():
        own[name].copy_(weight)
    model.generation_config = student.generation_config
    return model.eval()


def check_logits(student: SubquadForCausalLM, model: PreTrainedModel) -> None:
    """Unfit where the two do not give the same logits, on random tokens at places as far apart as the teacher knows,
    in float32."""
    wide, narrow = (m if m.dtype == torch.float32 else float32_copy(m) for m in (student, model))
    tokens = random_tokens(student)
    last = (
        min(getattr(student.config, "max_position_embeddings", 2048), student.config.max_learned_positions or 2**31) - 1
    )
    places = torch.linspace(0, last, tokens.shape[1], device=tokens.device).long().expand_as(tokens)
    given = {"input_ids": tokens, "position_ids": places, "attention_mask": torch.ones_like(tokens)}
    error = relative_error(*(m(**given, use_cache=False).logits for m in (narrow, wide)))
    allowed = max(TOLERANCE, 3 * rounding_error(wide, tokens)) if student.dtype == torch.float32 else 3e-2
    if not error < allowed:
        raise Unfit(
            f"its logits differ from those of the new model by {error:.1e} of their size, where rounding leaves "
            f"{allowed:.0e}; it computes something that was not seen"
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def rounding_error(student: PreTrainedModel, tokens: Tensor) -> float:
    """What rounding leaves between two ways of a student to compute the same: a text at once, and token by token."""
    cache = student.new_cache()  # type: ignore[operator]
    steps = [student(input_ids=piece, past_key_values=cache).logits for piece in tokens.split(1, dim=1)]
    return relative_error(torch.cat(steps, dim=1), student(input_ids=tokens, use_cache=False).logits)


def float32_copy(model: PreTrainedModel) -> PreTrainedModel:
    """In float32."""
    return copy.deepcopy(model).float()
