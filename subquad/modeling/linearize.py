"""From a teacher to a student: attention out, mixers in, what the teacher knows copied."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from subquad import mixers
from subquad.mixers import Mixer
from subquad.modeling import calibrate as calibrated
from subquad.modeling.attention.activations import AttentionStats, collect_attention_stats
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention, random_tokens
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.modeling.export_target import restrict_to_target, set_norm_eps
from subquad.modeling.layer_types import layer_spec, layer_specs
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM, make_config
from subquad.modeling.positions import check_positions_and_cache, find_position_table
from subquad.utils import UserError, eval_mode


def linearize(
    teacher: PreTrainedModel,
    mixer: str = "gated_deltanet",
    copy_qkv: bool = True,
    layer_types: Mapping[str, Any] | None = None,
    scale_ids: Tensor | None = None,
    calibration_ids: Tensor | None = None,
    seed: int = 0,
    export_target: str | None = None,
    **options: Any,
) -> SubquadForCausalLM:
    """A student of `teacher` in which every attention is replaced by `mixer`. The teacher is left untouched.

    Args:
        teacher: any loaded causal language model of `transformers` whose attention can be read (see `families.py`).
        mixer: one of `subquad.mixers.names()`, for every layer; "softmax" keeps the teacher's attention.
        layers: a plan in its place, such as `{"default": "gla", "0,8,16": "attention"}` (see `plan.py`).
        copy_qkv: copy the q, k, v and o projections; else they, and "softmax", start at random.
        calibration: token ids `[B, T]` on which the scale of the teacher's attention output is measured, so that the
            student's output norms start there; by default 384 tokens drawn from the teacher itself.
        calibrate: token ids `[B, T]`, a few thousand, by which half-lives, write strengths, activations and output
            scales are chosen, in closed form, to follow the teacher's attention (see `calibrate.py`); options that are
            given stay as they are.
        seed: of everything drawn at random.
        export: "qwen3_5" or "bamba" keeps the student within what that model computes, so that it can be exported
            (docs/serving.md).
        options: of the mixer (`subquad.mixers.get(name).Options`).

    Raises:
        UserError: unknown mixer or option; a teacher whose attention cannot be read (it says what was missing); with
            `export`, a teacher or a plan that cannot go there.
    """
    if layer_types is None:
        layer_spec({"mixer": mixer, **options}, "mixer")
    elif options:
        raise UserError(f"options belong into the entries of layers; got {', '.join(options)} beside it")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        sites = discover_attention(teacher)
        check_teacher(teacher)
        plan = layer_specs(layer_types or {"default": {"mixer": mixer, **options}}, len(sites))
        base = copy.deepcopy(teacher)
        if export_target is not None:
            plan, eps = restrict_to_target(plan, sites, teacher, export_target)
            set_norm_eps(base, eps)
        for attribute in ("hf_quantizer", "quantization_method"):
            if hasattr(base, attribute):
                delattr(base, attribute)
        base.is_quantized = False  # type: ignore[assignment]
        positions = find_position_table(teacher)
        student = SubquadForCausalLM(make_config(base.config, plan, sites, positions), base)
        if teacher.generation_config is not None:
            student.generation_config = copy.deepcopy(teacher.generation_config)
            student.generation_config.cache_implementation = None  # a student has a cache of its own
        if calibration_ids is not None:
            scale_ids = calibration_ids[:1]  # the scales are found anew
        if scale_ids is not None and positions is not None and scale_ids.shape[1] > positions:
            raise UserError(
                f"calibration: got {scale_ids.shape[1]} tokens a row; the teacher has {positions} learned positions"
            )
        with collect_attention_stats(teacher, sites) as heard:
            if scale_ids is None:  # while it writes, so that it need not read that again
                sample_tokens(teacher, length=min(24, positions or 24))
            else:
                teacher.base_model(input_ids=scale_ids.to(teacher.device), use_cache=False)
        for site, block, ear in zip(sites, student.mixer_layers, heard, strict=True):
            init_mixer(site, block, ear, copy_qkv)
            if not copy_qkv and plan[block.index]["mixer"] == mixers.SOFTMAX:
                block.attention.apply(student.base._init_weights)  # type: ignore[union-attr]
        if calibration_ids is not None:
            with eval_mode(teacher):
                calibrated.calibrate(student, teacher, sites, calibration_ids)
        check_student(student, type(teacher).__name__)
    return student.requires_grad_(True).train(teacher.training)


def check_teacher(teacher: PreTrainedModel) -> None:
    """UserError where its attention can be read, but a student of it would not load, or not pad."""
    known: Any = AutoModelForCausalLM._model_mapping.get(type(teacher.config), ())  # type: ignore[attr-defined]
    if not isinstance(teacher, known):
        raise UserError(
            f"{type(teacher).__name__} cannot be linearized: AutoModelForCausalLM makes none from its "
            f"{type(teacher.config).__name__}, so that a saved student could not be loaded"
        )
    with eval_mode(teacher):
        check_positions_and_cache(teacher)


@torch.no_grad()
def check_student(student: SubquadForCausalLM, name: str) -> None:
    """UserError where a base model cannot live with a student's cache (it keeps more than attention in it, such as the
    states of cross-attention, or takes none)."""
    tokens = random_tokens(student)[:2, :4]
    try:
        with eval_mode(student):
            out = student(input_ids=tokens[:, :3], use_cache=True)
            student(input_ids=tokens[:, 3:], use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name} cannot be linearized: its student cannot decode with a cache: {why[0]}") from error


@torch.no_grad()
def copy_projections(site: AttentionInfo, mixer: Mixer) -> None:
    """The teacher's q, k, v and o into the mixer's, grouped heads expanded, and its norms of q and k where they are
    kept. A mixer without a key takes none."""
    for name, projection in mixer.projections().items():
        weight, bias = site.expanded_weights(name)
        projection.weight.copy_(weight)
        if bias is not None and mixer.has_biases:
            projection.bias.copy_(bias)
    kept = mixer.qk_norms()
    for name in {key[0] for key in kept}:
        for part, values in zip(("", "_bias"), site.norm_weights(name), strict=True):
            if values is not None:
                kept[f"{name}_norm{part}"].copy_(values)


@torch.no_grad()
def init_mixer(site: AttentionInfo, block: MixerLayer | AttentionLayer, heard: AttentionStats, copy_qkv: bool) -> None:
    """Gives what stands in the place of one attention its start."""
    if isinstance(block, MixerLayer):
        block.mixer.reset_parameters()
        block.mixer.init_from_teacher(heard.output_rms(), heard.input_tokens())
        if copy_qkv:
            copy_projections(site, block.mixer)
        return
    for name, norm in block.added_norms().items():
        weight, _ = site.projection_weights(name)
        norm.fill_(F.linear(heard.input_tokens().float(), weight.float()).square().mean().sqrt().item())


@torch.no_grad()
def sample_tokens(teacher: PreTrainedModel, rows: int = 16, length: int = 24, seed: int = 0) -> Tensor:
    """`[rows, length]` tokens drawn from the teacher's own distribution: text that it knows, without a corpus."""
    generator = torch.Generator().manual_seed(seed)
    vocab: int = teacher.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    tokens = torch.randint(vocab, (rows, 1), generator=generator).to(teacher.device)
    cache, fed = None, tokens
    with eval_mode(teacher):
        while tokens.shape[1] < length:
            out = teacher(input_ids=fed, use_cache=True, **{CACHE_ARGUMENT: cache})
            cache = out[CACHE_ARGUMENT]
            below = out.logits[:, -1].float().softmax(-1).cpu().double().cumsum(-1)
            drawn = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * below[:, -1:]
            fed = torch.searchsorted(below, drawn, right=True).clamp_max(vocab - 1).to(teacher.device)
            tokens = torch.cat([tokens, fed], dim=1)
    return tokens
