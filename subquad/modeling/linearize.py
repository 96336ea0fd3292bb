"""Builds a student from a teacher: replaces the attention of each layer, copies weights, initializes the mixers."""

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from subquad import mixers
from subquad.mixers import Mixer
from subquad.modeling.attention.activations import LayerActivations, capture_activations
from subquad.modeling.attention.discovery import AttentionInfo, attention_modules, discover_attention
from subquad.modeling.attention.tracing import cannot_linearize, find_max_learned_positions, random_tokens
from subquad.modeling.budget import allocate_budget, check_groups
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.modeling.calibrate import calibrate
from subquad.modeling.configuration_subquad import SubquadConfig
from subquad.modeling.export_target import restrict_to_target
from subquad.modeling.layer_types import FULL, LayerType, check_layer_type, resolve_layer_types
from subquad.modeling.layers import MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.near_far import NearFarLayer
from subquad.modeling.teachers import remove_quantizer, without_cache_name
from subquad.utils import UserError, as_user_error, eval_mode

MAX_INPUT_TOKENS = 1024
"""Tokens of each layer's input from which a mixer is initialized."""
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
    budget: str | int | None = None,
    budget_context: int | None = None,
    keep_groups: Sequence[tuple[int, int]] = (),
    budget_memory: str | None = None,
    **options: Any,
) -> SubquadForCausalLM:
    """Returns a student: a copy of `teacher` in which a mixer replaces the attention of each layer.

    With `budget`, the student keeps the teacher's attention, with a window for each key/value head:

        student = linearize(teacher, budget="96", calibration_ids=ids)

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
        export_target: "qwen3_5", "granite_hybrid" or "kimi_linear": restrict the student to what can be exported
            (docs/serving.md).
        attention_layers: what `discover_attention(teacher)` returned. None: it is called here.
        budget: bytes of the cache of one sequence, as a number of the teacher's tokens ("96", to which four sinks are
            added) or of bytes ("4MB"), in place of `mixer` and `layer_types`; needs `calibration_ids`, best in rows of
            2,048 (see `subquad.modeling.budget`).
        budget_context: with `budget`, heads may keep all tokens, at the price of as many tokens as given here.
        budget_memory: with `budget`, a mixer that may remember, for some heads, what has left their windows.
        keep_groups: layer and key/value head of heads that keep all tokens; with `layer_types`, in layers with
            attention.
        options: of the mixer (`subquad.mixers.get(mixer).Options`).

    Raises:
        UserError: an unknown mixer, layer or option; a teacher whose attention cannot be traced, with the reason; with
            `export_target`, a teacher or a layer that the target does not support.
        ValueError: `attention_layers` of another model.
    """
    if budget is not None:
        check_budget_arguments(layer_types, options, calibration_ids)
    elif budget_context is not None or budget_memory is not None:
        name, got = ("budget_context", budget_context) if budget_memory is None else ("budget_memory", budget_memory)
        raise UserError(f"{name}: got {got} without a budget, expected both")
    elif layer_types is None:
        check_layer_type({"mixer": mixer, **options}, "mixer")
        layer_types = {"default": {"mixer": mixer, **options}}
    elif options:
        raise UserError(f"options: got {', '.join(options)} with layer_types; expected them in layer_types")
    devices = range(torch.cuda.device_count())
    with _global_generator, torch.random.fork_rng(devices=devices), eval_mode(teacher):
        torch.manual_seed(seed)
        if attention_layers is None:
            attention_layers = discover_attention(teacher)
        elif any(teacher.get_submodule(info.path) is not info.module for info in attention_layers):
            message = "got layers of another model, expected those of discover_attention(teacher)"
            raise ValueError(f"attention_layers: {message}")
        check_teacher(teacher)
        allocation = None
        if budget is not None:
            assert calibration_ids is not None
            allocation = allocate_budget(
                teacher, budget, calibration_ids, attention_layers, budget_context, keep_groups, seed, budget_memory
            )
            layer_types, scale_ids, calibration_ids = allocation.layer_types, calibration_ids[:1, :384], None
        assert layer_types is not None
        specs = resolve_layer_types(layer_types, len(attention_layers))
        keep_whole(specs, keep_groups, attention_layers)
        student = build_student(teacher, specs, attention_layers, export_target)
        if calibration_ids is not None:
            scale_ids = calibration_ids[:1]  # calibration sets the scales again
        init_mixers(student, teacher, attention_layers, copy_qkv, scale_ids)
        if allocation is not None:
            allocation.set_memories(student)
        if calibration_ids is not None:
            calibrate(student, teacher, attention_layers, calibration_ids)
        check_student(student, type(teacher).__name__)
    return student.requires_grad_(True).train(teacher.training)


def check_budget_arguments(layer_types: Any, options: Mapping[str, Any], calibration_ids: Tensor | None) -> None:
    if layer_types is not None or options:
        given = "layer_types" if layer_types is not None else ", ".join(options)
        raise UserError(f"budget: got {given} too, expected a budget alone: it chooses the windows of all layers")
    if calibration_ids is None:
        raise UserError("budget: got no calibration_ids, expected token ids [B, T], best three rows of 2,048")


def keep_whole(
    specs: list[dict[str, Any]], groups: Sequence[tuple[int, int]], attention_layers: list[AttentionInfo]
) -> None:
    """Sets the windows of key/value heads, given with their layers, to all tokens, in place.

    Raises:
        UserError: there is no such head, or its layer has a mixer in the place of attention.
    """
    for layer, head in sorted(check_groups(groups, attention_layers)):
        spec, heads = specs[layer], attention_layers[layer].spec.num_kv_heads
        if spec["mixer"] != mixers.ATTENTION and "window" not in spec:
            raise UserError(f"keep_groups: layer {layer} is {spec['mixer']}, expected attention with a window")
        window = spec.get("window", FULL)
        windows = list(window) if isinstance(window, list | tuple) else [window] * heads
        windows[head] = FULL
        spec["window"] = windows


@torch.no_grad()
def check_teacher(model: PreTrainedModel) -> None:
    """Raises UserError if a student of `model` could not be loaded, padded or decoded with a cache.

    A model that counts positions itself (BART) would shift tokens after padding and in packed documents. In Gemma 3n,
    before transformers 5.5, layers find the keys of other layers only in a cache; attention is traced without one.

    The text is a row of one repeated token: attention gives the same at each position, so that any difference between
    positions comes from the position encoding.
    """
    name, config = type(model).__name__, type(model.config)
    if any(type(p.data) is not Tensor or not p.is_floating_point() for p in model.parameters()):
        raise cannot_linearize(name, "its weights are quantized; load_teacher and model.dequantize() make them plain")
    known: Any = AutoModelForCausalLM._model_mapping.get(config, ())  # type: ignore[attr-defined]
    if not isinstance(model, known):
        reason = f"does not build it from a {config.__name__}, so that a saved student could not be loaded"
        raise cannot_linearize(name, f"AutoModelForCausalLM {reason}")
    tokens = random_tokens(model)[:1, :1].expand(1, 4)
    zeros = {"position_ids": torch.zeros_like(tokens)}
    default, zero_positions, cached = (
        model.base_model(input_ids=tokens, use_cache=use_cache, **positions)[0].float()
        for use_cache, positions in ((False, {}), (False, zeros), (True, {}))
    )
    rms = float(default.square().mean().sqrt())
    if torch.equal(default, zero_positions) and float((default - default[:, :1]).abs().max()) > 1e-3 * rms:
        reason = "it ignores position_ids, so that padding and packed documents would shift the positions of its tokens"
        raise cannot_linearize(name, reason)
    if float((default - cached).square().mean().sqrt()) > 3e-2 * rms:
        reason = "its output with a cache differs from that without; layers may have no keys and values of their own"
        raise cannot_linearize(name, reason)


@torch.no_grad()
def check_student(student: SubquadForCausalLM, name: str) -> None:
    """Raises UserError if the base model cannot use a student's cache: it has no cache argument, or it caches more than
    attention, such as the states of cross-attention."""
    first, rest = random_tokens(student)[:2, :4].split(3, dim=1)
    failure = f"{name} cannot be linearized: its student cannot decode with a cache"
    with as_user_error(failure), eval_mode(student):
        cache = student(input_ids=first, use_cache=True)[CACHE_ARGUMENT]
        student(input_ids=rest, use_cache=True, **{CACHE_ARGUMENT: cache})


def build_student(
    teacher: PreTrainedModel,
    layer_specs: list[dict[str, Any]],
    attention_layers: list[AttentionInfo],
    export_target: str | None,
) -> SubquadForCausalLM:
    """A copy of `teacher` with its attention replaced; the mixers are uninitialized."""
    base = remove_quantizer(copy.deepcopy(teacher))
    if Path(base.config.name_or_path or "").exists():
        base.config.name_or_path = ""  # a path of this machine, which would be saved
    if export_target is not None:
        layer_specs = restrict_to_target(base, layer_specs, attention_layers, export_target)
    config = SubquadConfig(
        base_config=base.config,
        layer_specs=layer_specs,
        attention_specs=[{"path": info.path, **asdict(info.spec)} for info in attention_layers],
        max_learned_positions=find_max_learned_positions(teacher),
        architectures=["SubquadForCausalLM"],
        dtype=base.config.dtype,
    )
    student = SubquadForCausalLM(config, base)
    if teacher.generation_config is not None:
        student.generation_config = without_cache_name(teacher.generation_config)
    return student


@torch.no_grad()
def init_mixers(
    student: SubquadForCausalLM,
    teacher: PreTrainedModel,
    attention_layers: list[AttentionInfo],
    copy_qkv: bool,
    scale_ids: Tensor | None,
) -> None:
    """Initializes all mixers, and the norms added to an attention that is kept, from the teacher's weights and from its
    attention on `scale_ids: [B, T]`, or on text that the teacher samples."""
    limit = student.config.max_learned_positions
    if scale_ids is not None and limit is not None and scale_ids.shape[1] > limit:
        raise UserError(
            f"scale_ids or calibration_ids: got {scale_ids.shape[1]} tokens per row, expected at most {limit}, the "
            "number of learned positions of the teacher"
        )
    with_mixers = MixerLayer | NearFarLayer
    if not any(isinstance(layer, with_mixers) or layer.added_qk_norms() for layer in student.mixer_layers):
        measured = [(torch.empty(0), torch.empty(0))] * len(attention_layers)
    else:
        measured = measure_attention(teacher, attention_layers, scale_ids, length=min(24, limit or 24))
    for info, layer, (rms, inputs) in zip(attention_layers, student.mixer_layers, measured, strict=True):
        if isinstance(layer, with_mixers):
            layer.reset_parameters()
            layer.mixer.init_from_teacher(rms, inputs)
            if copy_qkv:  # a mixer beside attention has no projections
                copy_projections(info, layer.mixer)
            continue
        for name, norm in layer.added_qk_norms().items():
            weight, _ = info.projection_weights(name)
            norm.fill_(F.linear(inputs.float(), weight.float()).square().mean().sqrt().item())
        if not copy_qkv and student.config.layer_specs[layer.index]["mixer"] == mixers.SOFTMAX:
            layer.attention.apply(student.base._init_weights)


def measure_attention(
    teacher: PreTrainedModel, attention_layers: list[AttentionInfo], scale_ids: Tensor | None, length: int
) -> list[tuple[Tensor, Tensor]]:
    """For each layer, on `scale_ids: [B, T]` or on sampled rows of `length` tokens: the root mean square of each head's
    output, float32 `[H]`, and inputs of the attention, `[tokens, hidden]`, at most `MAX_INPUT_TOKENS`."""
    mean_squares: list[list[Tensor]] = [[] for _ in attention_layers]
    inputs: list[list[Tensor]] = [[] for _ in attention_layers]

    def add(index: int, activations: LayerActivations) -> None:
        spec = attention_layers[index].spec
        assert activations.head_outputs is not None
        heads = activations.head_outputs.float().reshape(-1, spec.num_heads, spec.value_dim)
        mean_squares[index].append(heads.square().mean(-1))
        if sum(map(len, inputs[index])) < MAX_INPUT_TOKENS:
            inputs[index].append(activations.hidden_states.reshape(-1, spec.hidden_size))

    with capture_activations(attention_modules(attention_layers), add):
        if scale_ids is None:  # measured while it samples, so that it does not read the text again
            sample_tokens(teacher, length=length)
        else:
            teacher.base_model(input_ids=scale_ids.to(teacher.device), use_cache=False)
    pairs = zip(mean_squares, inputs, strict=True)
    return [(torch.cat(squares).mean(0).sqrt(), torch.cat(x)[:MAX_INPUT_TOKENS]) for squares, x in pairs]


@torch.no_grad()
def copy_projections(info: AttentionInfo, mixer: Mixer) -> None:
    """Copies the teacher's q, k, v and o projections into the mixer, key/value heads repeated for each query head that
    has its own state, and its norms of q and k where the mixer has them. A mixer without a key projection gets no k."""
    shared = mixer.options.state_heads == "key_value"
    for name, projection in mixer.projections().items():
        weight, bias = info.projection_weights(name) if shared else info.expanded_weights(name)
        projection.weight.copy_(weight)
        if bias is not None and mixer.has_biases:
            projection.bias.copy_(bias)
    norms = mixer.qk_norms()
    for name in {key[0] for key in norms}:
        for part, values in zip(("", "_bias"), info.norms[name][2:], strict=True):
            if values is not None:
                own = norms[f"{name}_norm{part}"]
                own.copy_(values[:: len(values) // len(own)])


@torch.no_grad()
def sample_tokens(teacher: PreTrainedModel, rows: int = 16, length: int = 24, seed: int = 0) -> Tensor:
    """Token ids `[rows, length]` sampled from the teacher at temperature 1, after a first token drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size: int = teacher.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    tokens = torch.randint(vocab_size, (rows, 1), generator=generator).to(teacher.device)
    new, cache = tokens, None
    with eval_mode(teacher):
        while tokens.shape[1] < length:
            out = teacher(input_ids=new, use_cache=True, **{CACHE_ARGUMENT: cache})
            cache = out[CACHE_ARGUMENT]
            cumulative = out.logits[:, -1].float().softmax(-1).cpu().double().cumsum(-1)
            drawn = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
            new = torch.searchsorted(cumulative, drawn, right=True).clamp_max(vocab_size - 1).to(teacher.device)
            tokens = torch.cat([tokens, new], dim=1)
    return tokens
