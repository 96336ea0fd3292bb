"""Parts taken away: what is left is what a model without them gives, and afterwards nothing has changed."""

import logging
import math

import pytest
import torch

import subquad
from subquad.analysis.ablations import (
    ablation_results,
    cut,
    frozen_decays,
    frozen_gates,
    mean_loss,
    windowed,
    without_short_conv,
)
from subquad.analysis.half_life import log_decay_of, mean_log_decays
from subquad.analysis.layer_access import LayerAccess
from subquad.evaluate.results import one, select
from subquad.utils import UserError

TEXT = torch.arange(3, 15)[None]
HYBRID = {"default": "gated_deltanet", "1": "attention"}


@pytest.fixture
def rows():
    return torch.randint(3, 61, (3, 20), generator=torch.Generator().manual_seed(5))


def shaken(teacher, layers):
    """A student, no part of whose mixers is neutral."""
    student = subquad.linearize(teacher, layer_types=layers, scale_ids=TEXT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in student.mixer_layers:
            copied = {id(parameter) for parameter in block.projection_parameters()}
            for parameter in block.parameters():
                if id(parameter) not in copied:
                    parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return student.eval()


def logits(model, rows):
    with torch.no_grad():
        return model(rows, use_cache=False).logits


def test_mean_loss_is_the_models_own(teacher, rows):
    with torch.no_grad():
        expected = teacher(rows, labels=rows, use_cache=False).loss.item()
    assert mean_loss(teacher, rows) == pytest.approx(expected, rel=1e-6)


def test_a_layer_cut_off_is_one_whose_output_projection_is_zero(teacher, rows):
    student = shaken(teacher, HYBRID)
    found = ablation_results(student, rows)
    for index, projection in enumerate(
        [student.mixer_layers[0].mixer.o_proj, student.mixer_layers[1].attention.o_proj],
    ):
        weight = projection.weight.detach().clone()
        with torch.no_grad():
            projection.weight.zero_()
            expected = mean_loss(student, rows)
            projection.weight.copy_(weight)
        assert one(found, task="without_layer", metric="loss", layer=index).value == pytest.approx(expected, rel=1e-6)
    assert one(found, task="intact", metric="loss").value == mean_loss(student, rows)


def test_of_a_hybrid_either_kind_is_cut_off(teacher, rows):
    found = ablation_results(shaken(teacher, HYBRID), rows)
    by_layer = [one(found, task="without_layer", metric="loss", layer=i).value for i in (0, 1)]
    assert one(found, task="without_mixers", metric="loss").value == by_layer[0]
    assert one(found, task="without_attention", metric="loss").value == by_layer[1]


def test_a_plain_transformer_can_be_cut_too(teacher, rows):
    found = ablation_results(teacher, rows)
    assert {row.task for row in found} == {"intact", "without_layer", "without_mixing"}
    assert [row.layer for row in select(found, task="without_layer", metric="loss")] == [0, 1]
    assert one(found, task="without_mixing", metric="loss").value != one(found, task="intact", metric="loss").value


def test_shares_lie_between_nothing_and_all(teacher, rows):
    found = ablation_results(shaken(teacher, HYBRID), rows)
    value = {row.task: row.value for row in select(found, metric="loss", layer=None)}
    assert one(found, task="intact", metric="share").value == 1
    assert one(found, task="without_mixing", metric="share").value == 0
    worth = value["intact"] - value["without_mixing"]
    expected = (value["without_mixers"] - value["without_mixing"]) / worth
    assert one(found, task="without_mixers", metric="share").value == pytest.approx(expected)


def test_a_hybrid_that_bypasses_its_mixers_is_warned_of(teacher, rows, caplog):
    student = shaken(teacher, HYBRID)
    with caplog.at_level(logging.WARNING):
        ablation_results(student, rows)
        assert not caplog.records
        with torch.no_grad():
            student.mixer_layers[0].mixer.o_proj.weight.zero_()
        found = ablation_results(student, rows)
    assert one(found, task="without_mixers", metric="share").value == 1
    assert "100% of what mixing is worth stays without them (arXiv 2510.05901)" in caplog.text


def test_any_score_can_be_asked_for(teacher, rows):
    student = shaken(teacher, {"default": "gla"})

    def sharpness(model, texts):
        return logits(model, texts).softmax(-1).amax(-1).mean().item()

    found = ablation_results(student, rows, score=sharpness, metric="sharpness")
    assert one(found, task="intact", metric="sharpness").value == sharpness(student, rows)
    assert {row.metric for row in found} == {"sharpness", "share"}


def test_a_reduced_window_is_that_of_a_student_made_with_it(teacher, rows):
    wide = subquad.linearize(teacher, layer_types={"default": "attention"}, scale_ids=TEXT)
    narrow = subquad.linearize(teacher, layer_types={"default": {"mixer": "attention", "window": 5}}, scale_ids=TEXT)
    found = ablation_results(wide, rows, window=5)
    assert one(found, task="window_5", metric="loss").value == pytest.approx(mean_loss(narrow, rows), rel=1e-6)
    assert one(found, task="window_5", metric="loss").value != pytest.approx(mean_loss(wide, rows), rel=1e-3)
    assert not select(ablation_results(narrow, rows, window=5), task="window_5")  # they see no more already
    with pytest.raises(UserError, match="window: got 0, expected at least 1"):
        ablation_results(wide, rows, window=0)


def test_without_short_conv_is_a_student_made_without(teacher, rows):
    student = shaken(teacher, {"default": "deltanet"})
    plain = subquad.linearize(teacher, layer_types={"default": {"mixer": "deltanet", "short_conv": 0}}, scale_ids=TEXT)
    weights = {name: value for name, value in student.state_dict().items() if "_conv" not in name}
    plain.load_state_dict(weights)
    with without_short_conv([block.mixer for block in student.mixer_layers]):
        torch.testing.assert_close(logits(student, rows), logits(plain.eval(), rows))
    assert not torch.allclose(logits(student, rows), logits(plain, rows), atol=1e-3)


def test_a_gate_frozen_at_its_mean_is_a_gate_that_looks_at_nothing(teacher, rows):
    student = shaken(teacher, {"default": "gla"})
    mixer = student.mixer_layers[1].mixer
    heard = []
    hook = mixer.g_proj.register_forward_hook(lambda _, __, out: heard.append(torch.nn.functional.silu(out)))
    intact = logits(student, rows)
    hook.remove()
    mean = heard[0].double().mean((0, 1)).float().unflatten(-1, (4, -1))
    with frozen_gates(student, rows):
        torch.testing.assert_close(mixer.output_gate(torch.randn(2, 7, 32)), mean.expand(2, 7, 4, 8))
        assert not torch.allclose(logits(student, rows), intact, atol=1e-3)
    fresh = subquad.linearize(teacher, "gla", scale_ids=TEXT).eval()  # its gates look at nothing already
    with frozen_gates(fresh, rows):
        frozen = logits(fresh, rows)
    torch.testing.assert_close(frozen, logits(fresh, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", ["mamba2", "gla", "metala", "gated_deltanet", "xlstm", "kda", "hgrn2"])
def test_a_decay_frozen_at_its_mean_is_the_same_at_every_token(teacher, rows, mixer):
    student = shaken(teacher, {"default": mixer})
    means = mean_log_decays(student, rows)
    inner = student.mixer_layers[1].mixer
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    intact = logits(student, rows)
    with frozen_decays(student, rows), torch.no_grad():
        found = log_decay_of(inner.op_inputs(x, None, None, None)[0])
        torch.testing.assert_close(found, means[1].float().expand_as(found), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(logits(student, rows), intact, atol=1e-4)
    with torch.no_grad():
        assert log_decay_of(inner.op_inputs(x, None, None, None)[0]).std(1).max() > 1e-4


def test_a_fixed_decay_is_frozen_already(teacher, rows):
    student = subquad.linearize(teacher, "retnet", scale_ids=TEXT).eval()
    found = ablation_results(student, rows)
    expected = one(found, task="intact", metric="loss").value
    assert one(found, task="frozen_decay", metric="loss").value == pytest.approx(expected, rel=1e-6)
    assert math.isfinite(expected)


def test_only_what_a_model_has_is_taken_away(teacher, rows):
    found = ablation_results(subquad.linearize(teacher, "linear_attention", scale_ids=TEXT), rows)
    assert {row.task for row in found} == {"intact", "without_layer", "without_mixing"}
    found = ablation_results(shaken(teacher, HYBRID), rows, window=4)
    assert {row.task for row in found} == {
        *("intact", "without_layer", "without_mixers", "without_attention", "without_mixing"),
        *("window_4", "without_short_conv", "frozen_gate", "frozen_decay"),
    }


# ---------------------------------------------------------------------- afterwards


def everything(model) -> dict:
    """All that could have been changed, weights by identity and version: nothing may even have written to them."""
    weights = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    own = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    windows = [getattr(m, "window", None) for m in model.modules()]
    return {"weights": weights, "hooks": hooks, "own": own, "windows": windows, "training": model.training}


ABLATIONS = {
    "cut": lambda model, rows: cut(LayerAccess(model).mixing),
    "window": lambda model, rows: windowed([model.mixer_layers[1]], 3),
    "short_conv": lambda model, rows: without_short_conv([model.mixer_layers[0].mixer]),
    "gate": frozen_gates,
    "decay": frozen_decays,
}


@pytest.mark.parametrize("how", ABLATIONS)
def test_a_model_is_bitwise_as_it_was(teacher, rows, how):
    student = shaken(teacher, HYBRID)
    before, intact = everything(student), logits(student, rows)
    with ABLATIONS[how](student, rows):
        assert not torch.equal(logits(student, rows), intact)
    assert everything(student) == before
    assert torch.equal(logits(student, rows), intact)

    def fail():
        with ABLATIONS[how](student, rows):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert everything(student) == before
    assert torch.equal(logits(student, rows), intact)


def test_all_ablations_leave_a_model_as_it_was(teacher, rows):
    student = shaken(teacher, HYBRID).train()
    before = everything(student)
    ablation_results(student, rows)
    assert everything(student) == before
    calls = []

    def failing(model, texts):
        calls.append(None)
        if len(calls) > 5:
            raise RuntimeError("on purpose")
        return 1.0

    with pytest.raises(RuntimeError, match="on purpose"):
        ablation_results(student, rows, score=failing)
    assert everything(student) == before


def test_nested_ablations_come_off_one_by_one(teacher, rows):
    student = shaken(teacher, {"default": "gla"})
    intact = logits(student, rows)
    with frozen_decays(student, rows):
        once = logits(student, rows)
        with frozen_decays(student, rows[:1]):
            pass
        assert torch.equal(logits(student, rows), once)
    assert torch.equal(logits(student, rows), intact)
