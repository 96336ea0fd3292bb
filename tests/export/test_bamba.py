"""Export of a `mamba2` student to Bamba: equal logits without Subquad, or an error and no files."""

import pytest
import torch

import subquad
from subquad.cli import main
from subquad.export import convert, export
from subquad.export.bamba import has_group_norm
from subquad.mixers import AttentionSpec, create
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.calibrate import LayerCalibrator
from subquad.modeling.export_target import ExportError
from subquad.utils import UserError
from tests.helpers.exports import check_served, relative_error, saved_student, student_of, teacher_of
from tests.helpers.students import SCALE_IDS, logits, make_student

PURE = {"default": "mamba2"}
HYBRID = {"default": "mamba2", "0,3": "attention"}
FACTORS = {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.3, "head_dim": None}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
CASES = {
    "llama": ("llama", PURE, {}),
    "llama-untied": ("llama", PURE, {"tie_word_embeddings": False}),
    "llama-tied": ("llama", HYBRID, {"tie_word_embeddings": True}),
    "llama-linear-rope": ("llama", HYBRID, {"rope_parameters": LINEAR}),
    "qwen2-without-its-biases": ("qwen2", PURE, {"head_dim": None}),
    "qwen3-without-its-norms": ("qwen3", PURE, {}),
    "mistral": ("mistral", PURE, {"sliding_window": 6}),
    "phi3-fused": ("phi3", PURE, {"head_dim": None}),
    "granite-hybrid": ("granite", HYBRID, {**FACTORS, "attention_multiplier": 0.2}),
    "no-and-a-narrow-convolution": (
        "llama",
        {"default": {"mixer": "mamba2", "short_conv": 0}, "1": {"mixer": "mamba2", "short_conv": 3}},
        {},
    ),
}


needs_group_norm = pytest.mark.skipif(
    not has_group_norm(), reason="Bamba in this version of transformers has one norm for all heads"
)


@needs_group_norm
@pytest.mark.parametrize("case", CASES)
def test_converted_model_has_the_students_logits(case):
    architecture, layers, changes = CASES[case]
    student = student_of(architecture, layers, "bamba", **changes)
    model = convert(student, "bamba")
    ids = torch.randint(3, 61, (3, 70), generator=torch.Generator().manual_seed(1))
    assert type(model).__name__ == "BambaForCausalLM"
    assert relative_error(logits(model, ids), logits(student, ids)) < 1e-5
    kept = [i for i, keep in enumerate(student.config.layers_with_attention) if keep]
    assert model.config.attn_layer_indices == (kept or [4])


@needs_group_norm
def test_norm_epsilon_is_converted():
    """Outputs as small as the square root of epsilon, on which it has an effect."""
    student = student_of("llama", PURE, "bamba")
    with torch.no_grad():
        for block in student.mixer_layers:
            block.mixer.v_proj.weight.mul_(1e-3)
    ids = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = logits(student, ids)
    assert relative_error(logits(convert(student, "bamba"), ids), expected) < 1e-5
    for block in student.mixer_layers:
        block.mixer.norm_eps *= block.spec.head_dim
    assert relative_error(logits(student, ids), expected) > 1e-3


@needs_group_norm
def test_served_models_equal_the_students_without_subquad(tmp_path):
    directories = [tmp_path / "pure", tmp_path / "hybrid"]
    for directory, layers in zip(directories, (PURE, HYBRID), strict=True):
        assert "bamba" in export(saved_student(directory, layers, "bamba"), directory / "served", "bamba")
    check_served(directories)


def made_with(**options):
    return make_student(teacher_of("llama"), "mamba2", **options)


def hybrid(layer_type, architecture="llama", **changes):
    options = made_with(export_target="bamba").config.layer_specs[0]
    return subquad.linearize(
        teacher_of(architecture, **changes), layer_types={"default": options, "1": layer_type}, scale_ids=SCALE_IDS
    )


REFUSED = {
    "another mixer": (lambda: student_of(), "layer 0: .*gated_deltanet"),
    "default options": (lambda: made_with(), "layer 0: v_activation"),
    "another discretization": (
        lambda: made_with(v_activation="silu", biases=False),
        "layer 0: discretization: got 'unit'",
    ),
    "an epsilon": (
        lambda: made_with(v_activation="silu", biases=False, discretization="zoh", norm_eps=1e-4),
        "layer 0: norm_eps: got 0.0001",
    ),
    "a window": (lambda: hybrid({"mixer": "attention", "window": 5}), "layer 1: .* window"),
    "attention with norms": (lambda: hybrid("attention", "qwen3"), "layer 1: .* norm of queries and keys"),
    "channels not a multiple of the hidden size": (
        lambda: student_of("llama", PURE, "bamba", hidden_size=48),
        "its mixers have 64 channels, .* 48",
    ),
}


@pytest.mark.skipif(has_group_norm(), reason="Bamba in this version of transformers has a norm for each head")
def test_older_transformers_without_group_norm_is_refused():
    with pytest.raises(UserError, match="one norm for all heads"):
        convert(student_of("llama", PURE, "bamba"), "bamba")


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_student_is_refused_and_nothing_is_written(case, tmp_path, monkeypatch):
    make, reason = REFUSED[case]
    student = make()
    monkeypatch.setattr("subquad.export.read_config", lambda directory: student.config)
    monkeypatch.setattr("subquad.export.load_teacher", lambda directory, dtype: (student, None))
    with pytest.raises(ExportError, match=f"Bamba: {reason}") as refused:
        export("student", tmp_path / "served", "bamba")
    assert "supported layers: mamba2" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "gla"}, "gla cannot be exported to Bamba"),
        ({"mixer": "mamba2", "rotary": True}, "layer 0: rotary: got True"),
    ],
    ids=lambda value: "",
)
def test_linearize_refuses_unsupported_mixers_and_options(options, message):
    with pytest.raises(UserError, match=message):
        subquad.linearize(teacher_of("llama"), scale_ids=SCALE_IDS, export_target="bamba", **options)


@needs_group_norm
def test_command_line_exports_to_bamba(tmp_path, capsys):
    saved_student(tmp_path, PURE, "bamba")
    made, served = tmp_path / "made", tmp_path / "served"
    argv = ["linearize", str(tmp_path / "teacher"), "--mixer", "mamba2", "--export", "bamba", "-o", str(made)]
    assert main(argv) == 0
    assert main(["export", str(made), "--format", "bamba", "-o", str(served)]) == 0
    assert "parameters as bamba in" in capsys.readouterr().out
    assert main(["export", str(made), "--format", "gguf", "-o", str(tmp_path / "x.gguf")]) == 2
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
