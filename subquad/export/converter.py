"""Converts a student to a model of `transformers` with Llama's layers: the part that all targets share.

`qwen3_5.py`, `granite_hybrid.py` and `kimi_linear.py` subclass `Converter` with the names and forms of their weights.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from subquad.mixers import AttentionSpec
from subquad.modeling.attention.discovery import AttentionInfo, read_attention
from subquad.modeling.attention.tracing import AttentionCall, random_tokens, trace_attention
from subquad.modeling.decoder_weights import DecoderLayerWeights, DecoderWeights, has_bias, read_decoder
from subquad.modeling.export_target import (
    BESIDE_ATTENTION,
    ExportError,
    ExportTarget,
    has_memory,
    unsupported_attention,
)
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import eval_mode

TOLERANCE = 1e-4
"""Relative error of the logits, in float32, up to which student and model count as equal; larger if the student's own
rounding error is (see `rounding_error`)."""
IDENTITY_HEAD_DIM = 64
"""Channels of the one head of the identity layer, which is appended to a student without attention because servers need
attention in some layer. A size that their kernels support."""
Weights = dict[str, Tensor]
AttentionTraces = dict[int, tuple[AttentionInfo, AttentionCall]]
"""The layers that keep attention, by index."""


class Converter:
    """Converts students to one target: names, shapes and values of its weights, and its configuration."""

    target: ClassVar[ExportTarget]
    class_names: ClassVar[tuple[str, str]]
    """The configuration and the model class of `transformers`."""
    norm_offset: ClassVar[float] = 0.0
    """What the target adds to the stored weights of its layer norms."""

    def classes(self) -> tuple[Any, Any]:
        """The classes of `class_names`."""
        config, model = self.class_names
        with without_fla():
            return getattr(transformers, config), getattr(transformers, model)

    def identity_heads(self, hidden: int) -> tuple[int, int, int]:
        """Heads, key/value heads and channels of a head of the identity layer's attention."""
        return 1, 1, IDENTITY_HEAD_DIM

    def check(self, student: SubquadForCausalLM) -> None:
        """Raises ExportError if the target does not have a layer of the student."""
        check_layers(student, self.target)

    def config(
        self, common: dict[str, Any], spec: AttentionSpec, conv_width: int, attention_layers: list[int]
    ) -> dict[str, Any]:
        """The arguments of the target's configuration.

        common: those with the same names in all targets. spec: of all mixers, if any. attention_layers: of the layers
        with attention, kept or in the identity layer.
        """
        raise NotImplementedError

    def mixer_weights(self, mixer: Any, conv_width: int, factor: float) -> Weights:
        """Weights of a layer's mixer, its output multiplied by `factor`."""
        raise NotImplementedError

    def mlp_weights(self, layer: DecoderLayerWeights) -> Weights:
        """Weights of a layer's MLP."""
        return {f"mlp.{name}_proj.weight": getattr(layer, name) for name in ("gate", "up", "down")}

    def attention_weights(self, info: AttentionInfo, query_scale: float, factor: float) -> Weights:
        """Weights of retained attention, its queries multiplied by `query_scale` and its output by `factor`."""
        q, k, v, o = (info.projection_weights(name)[0] for name in "qkvo")
        return {
            "self_attn.q_proj.weight": q * query_scale,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": o * factor,
        }

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """Writes the converted model and its configuration to the new `directory`."""
        model.save_pretrained(directory)

    @torch.no_grad()
    def convert(self, student: SubquadForCausalLM) -> PreTrainedModel:
        """The target's model with the student's weights, dtype and generation config, in evaluation mode. Its logits on
        random tokens at distant positions have been compared with the student's.

        Raises:
            ExportError: the student computes something that the target does not; with the first difference found.
        """
        try:
            with eval_mode(student):
                self.check(student)
                decoder = read_decoder(student, [f"base.{spec['path']}" for spec in student.config.attention_specs])
                kept = trace_kept_attention(student)
                check_epsilons(student, decoder.eps, kept, self.target)
                model = self.build_model(student, decoder, kept)
                check_logits(student, model)
                return model
        except ExportError as error:
            raise ExportError(error.reason, self.target, "this student") from None

    def build_model(
        self, student: SubquadForCausalLM, decoder: DecoderWeights, kept: AttentionTraces
    ) -> PreTrainedModel:
        mixers = [layer.mixer for layer in student.mixer_layers if isinstance(layer, MixerLayer)]
        if self.target.mixer is not None:
            require_one_size([(m.spec.num_heads, m.spec.head_dim, m.spec.value_dim) for m in mixers], "mixers")
        spec: Any = mixers[0].spec if mixers else None
        conv_width = max((mixer.options.short_conv for mixer in mixers), default=0) or 4
        attention_layers = sorted(kept) or [len(student.mixer_layers)]
        common = common_config(student, decoder, kept, self.identity_heads(decoder.embedding.shape[1]))
        config_class, model_class = self.classes()
        with torch.device(student.device):
            model = model_class(config_class(**self.config(common, spec, conv_width, attention_layers)))
        model.to(student.dtype)
        weights = {"model.embed_tokens.weight": decoder.embedding, "model.norm.weight": decoder.norm - self.norm_offset}
        weights["lm_head.weight"] = decoder.embedding if decoder.head is None else decoder.head
        for i, (layer, around) in enumerate(zip(student.mixer_layers, decoder.layers, strict=True)):
            if isinstance(layer, MixerLayer):
                own = self.mixer_weights(layer.mixer, conv_width, around.attention_factor)
            else:
                own = self.attention_weights(kept[i][0], query_scale(*kept[i]), around.attention_factor)
            own |= {
                "input_layernorm.weight": around.norm - self.norm_offset,
                "post_attention_layernorm.weight": around.mlp_norm - self.norm_offset,
                **self.mlp_weights(around),
            }
            weights |= {f"model.layers.{i}.{name}": weight for name, weight in own.items()}
        identity = f"model.layers.{len(student.mixer_layers)}."  # attention and MLP of zeros return their input
        weights |= {name: torch.zeros_like(t) for name, t in model.state_dict().items() if name.startswith(identity)}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ExportError(f"its weights do not have the names and shapes of the target's ({error})") from None
        model.generation_config = student.generation_config
        return model.eval()


# ---------------------------------------------------------------------- checks


def check_layers(student: SubquadForCausalLM, target: ExportTarget) -> None:
    """Raises ExportError if the target does not have a layer of the student, by its layer specs and weights."""
    for i, (layer, spec) in enumerate(zip(student.mixer_layers, student.config.layer_specs, strict=True)):
        problem: str | None
        if has_memory(spec):
            problem = BESIDE_ATTENTION
        elif isinstance(layer, AttentionLayer):
            problem = unsupported_attention(spec, layer.spec, target)
            normed = layer.spec.qk_norm is not None or layer.added_qk_norms()
            if problem is None and target.has_qk_norm and not normed:
                problem = "its attention has no norm of queries and keys"
        elif layer.mixer.name == target.mixer:
            problem = unsupported_mixer(layer.mixer, target)
        else:
            problem = f"its mixer is {spec['mixer']}"
        if problem is not None:
            raise ExportError(f"layer {i}: {problem}")


def unsupported_mixer(mixer: Any, target: ExportTarget) -> str | None:
    for name, required in target.mixer_options.items():
        value = getattr(mixer.options, name)
        if name != "biases" and value != required:
            return f"{name}: got {value!r}, expected {required!r}"
    biased = [n for n, part in mixer.named_children() if has_bias(part) and n not in target.biases]
    return f"biases in {', '.join(biased)}, expected none" if biased else None


def check_epsilons(student: SubquadForCausalLM, eps: float, kept: AttentionTraces, target: ExportTarget) -> None:
    """Raises ExportError if a norm of a mixer or of retained attention has another epsilon than the target."""
    for i, layer in enumerate(student.mixer_layers):
        value = required = eps
        if isinstance(layer, MixerLayer):
            value, required = layer.mixer.norm_eps, target.mixer_norm_eps(eps, layer.spec)
        elif target.has_qk_norm:
            value = kept[i][0].spec.qk_norm_eps
        if value != required:
            raise ExportError(f"layer {i}: norm_eps: got {value:g}, expected {required:g}, as in the layer norms")


def trace_kept_attention(student: SubquadForCausalLM) -> AttentionTraces:
    kept = [i for i, keep in enumerate(student.config.layers_with_attention) if keep]
    calls = trace_attention(student, random_tokens(student)) if kept else []
    paths, base = [spec["path"] for spec in student.config.attention_specs], student.config.base_config
    return {i: (read_attention(i, paths[i], call, base), call) for i, call in zip(kept, calls, strict=True)}


def check_logits(student: SubquadForCausalLM, model: PreTrainedModel) -> None:
    """Raises ExportError if the two do not give the same logits in float32, on random tokens at positions spread over
    the teacher's context length."""
    # With a GPU, transformers may have bound Triton kernels, which do not compute tensors of the CPU.
    device = torch.device("cuda", 0) if torch.cuda.is_available() else student.device
    same = [m.dtype == torch.float32 and m.device == device for m in (model, student)]
    pairs = zip((model, student), same, strict=True)
    float32 = [m if keep else copy.deepcopy(m).to(device, torch.float32) for m, keep in pairs]  # type: ignore[arg-type]
    tokens = random_tokens(student).to(device)
    context = getattr(student.config, "max_position_embeddings", 2048)
    last = min(context, student.config.max_learned_positions or 2**31) - 1
    positions = torch.linspace(0, last, tokens.shape[1], device=tokens.device).long().expand_as(tokens)
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": torch.ones_like(tokens)}
    error = relative_error(*(m(**inputs, use_cache=False).logits for m in float32))
    allowed = max(TOLERANCE, 3 * rounding_error(float32[1], tokens)) if student.dtype == torch.float32 else 3e-2
    if not error < allowed:
        raise ExportError(
            f"the relative error of the new model's logits is {error:.1e}, where rounding explains {allowed:.0e}; the "
            "student computes something that was not detected"
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def rounding_error(student: PreTrainedModel, tokens: Tensor) -> float:
    """The relative error between the student's logits of a whole text and of the same text token by token."""
    cache = student.new_cache()  # type: ignore[operator]
    steps = [student(input_ids=piece, past_key_values=cache).logits for piece in tokens.split(1, dim=1)]
    return relative_error(torch.cat(steps, dim=1), student(input_ids=tokens, use_cache=False).logits)


# ---------------------------------------------------------------------- configuration and weights


def common_config(
    student: SubquadForCausalLM, decoder: DecoderWeights, kept: AttentionTraces, identity_heads: tuple[int, int, int]
) -> dict[str, Any]:
    """The arguments that all targets' configurations have."""
    base: Any = student.config.base_config.get_text_config()  # type: ignore[union-attr]
    shapes = [(i.spec.num_heads, i.spec.num_kv_heads, i.spec.head_dim) for i, _ in kept.values()]
    heads = require_one_size(shapes or [identity_heads], "attention layers")
    return {
        "vocab_size": len(decoder.embedding),
        "hidden_size": decoder.embedding.shape[1],
        "intermediate_size": require_one_size([len(layer.gate) for layer in decoder.layers], "MLPs"),
        "num_hidden_layers": len(student.mixer_layers) + (not kept),
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "rms_norm_eps": decoder.eps,
        "rope_parameters": rope_parameters(base, kept, heads[2]),
        "max_position_embeddings": getattr(base, "max_position_embeddings", 32768),
        "tie_word_embeddings": decoder.head is None,
        "initializer_range": getattr(base, "initializer_range", 0.02),
        "dtype": student.dtype,
        **{name: getattr(base, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def require_one_size(sizes: list[Any], what: str) -> Any:
    if not sizes:
        raise ExportError(f"it has no {what}")
    if len(set(sizes)) != 1:
        raise ExportError(f"its {what} have different sizes ({', '.join(map(str, sorted(set(sizes))))})")
    return sizes[0]


def rope_parameters(base_config: Any, kept: AttentionTraces, head_dim: int) -> dict[str, Any]:
    """The teacher's `rope_parameters`, or default ones if no layer keeps attention, with `partial_rotary_factor`."""
    rope = getattr(base_config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10_000.0}
    rotated = {
        int(call.forward.position_embeddings[0].shape[-1])
        for _, call in kept.values()
        if call.forward.position_embeddings
    }
    rotated = rotated or {head_dim}
    if any(isinstance(value, dict) for value in rope.values()) or len(rotated) != 1:
        raise ExportError("its layers have different rotary embeddings")
    if not kept:
        rope = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)}
    return {**rope, "partial_rotary_factor": rotated.pop() / head_dim}


def query_scale(info: AttentionInfo, call: AttentionCall) -> float:
    """The scale of retained attention's scores, relative to 1 / sqrt(head_dim)."""
    head_dim = info.spec.head_dim
    scale = float(call.attention_kwargs.get("scaling") or head_dim**-0.5) * head_dim**0.5
    return 1.0 if abs(scale - 1) < 1e-6 else scale


def conv_weight(mixer: Any, names: tuple[str, ...], width: int) -> Tensor:
    """The short convolutions of the projections `names`, `[channels, 1, width]`; the identity where there is none."""
    projections, kernels, like = mixer.projections(), mixer.conv_weights(), mixer.o_proj.weight
    found = [kernels.get(name, like.new_ones(projections[name].out_features, 1)).detach() for name in names]
    return torch.cat([F.pad(kernel, (width - kernel.shape[1], 0)) for kernel in found]).unsqueeze(1).to(like)


@contextmanager
def without_fla() -> Iterator[None]:
    """Hides `fla` if there is no GPU: `transformers` binds its Triton kernels when a model class is imported, and they
    would fail when called."""
    before = {"fla": sys.modules["fla"]} if "fla" in sys.modules else {}
    if not torch.cuda.is_available():
        sys.modules["fla"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop("fla", None)
        sys.modules.update(before)
