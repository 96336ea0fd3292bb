"""Builds a student from a teacher: replaces the attention of each layer, copies weights, initializes the mixers."""

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from subquad import mixers
from subquad.mixers import Mixer
from subquad.modeling.attention.activations import AttentionStats, collect_attention_stats
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention, random_tokens
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.modeling.calibrate import calibrate
from subquad.modeling.export_target import restrict_to_target, set_norm_eps
from subquad.modeling.layer_types import LayerType, resolve_layer_type, resolve_layer_types
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM, make_config
from subquad.modeling.positions import check_positions_and_cache, find_max_learned_positions
from subquad.utils import UserError, eval_mode, is_out_of_memory

_global_generator = threading.RLock()
"""Held while `linearize` seeds and uses the global random generator, which all threads share."""


def linearize(
    teacher: PreTrainedModel,
    mixer: str = "gated_deltanet",
    copy_qkv: bool = True,
    layer_types: Mapping[str, LayerType] | None = None,
    scale_ids: Tensor | None = None,
    calibration_ids: Tensor | None = None,
    seed: int = 0,
    export_target: str | None = None,
    attention_layers: list[AttentionInfo] | None = None,
    **options: Any,
) -> SubquadForCausalLM:
    """Returns a student: a copy of `teacher` in which a mixer replaces the attention of each layer.

    The student has the teacher's dtype, device and training mode. The teacher and the global random state stay as they
    are.

    Args:
        teacher: a causal language model of `transformers` whose attention can be traced (see `discover_attention`).
        mixer: one of `subquad.mixers.names()`, for every layer; "softmax" is the control: the teacher's own attention.
        copy_qkv: copy the q, k, v and o projections. False: they are random, those of "softmax" too.
        layer_types: a mixer or attention per layer, in place of `mixer` (see `resolve_layer_types`).
        scale_ids: token ids `[B, T]` on which the scale of each head's attention output is measured, to which the
            student's output norms are set. None: 384 tokens sampled from the teacher.
        calibration_ids: token ids `[B, T]`, a few thousand, on which the mixers are fitted to the teacher's attention
            without gradients (see `subquad.modeling.calibrate`). None: no calibration.
        seed: seed of everything drawn at random.
        export_target: "qwen3_5" or "bamba": restrict the student to what can be exported there (docs/serving.md).
        attention_layers: what `discover_attention(teacher)` returned. None: it is called here.
        options: of the mixer (`subquad.mixers.get(mixer).Options`).

    Raises:
        UserError: an unknown mixer, layer or option; a teacher whose attention cannot be traced, with the reason; with
            `export_target`, a teacher or a layer that the target does not support.
        ValueError: `attention_layers` of another model.
    """
    if layer_types is None:
        resolve_layer_type({"mixer": mixer, **options}, "mixer")
    elif options:
        raise UserError(f"options: got {', '.join(options)} with layer_types; expected them in layer_types")
    with _global_generator, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if attention_layers is None:
            attention_layers = discover_attention(teacher)
        elif any(teacher.get_submodule(info.path) is not info.module for info in attention_layers):
            raise ValueError(
                "attention_layers: got layers of another model, expected those of discover_attention(teacher)"
            )
        check_teacher(teacher)
        specs = resolve_layer_types(layer_types or {"default": {"mixer": mixer, **options}}, len(attention_layers))
        student = build_student(teacher, specs, attention_layers, export_target)
        if calibration_ids is not None:
            scale_ids = calibration_ids[:1]  # calibration sets the scales again
        init_mixers(student, teacher, attention_layers, copy_qkv, scale_ids)
        if calibration_ids is not None:
            with eval_mode(teacher):
                calibrate(student, teacher, attention_layers, calibration_ids)
        check_student(student, type(teacher).__name__)
    return student.requires_grad_(True).train(teacher.training)


def check_teacher(teacher: PreTrainedModel) -> None:
    """Raises UserError if a student of `teacher` could not be loaded, padded or decoded with a cache."""
    known: Any = AutoModelForCausalLM._model_mapping.get(type(teacher.config), ())  # type: ignore[attr-defined]
    if not isinstance(teacher, known):
        raise UserError(
            f"{type(teacher).__name__} cannot be linearized: AutoModelForCausalLM does not build it from a "
            f"{type(teacher.config).__name__}, so that a saved student could not be loaded"
        )
    with eval_mode(teacher):
        check_positions_and_cache(teacher)


@torch.no_grad()
def check_student(student: SubquadForCausalLM, name: str) -> None:
    """Raises UserError if the base model cannot use a student's cache: it has no cache argument, or it caches more than
    attention, such as the states of cross-attention."""
    tokens = random_tokens(student)[:2, :4]
    try:
        with eval_mode(student):
            out = student(input_ids=tokens[:, :3], use_cache=True)
            student(input_ids=tokens[:, 3:], use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name} cannot be linearized: its student cannot decode with a cache: {reason[0]}") from error


def build_student(
    teacher: PreTrainedModel,
    layer_specs: list[dict[str, Any]],
    attention_layers: list[AttentionInfo],
    export_target: str | None,
) -> SubquadForCausalLM:
    """A copy of `teacher` with its attention replaced; the mixers are uninitialized."""
    base = copy.deepcopy(teacher)
    if export_target is not None:
        layer_specs, eps = restrict_to_target(layer_specs, attention_layers, teacher, export_target)
        set_norm_eps(base, eps)
    for attribute in ("hf_quantizer", "quantization_method"):  # of a model read from GGUF: they forbid save_pretrained
        if hasattr(base, attribute):
            delattr(base, attribute)
    base.is_quantized = False  # type: ignore[assignment]
    config = make_config(base.config, layer_specs, attention_layers, find_max_learned_positions(teacher))
    student = SubquadForCausalLM(config, base)
    if teacher.generation_config is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
        student.generation_config.cache_implementation = None  # a student makes its own cache
    return student


def init_mixers(
    student: SubquadForCausalLM,
    teacher: PreTrainedModel,
    attention_layers: list[AttentionInfo],
    copy_qkv: bool,
    scale_ids: Tensor | None,
) -> None:
    """Initializes all layers from the teacher's weights and from its attention on `scale_ids: [B, T]`, or on text that
    the teacher samples."""
    limit = student.config.max_learned_positions
    if scale_ids is not None and limit is not None and scale_ids.shape[1] > limit:
        raise UserError(
            f"scale_ids or calibration_ids: got {scale_ids.shape[1]} tokens per row, expected at most {limit}, the "
            "number of learned positions of the teacher"
        )
    with collect_attention_stats(teacher, attention_layers) as stats:
        if scale_ids is None:  # measured while it samples, so that it does not read the text again
            sample_tokens(teacher, length=min(24, limit or 24))
        else:
            teacher.base_model(input_ids=scale_ids.to(teacher.device), use_cache=False)
    for info, layer, layer_stats in zip(attention_layers, student.mixer_layers, stats, strict=True):
        init_mixer(info, layer, layer_stats, copy_qkv)
        if not copy_qkv and student.config.layer_specs[layer.index]["mixer"] == mixers.SOFTMAX:
            layer.attention.apply(student.base._init_weights)  # type: ignore[union-attr]


@torch.no_grad()
def init_mixer(info: AttentionInfo, layer: MixerLayer | AttentionLayer, stats: AttentionStats, copy_qkv: bool) -> None:
    """Initializes what replaces one attention: a mixer, or the norms added to an attention that is kept."""
    if isinstance(layer, MixerLayer):
        layer.mixer.reset_parameters()
        layer.mixer.init_from_teacher(stats.output_rms(), stats.input_tokens())
        if copy_qkv:
            copy_projections(info, layer.mixer)
        return
    for name, norm in layer.added_qk_norms().items():
        weight, _ = info.projection_weights(name)
        norm.fill_(F.linear(stats.input_tokens().float(), weight.float()).square().mean().sqrt().item())


@torch.no_grad()
def copy_projections(info: AttentionInfo, mixer: Mixer) -> None:
    """Copies the teacher's q, k, v and o projections into the mixer, key/value heads repeated for each query head, and
    its norms of q and k where the mixer has them. A mixer without a key projection gets no k."""
    for name, projection in mixer.projections().items():
        weight, bias = info.expanded_weights(name)
        projection.weight.copy_(weight)
        if bias is not None and mixer.has_biases:
            projection.bias.copy_(bias)
    norms = mixer.qk_norms()
    for name in {key[0] for key in norms}:
        for part, values in zip(("", "_bias"), info.norm_weights(name), strict=True):
            if values is not None:
                norms[f"{name}_norm{part}"].copy_(values)


@torch.no_grad()
def sample_tokens(teacher: PreTrainedModel, rows: int = 16, length: int = 24, seed: int = 0) -> Tensor:
    """Token ids `[rows, length]` sampled from the teacher at temperature 1, after a first token drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size: int = teacher.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    tokens = torch.randint(vocab_size, (rows, 1), generator=generator).to(teacher.device)
    cache, new = None, tokens
    with eval_mode(teacher):
        while tokens.shape[1] < length:
            out = teacher(input_ids=new, use_cache=True, **{CACHE_ARGUMENT: cache})
            cache = out[CACHE_ARGUMENT]
            cumulative = out.logits[:, -1].float().softmax(-1).cpu().double().cumsum(-1)
            drawn = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
            new = torch.searchsorted(cumulative, drawn, right=True).clamp_max(vocab_size - 1).to(teacher.device)
            tokens = torch.cat([tokens, new], dim=1)
    return tokens
