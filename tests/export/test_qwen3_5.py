"""Export of a student to Qwen3.5: equal logits without Subquad, or an error and no files."""

import pytest
import torch

import subquad
from subquad.export import convert, export
from subquad.modeling.export_target import ExportError
from subquad.utils import UserError
from tests.helpers.exports import (
    IRREGULAR,
    PURE,
    REGULAR,
    check_served,
    relative_error,
    saved_student,
    student_of,
    teacher_of,
)
from tests.helpers.students import SCALE_IDS, logits, make_student

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
FACTORS = {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.3, "head_dim": None}
CASES = {
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
    "short-convolutions-of-two-widths": (
        "llama",
        {"default": {"mixer": "gated_deltanet", "short_conv": 0}, "1": {"mixer": "gated_deltanet", "short_conv": 3}},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_converted_model_has_the_students_logits(case):
    architecture, layers, changes = CASES[case]
    student = student_of(architecture, layers, **changes)
    model = convert(student, "qwen3_5")
    ids = torch.randint(3, 61, (3, 70), generator=torch.Generator().manual_seed(1))
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert relative_error(logits(model, ids), logits(student, ids)) < 1e-5
    assert model.config.layer_types[:4] == [
        "full_attention" if keep else "linear_attention" for keep in student.config.layers_with_attention
    ]
    assert len(model.config.layer_types) == (4 if any(student.config.layers_with_attention) else 5)


def test_conversion_uses_the_current_weights_of_the_student():
    student = student_of("llama", REGULAR)
    before = convert(student, "qwen3_5")
    with torch.no_grad():
        student.mixer_layers[1].attention.q_proj.norm.weight.mul_(1.5)
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    assert relative_error(logits(before, ids), logits(student, ids)) > 1e-3
    assert relative_error(logits(convert(student, "qwen3_5"), ids), logits(student, ids)) < 1e-5


def test_served_models_equal_the_students_without_subquad(tmp_path):
    directories = [tmp_path / "pure", tmp_path / "hybrid"]
    for directory, layers in zip(directories, (PURE, REGULAR), strict=True):
        assert "qwen3_5" in export(saved_student(directory, layers), directory / "served", "qwen3_5")
        assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    check_served(directories)


def test_bfloat16_student_is_converted_to_bfloat16():
    student = student_of("llama", PURE).to(torch.bfloat16)
    model = convert(student, "qwen3_5")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    assert relative_error(logits(model.float(), ids), logits(student.float(), ids)) < 3e-2


def test_generation_config_is_converted():
    student = student_of()
    student.generation_config.temperature = 0.123
    assert convert(student, "qwen3_5").generation_config.temperature == 0.123


OPTIONS = {"v_activation": "silu", "biases": False, "norm_eps": 1e-6, "qk_activation": "silu"}


def made_with(mixer="gated_deltanet", **options):
    return make_student(teacher_of("llama"), mixer, **options)


def hybrid(layer_type, architecture="llama", **changes):
    layers = {"default": {"mixer": "gated_deltanet", **OPTIONS}, "1": layer_type}
    return subquad.linearize(teacher_of(architecture, **changes), layer_types=layers, scale_ids=SCALE_IDS)


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
    "another mixer": (lambda: made_with("gla"), "layer 0: .*gla"),
    "default options": (lambda: made_with(), "layer 0: v_activation"),
    "an option": (lambda: made_with(rotary=True, **OPTIONS), "layer 0: rotary: got True"),
    "gates with biases": (lambda: made_with(**{**OPTIONS, "biases": True}), "layer 0: biases in .*g_proj"),
    "one bias": (biased, "layer 2: biases in b_proj"),
    "an epsilon": (lambda: made_with(**{**OPTIONS, "norm_eps": 1e-8}), "layer 0: norm_eps: got 1e-08.* 1e-06"),
    "attention without a norm": (lambda: hybrid("attention"), "layer 1: .*no norm of queries and keys"),
    "a norm of another epsilon": (
        lambda: hybrid({"mixer": "attention", "qk_norm": 1e-3}),
        "layer 1: norm_eps: got 0.001",
    ),
    "a window": (lambda: hybrid({"mixer": "attention", "window": 5}), "layer 1: .* window"),
    "a teacher's window": (lambda: hybrid("attention", "mistral", sliding_window=5), "layer 1: .* window"),
    "attention with biases": (
        lambda: hybrid("attention", "qwen2", head_dim=None),
        "layer 1: .*projections with biases",
    ),
    "undetected computation": (with_another_rope_theta, "relative error of the new model's logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_student_is_refused_and_nothing_is_written(case, tmp_path, monkeypatch):
    make, reason = REFUSED[case]
    student = make()
    monkeypatch.setattr("subquad.export.read_config", lambda directory: student.config)
    monkeypatch.setattr("subquad.export.load_teacher", lambda directory, dtype: (student, None))
    for format in ("qwen3_5", "gguf"):
        with pytest.raises(ExportError, match=reason) as refused:
            export("student", tmp_path / "served", format)
        assert "supported layers: " in str(refused.value)
        assert list(tmp_path.iterdir()) == []


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
