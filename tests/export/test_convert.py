"""Export of a student to Qwen3.5, Granite 4 and Kimi Linear: equal logits without Subquad, or an error and no files."""

import pytest
import torch
from safetensors.torch import load_file

from subquad.cli import main
from subquad.export import convert, export
from subquad.export.kimi_linear import KimiLinearConverter
from subquad.mixers import AttentionSpec, create
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.calibrate import LayerCalibrator
from subquad.modeling.export_target import ExportError
from tests.helpers.exports import (
    IRREGULAR,
    KDA,
    LLAMA3,
    MAMBA2,
    PURE,
    REGULAR,
    check_served,
    needs_group_norm,
    saved_student,
    student_of,
)
from tests.helpers.ops import error
from tests.helpers.students import logits

MAMBA2_HYBRID = {"default": "mamba2", "0,3": "attention"}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
FACTORS = {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.3, "head_dim": None}


def convolutions(mixer):
    """Layer types with short convolutions of two widths, and none."""
    return {"default": {"mixer": mixer, "short_conv": 0}, "1": {"mixer": mixer, "short_conv": 3}}


MARKS = {"qwen3_5": (), "granite_hybrid": needs_group_norm, "kimi_linear": ()}
"""By target."""
CASES = {
    "qwen3_5": {
        "llama": ("llama", PURE, {}),
        "llama-untied": ("llama", PURE, {"tie_word_embeddings": False}),
        "llama-tied": ("llama", REGULAR, {"tie_word_embeddings": True}),
        "llama-irregular": ("llama", IRREGULAR, {}),
        "llama-linear-rope": ("llama", REGULAR, {"rope_parameters": LINEAR}),
        "llama-llama3-rope": ("llama", REGULAR, {"rope_parameters": LLAMA3}),
        "qwen3": ("qwen3", REGULAR, {}),
        "qwen2-without-its-biases": ("qwen2", PURE, {"head_dim": None}),
        "mistral": ("mistral", PURE, {"sliding_window": 6}),
        "smollm3": ("smollm3", PURE, {"head_dim": None}),
        "phi3-fused": ("phi3", PURE, {"head_dim": None}),
        "granite-factors": ("granite", PURE, FACTORS),
        "granite-hybrid": ("granite", REGULAR, {**FACTORS, "attention_multiplier": 0.2}),
        "convolutions-of-two-widths": ("llama", convolutions("gated_deltanet"), {}),
    },
    "granite_hybrid": {
        "llama": ("llama", MAMBA2, {}),
        "llama-untied": ("llama", MAMBA2, {"tie_word_embeddings": False}),
        "llama-tied": ("llama", MAMBA2_HYBRID, {"tie_word_embeddings": True}),
        "llama-linear-rope": ("llama", MAMBA2_HYBRID, {"rope_parameters": LINEAR}),
        "qwen2-without-its-biases": ("qwen2", MAMBA2, {"head_dim": None}),
        "qwen3-without-its-norms": ("qwen3", MAMBA2, {}),
        "mistral": ("mistral", MAMBA2, {"sliding_window": 6}),
        "phi3-fused": ("phi3", MAMBA2, {"head_dim": None}),
        "granite-hybrid": ("granite", MAMBA2_HYBRID, {**FACTORS, "attention_multiplier": 0.2}),
        "convolutions-of-two-widths": ("llama", convolutions("mamba2"), {}),
    },
    "kimi_linear": {
        "llama": ("llama", KDA, {}),
        "llama-tied": ("llama", KDA, {"tie_word_embeddings": True}),
        "qwen2-without-its-biases": ("qwen2", KDA, {"head_dim": None}),
        "qwen3-without-its-norms": ("qwen3", KDA, {}),
        "phi3-fused": ("phi3", KDA, {"head_dim": None}),
        "granite-factors": ("granite", KDA, FACTORS),
        "convolutions-of-two-widths": ("llama", convolutions("kda"), {}),
    },
}
CLASSES = {
    "qwen3_5": "Qwen3_5ForCausalLM",
    "granite_hybrid": "GraniteMoeHybridForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
}
IDS = torch.randint(3, 61, (3, 70), generator=torch.Generator().manual_seed(1))


def logit_error(model, student, ids=IDS):
    return error(logits(model, ids), logits(student, ids))


def with_marks(cases):
    """`(target, ...)`, with the marks of its target."""
    return [pytest.param(*case, marks=MARKS[case[0]]) for case in cases]


@pytest.mark.parametrize(("target", "case"), with_marks((target, case) for target in CASES for case in CASES[target]))
def test_converted_model_has_the_students_logits(target, case):
    architecture, layers, changes = CASES[target][case]
    student = student_of(architecture, layers, target, **changes)
    model = convert(student, target)
    assert type(model).__name__ == CLASSES[target]
    assert logit_error(model, student) < 1e-5
    kept = student.config.layers_with_attention
    expected = ["full_attention" if keep else "linear_attention" for keep in kept]
    assert model.config.layer_types == expected + ([] if any(kept) else ["full_attention"])


@pytest.mark.parametrize(
    ("target", "layer_types"),
    with_marks(
        [
            ("qwen3_5", (PURE, REGULAR)),
            ("granite_hybrid", (MAMBA2, MAMBA2_HYBRID)),
            ("kimi_linear", (KDA,)),
        ]
    ),
    ids=list(CASES),
)
def test_served_models_equal_the_students_without_subquad(target, layer_types, tmp_path):
    directories = [tmp_path / str(i) for i in range(len(layer_types))]
    for directory, layers in zip(directories, layer_types, strict=True):
        assert target in export(saved_student(directory, layers, target), directory / "served", target)
        assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    check_served(directories)


def test_kimi_linear_is_saved_with_the_names_of_its_checkpoints(tmp_path):
    """`transformers` would name dense MLPs `block_sparse_moe`, which mlx-lm and vLLM cannot read."""
    export(saved_student(tmp_path, KDA, "kimi_linear"), tmp_path / "served", "kimi_linear")
    names = set(load_file(tmp_path / "served" / "model.safetensors"))
    layer = {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")}
    mixer = {
        f"self_attn.{name}" for name in ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight", "A_log", "dt_bias")
    }
    projections = (
        "q_proj",
        "k_proj",
        "v_proj",
        "f_a_proj",
        "f_b_proj",
        "b_proj",
        "g_a_proj",
        "g_b_proj",
        "o_norm",
        "o_proj",
    )
    mixer |= {f"self_attn.{name}.weight" for name in projections}
    mlp = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert layer == mixer | mlp | {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_values_of_another_size_than_keys_are_refused_by_kimi_linear():
    spec = AttentionSpec(24, 2, 2, head_dim=8, value_dim=6)
    with pytest.raises(ExportError, match="values of 6 channels per head and keys of 8, expected the same"):
        KimiLinearConverter().config({"num_hidden_layers": 2}, spec, 4, [])


def test_conversion_uses_the_current_weights_of_the_student():
    student = student_of("llama", REGULAR)
    before = convert(student, "qwen3_5")
    with torch.no_grad():
        student.mixer_layers[1].attention.q_proj.norm.weight.mul_(1.5)
    assert logit_error(before, student) > 1e-3
    assert logit_error(convert(student, "qwen3_5"), student) < 1e-5


@needs_group_norm
def test_norm_epsilon_is_converted_to_granite_hybrid():
    """Outputs as small as the square root of epsilon, on which it has an effect."""
    student = student_of("llama", MAMBA2, "granite_hybrid")
    with torch.no_grad():
        for layer in student.mixer_layers:
            layer.mixer.v_proj.weight.mul_(1e-3)
    expected = logits(student, IDS)
    assert logit_error(convert(student, "granite_hybrid"), student) < 1e-5
    for layer in student.mixer_layers:
        layer.mixer.norm_eps *= layer.spec.head_dim
    assert error(logits(student, IDS), expected) > 1e-3


def test_bfloat16_student_is_converted_to_bfloat16():
    student = student_of("llama", PURE).to(torch.bfloat16)
    model = convert(student, "qwen3_5")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logit_error(model.float(), student.float()) < 3e-2


def test_generation_config_is_converted():
    student = student_of()
    student.generation_config.temperature = 0.123
    assert convert(student, "qwen3_5").generation_config.temperature == 0.123


# ---------------------------------------------------------------------- Granite 4


@needs_group_norm
def test_command_line_exports_to_granite_hybrid(tmp_path, capsys):
    saved_student(tmp_path, MAMBA2, "granite_hybrid")
    made, served = tmp_path / "made", tmp_path / "served"
    argv = ["linearize", str(tmp_path / "teacher"), "--mixer", "mamba2", "--export", "granite_hybrid", "-o", str(made)]
    assert main(argv) == 0
    assert main(["export", str(made), "--format", "granite_hybrid", "-o", str(served)]) == 0
    assert "parameters as granite_hybrid in" in capsys.readouterr().out
    assert main(["export", str(made), "--format", "mlx", "-o", str(tmp_path / "mlx")]) == 2
    assert "mamba2; supported layers: gated_deltanet" in capsys.readouterr().err


@torch.no_grad()
def test_calibration_includes_the_gate():
    """Without a bias the initial gate is not 1: calibration compares the gated output, up to scale."""
    spec = AttentionSpec(24, 2, 2, head_dim=8, value_dim=6)
    generator = torch.Generator().manual_seed(0)
    mixer = create("mamba2", spec, v_activation="silu", biases=False, discretization="zoh", norm_eps=1e-12)
    x = torch.randn(1, 40, 24, generator=generator) + torch.randn(24, generator=generator)
    for projection in mixer.projections().values():
        projection.weight.mul_(20.0)
    mixer.init_from_teacher(torch.ones(2), x[0])
    inputs, _ = mixer.op_inputs(x, None, None, None)
    o = mixer.add_skip(mixer.run_op(inputs, None, None)[0], inputs) * mixer.output_gate(x)
    heads = 0.7 * o / o.square().mean(-1, keepdim=True).sqrt()
    attention = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(12, 24, bias=False)})
    torch.nn.init.eye_(attention["o_proj"].weight)
    info = AttentionInfo(0, "", attention, spec, {}, "o_proj")
    calibrator = LayerCalibrator(mixer, info, LayerActivations((x,), {}, x, heads.flatten(2)))
    errors, scale = calibrator.errors_and_scale()
    assert errors.max() < 1e-6
    torch.testing.assert_close(scale, torch.full_like(scale, 0.7))
