"""Students of attention with windows as Ministral: logits beyond the window, decoding, and what cannot go."""

import itertools

import pytest
import torch

from subquad.export import convert, export
from subquad.modeling.export_target import ExportError
from subquad.utils import UserError
from tests.helpers.exports import check_served, saved_student, student_of, teacher_of
from tests.helpers.ops import error
from tests.helpers.students import logits, make_student

WINDOW = {"mixer": "attention", "window": 16}
ALL = {"default": WINDOW}
SOME = {"default": WINDOW, "1,2": "attention"}
NONE = {"default": "attention"}
IDS = torch.randint(3, 61, (2, 70), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        *itertools.product(["llama", "phi3", "granite"], [ALL, SOME, NONE]),
        ("mistral", ALL),
        ("mistral", NONE),  # all layers have the teacher's own window
    ],
)
def test_converted_model_has_the_students_logits_beyond_the_window(architecture, layers):
    student = student_of(architecture, layers, "ministral")
    model = convert(student, "ministral")
    assert type(model).__name__ == "MinistralForCausalLM"
    assert error(logits(model, IDS), logits(student, IDS)) < 1e-5
    if layers is not ALL and architecture != "mistral":
        assert "full_attention" in model.config.layer_types
    if layers is ALL:
        assert (model.config.sliding_window, set(model.config.layer_types)) == (16, {"sliding_attention"})
        model.config.sliding_window += 1
        for layer in model.model.layers:
            layer.self_attn.sliding_window += 1
        assert error(logits(model, IDS), logits(student, IDS)) > 1e-3  # the window matters, to the token


def test_served_models_equal_the_students_without_subquad(tmp_path):
    directories = [tmp_path / "all", tmp_path / "some"]
    for directory, layers in zip(directories, (ALL, SOME), strict=True):
        student = saved_student(directory, layers, "ministral")
        assert "as ministral in" in export(student, directory / "served", "ministral")
    check_served(directories)


def test_a_student_needs_no_export_target():
    student = make_student(teacher_of("llama"), layer_types=ALL)
    assert error(logits(convert(student, "ministral"), IDS), logits(student, IDS)) < 1e-5


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ({"default": {**WINDOW, "sinks": 4}}, r"layer 0: its attention sees the first 4 tokens \(sinks\) beside"),
        (
            {"default": WINDOW, "1": {**WINDOW, "window": 8}},
            "its layers have windows of 8, 16 tokens, expected one size",
        ),
        ({"default": {**WINDOW, "window": [8, 16]}}, "layer 0: its heads have different windows"),
        ({"default": "attention", "1": "gla"}, "layer 1: its mixer is gla; supported layers: those that keep"),
        ({"default": {"mixer": "gated_deltanet", "window": 16}}, "layer 0: its mixer remembers"),
    ],
    ids=["sinks", "sizes", "heads", "mixer", "memory"],
)
def test_what_ministral_does_not_have_is_refused(layers, reason):
    with pytest.raises(ExportError, match=reason):
        convert(make_student(teacher_of("llama"), layer_types=layers), "ministral")


def test_linearize_refuses_a_mixer_for_this_target():
    with pytest.raises(UserError, match="gla cannot be exported to Ministral; supported layers: those that keep"):
        make_student(teacher_of("llama"), layer_types={"default": "gla"}, export_target="ministral")


def test_mlx_needs_a_layer_that_sees_all_tokens(tmp_path):
    student = saved_student(tmp_path, ALL, "ministral")
    with pytest.raises(ExportError, match="all its layers have windows; MLX expects a layer that sees all tokens"):
        export(student, tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()
