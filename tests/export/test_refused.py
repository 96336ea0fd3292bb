"""Students, teachers, mixers and options that no export target has: an error and no files."""

import pytest
import torch

import subquad
from subquad.export import convert, export
from subquad.export.granite_hybrid import has_group_norm
from subquad.modeling.export_target import ExportError
from subquad.utils import UserError
from tests.helpers.exports import MAMBA2, REGULAR, student_of, teacher_of
from tests.helpers.students import SCALE_IDS, make_student

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


def kimi_hybrid():
    options = made_with("kda", export_target="kimi_linear").config.layer_specs[0]
    return subquad.linearize(
        teacher_of("llama"), layer_types={"default": options, "1": "attention"}, scale_ids=SCALE_IDS
    )


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
    ("kimi_linear", "another mixer"): (lambda: student_of(), "layer 0: .*gated_deltanet"),
    ("kimi_linear", "default options"): (lambda: made_with("kda"), "layer 0: v_activation"),
    ("kimi_linear", "a gate of full rank"): (
        lambda: made_with("kda", v_activation="silu", biases=False),
        "layer 0: low_rank_gate: got False, expected True",
    ),
    ("kimi_linear", "attention"): (kimi_hybrid, "layer 1: its attention is not multi-head latent attention"),
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
        "kimi_linear": ("Kimi Linear", "kda", ("kimi_linear",)),
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
        ({"export_target": "kimi_linear"}, "gated_deltanet cannot be exported to Kimi Linear; supported layers: kda"),
        ({"mixer": "kda", "output_gate": "none", "export_target": "kimi_linear"}, "layer 0: output_gate: got 'none'"),
        (
            {"export_target": "kimi_linear", "layer_types": {"default": "kda", "1": "attention"}},
            "attention cannot be exported to Kimi Linear: it is not multi-head latent attention",
        ),
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
