"""Each ablation equals a model without that part, and leaves the model unchanged afterwards."""

import logging
import math
from contextlib import nullcontext

import pytest
import torch

import subquad
from subquad.analysis.ablations import (
    ablation_results,
    frozen_decays,
    frozen_gates,
    limited_window,
    mean_loss,
    without_short_conv,
    zero_output,
)
from subquad.analysis.diagnostics import find_log_decay, mean_log_decays
from subquad.analysis.layer_access import LayerAccess
from subquad.evaluate.results import select
from subquad.utils import UserError
from tests.helpers.known_models import snapshot
from tests.helpers.results import select_one

TEXT = torch.arange(3, 15)[None]
HYBRID = {"default": "gated_deltanet", "1": "attention"}


@pytest.fixture
def rows():
    return torch.randint(3, 61, (3, 20), generator=torch.Generator().manual_seed(5))


def perturbed(teacher, layers):
    """A student whose mixer parameters, except the copied projections, are perturbed."""
    student = subquad.linearize(teacher, layer_types=layers, scale_ids=TEXT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in student.mixer_layers:
            copied = {id(parameter) for parameter in layer.projection_parameters()}
            for parameter in layer.parameters():
                if id(parameter) not in copied:
                    parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return student.eval()


def logits(model, rows):
    with torch.no_grad():
        return model(rows, use_cache=False).logits


def value(found, task, metric="loss", layer=None):
    return select_one(found, task=task, metric=metric, layer=layer).value


def test_mean_loss_equals_the_model_loss(teacher, rows):
    with torch.no_grad():
        expected = teacher(rows, labels=rows, use_cache=False).loss.item()
    assert mean_loss(teacher, rows) == pytest.approx(expected, rel=1e-6)


def test_without_layer_equals_zero_output_projection(teacher, rows):
    student = perturbed(teacher, HYBRID)
    found = ablation_results(student, rows)
    for index, projection in enumerate(
        (student.mixer_layers[0].mixer.o_proj, student.mixer_layers[1].attention.o_proj)
    ):
        weight = projection.weight.detach().clone()
        with torch.no_grad():
            projection.weight.zero_()
            expected = mean_loss(student, rows)
            projection.weight.copy_(weight)
        assert value(found, "without_layer", layer=index) == pytest.approx(expected, rel=1e-6)
    assert value(found, "intact") == mean_loss(student, rows)


def test_hybrid_without_mixers_and_without_attention(teacher, rows):
    found = ablation_results(perturbed(teacher, HYBRID), rows)
    assert value(found, "without_mixers") == value(found, "without_layer", layer=0)
    assert value(found, "without_attention") == value(found, "without_layer", layer=1)


def test_transformer_layers_can_be_ablated(teacher, rows):
    found = ablation_results(teacher, rows)
    assert {result.task for result in found} == {"intact", "without_layer", "without_mixing"}
    assert [result.layer for result in select(found, task="without_layer", metric="loss")] == [0, 1]
    assert value(found, "without_mixing") != value(found, "intact")


def test_share_is_relative_to_intact_and_without_mixing(teacher, rows):
    found = ablation_results(perturbed(teacher, HYBRID), rows)
    assert value(found, "intact", "share") == 1
    assert value(found, "without_mixing", "share") == 0
    left = value(found, "without_mixers") - value(found, "without_mixing")
    expected = left / (value(found, "intact") - value(found, "without_mixing"))
    assert value(found, "without_mixers", "share") == pytest.approx(expected)


def test_bypassed_mixers_are_warned_about(teacher, rows, caplog):
    student = perturbed(teacher, HYBRID)
    with caplog.at_level(logging.WARNING):
        ablation_results(student, rows)
        assert not caplog.records
        with torch.no_grad():
            student.mixer_layers[0].mixer.o_proj.weight.zero_()
        found = ablation_results(student, rows)
    assert value(found, "without_mixers", "share") == 1
    assert "2510.05901" in caplog.text


def test_custom_score(teacher, rows):
    student = perturbed(teacher, {"default": "gla"})

    def sharpness(model, texts):
        return logits(model, texts).softmax(-1).amax(-1).mean().item()

    found = ablation_results(student, rows, score=sharpness, metric="sharpness")
    assert value(found, "intact", "sharpness") == sharpness(student, rows)
    assert {result.metric for result in found} == {"sharpness", "share"}


def test_limited_window_equals_student_with_that_window(teacher, rows):
    wide = subquad.linearize(teacher, layer_types={"default": "attention"}, scale_ids=TEXT)
    narrow = subquad.linearize(teacher, layer_types={"default": {"mixer": "attention", "window": 5}}, scale_ids=TEXT)
    found = ablation_results(wide, rows, window=5)
    assert value(found, "window_5") == pytest.approx(mean_loss(narrow, rows), rel=1e-6)
    assert value(found, "window_5") != pytest.approx(mean_loss(wide, rows), rel=1e-3)
    assert not select(ablation_results(narrow, rows, window=5), task="window_5")
    with pytest.raises(UserError, match="window"):
        ablation_results(wide, rows, window=0)


def test_without_short_conv_equals_student_without_short_conv(teacher, rows):
    student = perturbed(teacher, {"default": "deltanet"})
    plain = subquad.linearize(teacher, layer_types={"default": {"mixer": "deltanet", "short_conv": 0}}, scale_ids=TEXT)
    weights = {name: value for name, value in student.state_dict().items() if "_conv" not in name}
    plain.load_state_dict(weights)
    with without_short_conv([layer.mixer for layer in student.mixer_layers]):
        torch.testing.assert_close(logits(student, rows), logits(plain.eval(), rows))
    assert not torch.allclose(logits(student, rows), logits(plain, rows), atol=1e-3)


def test_frozen_gate_is_the_mean_gate(teacher, rows):
    student = perturbed(teacher, {"default": "gla"})
    mixer = student.mixer_layers[1].mixer
    gates = []
    hook = mixer.g_proj.register_forward_hook(lambda _, __, out: gates.append(torch.nn.functional.silu(out)))
    intact = logits(student, rows)
    hook.remove()
    mean = gates[0].double().mean((0, 1)).float().unflatten(-1, (4, -1))
    with frozen_gates(student, rows):
        torch.testing.assert_close(mixer.output_gate(torch.randn(2, 7, 32)), mean.expand(2, 7, 4, 8))
        assert not torch.allclose(logits(student, rows), intact, atol=1e-3)
    fresh = subquad.linearize(teacher, "gla", scale_ids=TEXT).eval()  # its gates are constant
    with frozen_gates(fresh, rows):
        frozen = logits(fresh, rows)
    torch.testing.assert_close(frozen, logits(fresh, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", ["mamba2", "gla", "metala", "gated_deltanet", "xlstm", "kda", "hgrn2"])
def test_frozen_decay_is_the_mean_at_every_token(teacher, rows, mixer):
    student = perturbed(teacher, {"default": mixer})
    means = mean_log_decays(student, rows)
    inner = student.mixer_layers[1].mixer
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    intact = logits(student, rows)
    with frozen_decays(student, rows), torch.no_grad():
        found = find_log_decay(inner.op_inputs(x, None, None, None)[0])
        torch.testing.assert_close(found, means[1].float().expand_as(found), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(logits(student, rows), intact, atol=1e-4)
    with torch.no_grad():
        assert find_log_decay(inner.op_inputs(x, None, None, None)[0]).std(1).max() > 1e-4


def test_freezing_a_fixed_decay_changes_nothing(teacher, rows):
    student = subquad.linearize(teacher, "retnet", scale_ids=TEXT).eval()
    found = ablation_results(student, rows)
    assert value(found, "frozen_decay") == pytest.approx(value(found, "intact"), rel=1e-6)
    assert math.isfinite(value(found, "intact"))


def test_only_applicable_ablations_are_run(teacher, rows):
    found = ablation_results(subquad.linearize(teacher, "linear_attention", scale_ids=TEXT), rows)
    assert {result.task for result in found} == {"intact", "without_layer", "without_mixing"}
    found = ablation_results(perturbed(teacher, HYBRID), rows, window=4)
    assert {result.task for result in found} == {
        *("intact", "without_layer", "without_mixers", "without_attention", "without_mixing"),
        *("window_4", "without_short_conv", "frozen_gate", "frozen_decay"),
    }


# ---------------------------------------------------------------------- state afterwards


ABLATIONS = {
    "cut": lambda model, rows: zero_output(LayerAccess(model).mixing_modules),
    "window": lambda model, rows: limited_window([model.mixer_layers[1]], 3),
    "short_conv": lambda model, rows: without_short_conv([model.mixer_layers[0].mixer]),
    "gate": frozen_gates,
    "decay": frozen_decays,
}


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("name", ABLATIONS)
def test_model_is_restored_bitwise(teacher, rows, name, failing):
    student = perturbed(teacher, HYBRID)
    before, intact = snapshot(student), logits(student, rows)
    expected = pytest.raises(RuntimeError, match="intended") if failing else nullcontext()
    with expected, ABLATIONS[name](student, rows):
        assert not torch.equal(logits(student, rows), intact)
        if failing:
            raise RuntimeError("intended")
    assert snapshot(student) == before
    assert torch.equal(logits(student, rows), intact)


@pytest.mark.parametrize("scores", [None, 5], ids=["finished", "failed"])
def test_ablation_results_restore_the_model(teacher, rows, scores):
    student = perturbed(teacher, HYBRID).train()
    before = snapshot(student)
    left = iter(range(scores or 100))
    with nullcontext() if scores is None else pytest.raises(StopIteration):
        ablation_results(student, rows, score=lambda model, texts: mean_loss(model, texts) + 0 * next(left))
    assert snapshot(student) == before


def test_nested_ablations_are_undone_in_order(teacher, rows):
    student = perturbed(teacher, {"default": "gla"})
    intact = logits(student, rows)
    with frozen_decays(student, rows):
        once = logits(student, rows)
        with frozen_decays(student, rows[:1]):
            pass
        assert torch.equal(logits(student, rows), once)
    assert torch.equal(logits(student, rows), intact)
