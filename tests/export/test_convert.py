"""Export of a student to Qwen3.5 and Granite 4: equal logits without Subquad, or an error and no files."""

import pytest
import torch

import subquad
from subquad.cli import main
from subquad.export import convert, export
from subquad.export.granite_hybrid import has_group_norm
from subquad.mixers import AttentionSpec, create
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.calibrate import LayerCalibrator
from subquad.modeling.export_target import ExportError
from subquad.utils import UserError
from tests.helpers.exports import (
    IRREGULAR,
    LLAMA3,
    PURE,
    REGULAR,
    check_served,
    needs_group_norm,
    saved_student,
    student_of,
    teacher_of,
)
from tests.helpers.ops import error
from tests.helpers.students import SCALE_IDS, logits, make_student

MAMBA2 = {"default": "mamba2"}
MAMBA2_HYBRID = {"default": "mamba2", "0,3": "attention"}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
FACTORS = {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.3, "head_dim": None}


def convolutions(mixer):
    """Layer types with short convolutions of two widths, and none."""
    return {"default": {"mixer": mixer, "short_conv": 0}, "1": {"mixer": mixer, "short_conv": 3}}


QWEN3_5_CASES = {
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
}
GRANITE_CASES = {
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
}
IDS = torch.randint(3, 61, (3, 70), generator=torch.Generator().manual_seed(1))


def logit_error(model, student, ids=IDS):
    return error(logits(model, ids), logits(student, ids))


@pytest.mark.parametrize("case", QWEN3_5_CASES)
def test_qwen3_5_has_the_students_logits(case):
    architecture, layers, changes = QWEN3_5_CASES[case]
    student = student_of(architecture, layers, **changes)
    model = convert(student, "qwen3_5")
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert logit_error(model, student) < 1e-5
    assert model.config.layer_types[:4] == [
        "full_attention" if keep else "linear_attention" for keep in student.config.layers_with_attention
    ]
    assert len(model.config.layer_types) == (4 if any(student.config.layers_with_attention) else 5)


@needs_group_norm
@pytest.mark.parametrize("case", GRANITE_CASES)
def test_granite_hybrid_has_the_students_logits(case):
    architecture, layers, changes = GRANITE_CASES[case]
    student = student_of(architecture, layers, "granite_hybrid", **changes)
    model = convert(student, "granite_hybrid")
    assert type(model).__name__ == "GraniteMoeHybridForCausalLM"
    assert logit_error(model, student) < 1e-5
    kept = student.config.layers_with_attention
    expected = ["full_attention" if keep else "linear_attention" for keep in kept]
    assert model.config.layer_types == expected + ([] if any(kept) else ["full_attention"])


@pytest.mark.parametrize(
    ("target", "layer_types"),
    [
        ("qwen3_5", (PURE, REGULAR)),
        pytest.param("granite_hybrid", (MAMBA2, MAMBA2_HYBRID), marks=needs_group_norm),
    ],
    ids=["qwen3_5", "granite_hybrid"],
)
def test_served_models_equal_the_students_without_subquad(target, layer_types, tmp_path):
    directories = [tmp_path / "pure", tmp_path / "hybrid"]
    for directory, layers in zip(directories, layer_types, strict=True):
        assert target in export(saved_student(directory, layers, target), directory / "served", target)
        assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    check_served(directories)


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


# ---------------------------------------------------------------------- refused students and teachers

OPTIONS = {"v_activation": "silu", "biases": False, "norm_eps": 1e-6, "qk_activation": "silu"}
GRANITE_OPTIONS = {"v_activation": "silu", "biases": False}


def made_with(mixer="gated_deltanet", **options):
    return make_student(teacher_of("llama"), mixer, **options)


def hybrid(layer_type, architecture="llama", **changes):
    layers = {"default": {"mixer": "gated_deltanet", **OPTIONS}, "1": layer_type}
    return subquad.linearize(teacher_of(architecture, **changes), layer_types=layers, scale_ids=SCALE_IDS)


def mamba2_hybrid(layer_type, architecture="llama"):
    options = made_with("mamba2", export_target="granite_hybrid").config.layer_specs[0]
    layers = {"default": options, "1": layer_type}
    return subquad.linearize(teacher_of(architecture), layer_types=layers, scale_ids=SCALE_IDS)


def biased():
    student = student_of()
    student.mixer_layers[2].mixer.b_proj.bias = torch.nn.Parameter(torch.ones(4))
    return student


def with_another_rope_theta():
    """Its configuration differs from what it computes, which neither a weight nor an option shows."""
    student = student_of("llama", REGULAR)
    student.config.base_config.rope_parameters["rope_theta"] = 3.0
    return student


REFUSED = {
    ("qwen3_5", "another mixer"): (lambda: made_with("gla"), "layer 0: .*gla"),
    ("qwen3_5", "default options"): (lambda: made_with(), "layer 0: v_activation"),
    ("qwen3_5", "an option"): (lambda: made_with(rotary=True, **OPTIONS), "layer 0: rotary: got True"),
    ("qwen3_5", "a learned feature map"): (
        lambda: made_with(**{**OPTIONS, "qk_activation": "hedgehog"}),
        "layer 0: qk_activation: got 'hedgehog', expected 'silu'",
    ),
    ("qwen3_5", "states of key/value heads"): (
        lambda: made_with(state_heads="key_value", **OPTIONS),
        "layer 0: state_heads: got 'key_value', expected 'query'",
    ),
    ("qwen3_5", "a memory beside a window"): (
        lambda: made_with(window=5),
        "layer 0: its mixer remembers what has left",
    ),
    ("qwen3_5", "gates with biases"): (lambda: made_with(**{**OPTIONS, "biases": True}), "layer 0: biases in .*g_proj"),
    ("qwen3_5", "one bias"): (biased, "layer 2: biases in b_proj"),
    ("qwen3_5", "an epsilon"): (
        lambda: made_with(**{**OPTIONS, "norm_eps": 1e-8}),
        "layer 0: norm_eps: got 1e-08.* 1e-06",
    ),
    ("qwen3_5", "attention without a norm"): (lambda: hybrid("attention"), "layer 1: .*no norm of queries and keys"),
    ("qwen3_5", "a norm of another epsilon"): (
        lambda: hybrid({"mixer": "attention", "qk_norm": 1e-3}),
        "layer 1: norm_eps: got 0.001",
    ),
    ("qwen3_5", "a window"): (lambda: hybrid({"mixer": "attention", "window": 5}), "layer 1: .* window"),
    ("qwen3_5", "a teacher's window"): (lambda: hybrid("attention", "mistral", sliding_window=5), "layer 1: .* window"),
    ("qwen3_5", "attention with biases"): (
        lambda: hybrid("attention", "qwen2", head_dim=None),
        "layer 1: .*projections with biases",
    ),
    ("qwen3_5", "undetected computation"): (with_another_rope_theta, "relative error of the new model's logits"),
    ("granite_hybrid", "another mixer"): (lambda: student_of(), "layer 0: .*gated_deltanet"),
    ("granite_hybrid", "default options"): (lambda: made_with("mamba2"), "layer 0: v_activation"),
    ("granite_hybrid", "another discretization"): (
        lambda: made_with("mamba2", **GRANITE_OPTIONS),
        "layer 0: discretization: got 'unit'",
    ),
    ("granite_hybrid", "an epsilon"): (
        lambda: made_with("mamba2", **GRANITE_OPTIONS, discretization="zoh", norm_eps=1e-4),
        "layer 0: norm_eps: got 0.0001",
    ),
    ("granite_hybrid", "a window"): (lambda: mamba2_hybrid({"mixer": "attention", "window": 5}), "layer 1: .* window"),
    ("granite_hybrid", "a memory beside a window"): (
        lambda: made_with("mamba2", window=5),
        "layer 0: its mixer remembers what has left",
    ),
    ("granite_hybrid", "attention with norms"): (
        lambda: mamba2_hybrid("attention", "qwen3"),
        "layer 1: .* norm of queries and keys",
    ),
    ("granite_hybrid", "channels not a multiple of the hidden size"): (
        lambda: student_of("llama", MAMBA2, "granite_hybrid", hidden_size=48),
        "its mixers have 64 channels .* 48",
    ),
}


@pytest.mark.parametrize(("target", "case"), REFUSED)
def test_unsupported_student_is_refused_and_nothing_is_written(target, case, tmp_path, monkeypatch):
    make, reason = REFUSED[target, case]
    student = make()
    monkeypatch.setattr("subquad.export.read_config", lambda directory: student.config)
    monkeypatch.setattr("subquad.export.load_teacher", lambda directory, dtype: (student, None))
    title, mixer, formats = {
        "qwen3_5": (r"Qwen3\.5", "gated_deltanet", ("qwen3_5", "gguf")),
        "granite_hybrid": ("Granite 4", "mamba2", ("granite_hybrid",)),
    }[target]
    for file_format in formats:
        with pytest.raises(ExportError, match=f"{title}: .*{reason}") as refused:
            export("student", tmp_path / "served", file_format)
        assert f"supported layers: {mixer}" in str(refused.value)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(has_group_norm(), reason="Granite 4 in this version of transformers has a norm for each head")
def test_older_transformers_without_group_norm_is_refused():
    with pytest.raises(UserError, match="one norm for all heads"):
        convert(student_of("llama", MAMBA2, "granite_hybrid"), "granite_hybrid")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export_target": "qwen35"}, "unknown export target 'qwen35'"),
        ({"mixer": "gla", "export_target": "qwen3_5"}, r"gla cannot be exported to Qwen3\.5"),
        ({"mixer": "softmax", "export_target": "qwen3_5"}, "softmax cannot be exported"),
        ({"rotary": True, "export_target": "qwen3_5"}, "layer 0: rotary: got True"),
        ({"state_dtype": "bfloat16", "export_target": "qwen3_5"}, "layer 0: state_dtype: got 'bfloat16'"),
        ({"expand_k": 2, "export_target": "qwen3_5"}, "layer 0: expand_k: got 2, expected 1.0"),
        ({"state_heads": "key_value", "export_target": "qwen3_5"}, "layer 0: state_heads: got 'key_value', .*'query'"),
        (
            {
                "export_target": "qwen3_5",
                "layer_types": {"default": "gated_deltanet", "1": {"mixer": "attention", "window": 4}},
            },
            "layer 1: .* window",
        ),
        ({"window": 4, "export_target": "qwen3_5"}, "layer 0: its mixer remembers what has left the window"),
        ({"mixer": "gla", "export_target": "granite_hybrid"}, "gla cannot be exported to Granite 4"),
        ({"mixer": "mamba2", "rotary": True, "export_target": "granite_hybrid"}, "layer 0: rotary: got True"),
    ],
    ids=lambda value: "",
)
def test_linearize_refuses_unsupported_mixers_and_options(options, message):
    with pytest.raises(UserError, match=message):
        subquad.linearize(teacher_of("llama"), scale_ids=SCALE_IDS, **options)


TEACHERS = {
    "gemma2": ({}, "between its attention and its MLP"),
    "gemma": ({}, "hidden_act is 'gelu"),
    "olmo2": ({"head_dim": None}, "RMS norm|does not take the norm"),
    "cohere": ({"head_dim": None}, "RMS norm"),
    "gpt_neox": ({"head_dim": None}, "RMS norm"),
    "nemotron": ({}, "RMS norm"),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "the MLP of layer 0"),
    "gpt2": ({"head_dim": None}, "RMS norm"),
}


@pytest.mark.parametrize("architecture", TEACHERS)
def test_linearize_refuses_unsupported_teacher(architecture):
    changes, reason = TEACHERS[architecture]
    with pytest.raises(ExportError, match=reason):
        subquad.linearize(teacher_of(architecture, **changes), scale_ids=SCALE_IDS, export_target="qwen3_5")


def test_wrong_arguments_are_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "served").mkdir()
    for format, kind in (("qwen3_5", "directory"), ("gguf", "file")):
        with pytest.raises(UserError, match=f"exists; .* {kind}"):
            export(tmp_path, tmp_path / "served", format)
    with pytest.raises(UserError, match="format: unknown 'qwen35'"):
        export(tmp_path, tmp_path / "new", "qwen35")
    with pytest.raises(UserError, match="type: unknown 'f8'"):
        export(tmp_path, tmp_path / "new", "gguf", "f8")
    with pytest.raises(UserError, match="type: got 'f32'"):
        export(tmp_path, tmp_path / "new", "qwen3_5", "f32")
    with pytest.raises(UserError, match=r"no config\.json"):
        export(tmp_path, tmp_path / "new", "qwen3_5")
    assert list(tmp_path.iterdir()) == [tmp_path / "served"]


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
