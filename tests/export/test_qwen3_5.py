"""A student as a plain Qwen3.5 checkpoint: the same logits where subquad is not installed, or nothing written."""

import pytest
import torch
from export_cases import (
    IRREGULAR,
    PURE,
    REGULAR,
    check_elsewhere,
    relative,
    saved_student,
    student_of,
    teacher_of,
)

import subquad
from subquad.export import export, to_qwen3_5
from subquad.utils import UserError
from tests.modeling.modeling_cases import TEXT, logits, shaken

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
def test_the_new_model_gives_the_students_logits(case):
    family, layers, changes = CASES[case]
    student = student_of(family, layers, **changes)
    model = to_qwen3_5(student)
    ids = torch.randint(3, 61, (3, 70), generator=torch.Generator().manual_seed(1))
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert relative(logits(model, ids), logits(student, ids)) < 1e-5
    assert model.config.layer_types[:4] == [
        "full_attention" if keep else "linear_attention" for keep in student.config.keeps_attention
    ]
    assert len(model.config.layer_types) == (4 if any(student.config.keeps_attention) else 5)


def test_it_is_the_students_own_weights_that_count():
    student = student_of("llama", REGULAR)
    before = to_qwen3_5(student)
    with torch.no_grad():
        student.mixer_layers[1].attention.q_proj.norm.weight.mul_(1.5)
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    assert relative(logits(before, ids), logits(student, ids)) > 1e-3
    assert relative(logits(to_qwen3_5(student), ids), logits(student, ids)) < 1e-5


def test_a_process_without_subquad_gives_the_same(tmp_path):
    places = [tmp_path / "pure", tmp_path / "hybrid"]
    for place, layers in zip(places, (PURE, REGULAR), strict=True):
        student_dir = saved_student(place, layers)
        assert "qwen3_5" in export(student_dir, place / "served", "qwen3_5")
        assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []
    check_elsewhere(places)


def test_a_student_in_bfloat16_goes_in_bfloat16():
    student = student_of("llama", PURE).to(torch.bfloat16)
    model = to_qwen3_5(student)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    assert relative(logits(model.float(), ids), logits(student.float(), ids)) < 3e-2


def test_the_students_generation_config_goes_with_it():
    student = student_of()
    student.generation_config.temperature = 0.123
    assert to_qwen3_5(student).generation_config.temperature == 0.123


OPTIONS = {"v_activation": "silu", "biases": False, "norm_eps": 1e-6, "qk_activation": "silu"}


def free_form(mixer="gated_deltanet", **options):
    return shaken(subquad.linearize(teacher_of("llama"), mixer, scale_ids=TEXT, **options))


def hybrid(entry, family="llama", **changes):
    layers = {"default": {"mixer": "gated_deltanet", **OPTIONS}, "1": entry}
    return subquad.linearize(teacher_of(family, **changes), layer_types=layers, scale_ids=TEXT)


def biased():
    student = student_of()
    student.mixer_layers[2].mixer.b_proj.bias = torch.nn.Parameter(torch.ones(4))
    return student


def turned_otherwise():
    """Computes something that no weight and no option tells of."""
    student = student_of("llama", REGULAR)
    student.config.base_config.rope_parameters["rope_theta"] = 3.0
    return student


REFUSED = {
    "another mixer": (lambda: free_form("gla"), "layer 0: it is gla"),
    "the freest form": (lambda: free_form(), "layer 0: its v_activation is 'none'"),
    "an option": (lambda: free_form(rotary=True, **OPTIONS), "layer 0: its rotary is True"),
    "gates with biases": (lambda: free_form(**{**OPTIONS, "biases": True}), "layer 0: its .*g_proj.* have biases"),
    "one bias": (biased, "layer 2: its b_proj have biases"),
    "an epsilon": (lambda: free_form(**{**OPTIONS, "norm_eps": 1e-8}), "layer 0: .*epsilon 1e-08.* 1e-06"),
    "attention without a norm": (lambda: hybrid("attention"), "layer 1: it has no norm of queries and keys"),
    "a norm of another epsilon": (
        lambda: hybrid({"mixer": "attention", "qk_norm": 1e-3}),
        "layer 1: a norm in it has the epsilon 0.001",
    ),
    "a window": (lambda: hybrid({"mixer": "attention", "window": 5}), "layer 1: it sees a window"),
    "a teacher's window": (lambda: hybrid("attention", "mistral", sliding_window=5), "layer 1: it sees a window"),
    "attention with biases": (
        lambda: hybrid("attention", "qwen2", head_dim=None),
        "layer 1: its projections have biases",
    ),
    "what was not seen": (turned_otherwise, "its logits differ from those of the new model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_is_refused_with_the_reason_and_nothing_is_written(case, tmp_path, monkeypatch):
    make, reason = REFUSED[case]
    student = make()
    monkeypatch.setattr("subquad.export.read_config", lambda directory: student.config)
    monkeypatch.setattr("subquad.export.load_teacher", lambda directory, dtype: (student, None))
    for format in ("qwen3_5", "gguf"):
        with pytest.raises(UserError, match=reason) as refused:
            export("student", tmp_path / "served", format)
        assert "supported layers: " in str(refused.value)
        assert list(tmp_path.iterdir()) == []


TEACHERS = {
    "gemma2": ({}, "more between its attention and its MLP"),
    "gemma": ({}, "hidden_act is 'gelu"),
    "olmo2": ({"head_dim": None}, "RMS norm|is not given the norm"),
    "cohere": ({"head_dim": None}, "RMS norm"),
    "gpt_neox": ({"head_dim": None}, "RMS norm"),
    "nemotron": ({}, "RMS norm"),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "the MLP of layer 0"),
    "gpt2": ({"head_dim": None}, "RMS norm"),
}


@pytest.mark.parametrize("family", TEACHERS)
def test_a_teacher_that_is_no_qwen3_5_is_refused_before_it_is_taught(family):
    changes, reason = TEACHERS[family]
    with pytest.raises(UserError, match=f"cannot be exported: .*({reason})"):
        subquad.linearize(teacher_of(family, **changes), scale_ids=TEXT, export_target="qwen3_5")


def test_something_at_the_output_is_left_alone(tmp_path):
    (tmp_path / "served").mkdir()
    for format, kind in (("qwen3_5", "directory"), ("gguf", "file")):
        with pytest.raises(UserError, match=f"exists; expected a new {kind}"):
            export(tmp_path, tmp_path / "served", format)
    with pytest.raises(UserError, match="unknown 'qwen35'; did you mean 'qwen3_5'"):
        export(tmp_path, tmp_path / "new", "qwen35")
    with pytest.raises(UserError, match="unknown 'f8'"):
        export(tmp_path, tmp_path / "new", "gguf", "f8")
    with pytest.raises(UserError, match=r"type: got 'f32'.*with gguf only"):
        export(tmp_path, tmp_path / "new", "qwen3_5", "f32")
    with pytest.raises(UserError, match=r"no config\.json"):
        export(tmp_path, tmp_path / "new", "qwen3_5")
    assert list(tmp_path.iterdir()) == [tmp_path / "served"]
