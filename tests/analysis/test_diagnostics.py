"""Diagnostics of models with known values: hand-built heads, known decays, one layer that differs."""

import math

import pytest
import torch

import subquad
from subquad.analysis import diagnostics
from subquad.analysis.diagnostics import (
    comparison_results,
    diagnostics_results,
    half_life_results,
    half_lives,
    hidden_state_results,
    matrix_results,
    output_error_results,
    sample_matrix_pairs,
    swap_results,
)
from subquad.analysis.layer_access import LayerAccess, layer_access_pair, layer_results
from subquad.evaluate.perplexity import compare
from subquad.evaluate.results import select
from subquad.utils import UserError
from tests.helpers.known_models import PREVIOUS, UNIFORM, known_heads, previous_and_uniform, previous_matrix, snapshot
from tests.helpers.processes import run_python
from tests.helpers.results import select_one

TEXT = torch.arange(3, 15)[None]
T = 24


# ---------------------------------------------------------------------- mixing matrices


@pytest.fixture(scope="module")
def known_model():
    return previous_and_uniform()


@pytest.fixture(scope="module")
def rows():
    return torch.randint(3, 40, (2, T), generator=torch.Generator().manual_seed(5))


def of_head(found, metric: str, head: int) -> list[float]:
    return [row.value for row in select(found, metric=metric, head=head)]


def value(found, metric: str, layer: int | None = None) -> float:
    return select_one(found, metric=metric, layer=layer, head=None).value


def test_statistics_of_known_heads(known_model, rows):
    found = matrix_results(known_model, rows)
    assert of_head(found, "mass_1", PREVIOUS) == pytest.approx([1, 1], abs=1e-6)
    assert of_head(found, "memory_length", PREVIOUS) == pytest.approx([1.5, 1.5], abs=1e-5)
    assert of_head(found, "entropy", PREVIOUS) == pytest.approx([0, 0], abs=1e-4)
    expected = sum(math.log(i + 1) for i in range(T)) / T
    assert of_head(found, "entropy", UNIFORM) == pytest.approx([expected] * 2, rel=1e-5)
    assert value(found, "entropy") == pytest.approx(expected / 2, rel=1e-4)
    heads = known_heads(T)
    cosine = ((heads[0] * heads[1]).sum() / heads[0].norm() / heads[1].norm()).item()
    assert value(found, "diversity", 1) == pytest.approx((1 - cosine) ** 0.5, rel=1e-4)
    assert {row.n for row in found} == {2 * T}


def test_sample_matrices_are_those_of_the_first_head(known_model, rows):
    student = subquad.linearize(known_model, "retnet", scale_ids=TEXT)
    pairs = sample_matrix_pairs(student, known_model, rows)
    assert list(pairs) == [(0, 0), (1, 0)]
    for M, A in pairs.values():
        torch.testing.assert_close(A, previous_matrix(T), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(M.sum(-1), torch.ones(T))
        assert not torch.allclose(M, A, atol=0.1)


LAYER_TYPES = {
    "mistral": {"default": {"mixer": "gla", "state_heads": "key_value"}, "1": "attention"},
    "qwen3": {"default": "xlstm", "0": {"mixer": "attention", "window": 5, "sinks": 2}},
    "wide-biased-tied": {"default": "gated_deltanet"},
}


@pytest.mark.parametrize("family", LAYER_TYPES)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_model_compared_with_itself(make_teacher, rows, family, side):
    model = make_teacher(family)
    if side == "student":
        model = subquad.linearize(model, layer_types=LAYER_TYPES[family], scale_ids=TEXT)
    found = diagnostics_results(model, rows, model, top=4)
    for metric, exact in (("topk_mass_overlap", 1), ("frobenius", 0), ("cka", 1)):
        assert {row.value for row in select(found, metric=metric)} == {exact}
    for metric, expected in (("row_cosine", 1), ("cosine", 1), ("mixer_error", 0), ("layer_error", 0), ("swap_kl", 0)):
        values = [row.value for row in select(found, metric=metric)]
        assert values
        assert values == pytest.approx([expected] * len(values), abs=1e-6)


@pytest.mark.parametrize("family", LAYER_TYPES)
def test_student_differs_from_its_teacher(make_teacher, rows, family):
    teacher = make_teacher(family)
    student = subquad.linearize(teacher, layer_types=LAYER_TYPES[family], scale_ids=TEXT)
    found = diagnostics_results(student, rows, teacher, top=4)
    back = diagnostics_results(teacher, rows, student, top=4)  # either model may take either role
    for metric, worse in (("topk_mass_overlap", 0.99), ("cka", 0.9999), ("row_cosine", 0.99)):
        assert value(found, metric) < worse
        assert value(back, metric) < worse
    for metric in ("frobenius", "mixer_error", "layer_error", "swap_kl"):
        assert value(found, metric) > 1e-3
    assert value(back, "cka", 0) == pytest.approx(value(found, "cka", 0))


@pytest.mark.parametrize("mixer", ["gla", "deltanet", "gated_deltanet", "mamba2", "xlstm", "metala"])
def test_row_chunks_do_not_change_results(make_teacher, mixer, monkeypatch):
    teacher = make_teacher("qwen2")
    student = subquad.linearize(teacher, mixer, scale_ids=TEXT)
    ids = torch.randint(3, 61, (1, 75), generator=torch.Generator().manual_seed(1))
    whole = comparison_results(student, teacher, ids) + matrix_results(student, ids)
    for size in (1, 7, 64):
        monkeypatch.setattr(diagnostics, "CHUNK_ENTRIES", size * student.mixer_layers[0].spec.num_heads * 75)
        parts = comparison_results(student, teacher, ids) + matrix_results(student, ids)
        assert [(r.metric, r.layer, r.head) for r in parts] == [(r.metric, r.layer, r.head) for r in whole]
        assert [r.value for r in parts] == pytest.approx([r.value for r in whole], rel=2e-4, abs=2e-4)


def test_kept_attention_has_overlap_one(make_teacher, rows):
    teacher = make_teacher()
    student = subquad.linearize(teacher, layer_types={"default": "gla", "0": "attention"}, scale_ids=TEXT)
    found = comparison_results(student, teacher, rows, top=4)
    assert value(found, "topk_mass_overlap", 0) == 1
    assert value(found, "topk_mass_overlap", 1) < 0.95


def test_copied_projections_increase_overlap_and_cka():
    nano, tokenizer = subquad.load_teacher("nano")
    text = "import os\n\n\ndef names(path):\n    return [name for name in os.listdir(path) if name]\n\n\n" * 3
    ids = torch.tensor([tokenizer(text).input_ids[:96]])
    values = {}
    for copy_qkv in (False, True):
        student = subquad.linearize(nano, "gated_deltanet", copy_qkv=copy_qkv, scale_ids=ids)
        found = comparison_results(student, nano, ids) + hidden_state_results(student, nano, ids)
        values[copy_qkv] = [value(found, m) for m in ("topk_mass_overlap", "cka")]
    assert values[False][0] < values[True][0] < 0.9
    assert values[False][1] < values[True][1] < 0.999


# ---------------------------------------------------------------------- decays


@pytest.mark.parametrize("mixer", ["mamba2", "gla", "gated_deltanet", "kda", "xlstm"])
def test_half_life_equals_the_option(teacher, rows, mixer):
    student = subquad.linearize(teacher, mixer, half_life=12.0, scale_ids=TEXT)
    if mixer != "xlstm":  # its gate is not exactly constant
        layer = half_lives(student, rows)[1]
        torch.testing.assert_close(layer, torch.full_like(layer, 12), rtol=1e-4, atol=0)
    found = half_life_results(student, rows)
    assert select_one(found, layer=0, head=2).value == pytest.approx(12, rel=1e-4)
    assert select_one(found, layer=None).value == pytest.approx(12, rel=1e-4)


def test_half_lives_of_retnet_and_metala(teacher, rows):
    retnet = half_lives(subquad.linearize(teacher, "retnet", scale_ids=TEXT), rows)[0]
    expected = [math.log(2) / -math.log1p(-(2.0 ** (-5 - h))) for h in range(4)]
    assert retnet.tolist() == pytest.approx(expected, rel=1e-5)
    metala = half_lives(subquad.linearize(teacher, "metala", scale_ids=TEXT), rows)[0]
    assert metala.shape == (4, 8)
    assert metala[1, [0, -1]].tolist() == pytest.approx([1, 256], rel=1e-3)


def test_half_life_is_computed_from_the_mean_log_decay(teacher, rows):
    student = subquad.linearize(teacher, "gla", scale_ids=TEXT)
    with torch.no_grad():
        student.mixer_layers[0].mixer.decay_up.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    decays = []
    with torch.no_grad():
        hook = student.mixer_layers[0].mixer.register_forward_pre_hook(
            lambda mixer, args: decays.append(mixer.log_decay(args[0]))
        )
        for ids in rows:
            student(ids[None], use_cache=False)
        hook.remove()
    mean = torch.cat(decays, dim=1).double().mean((0, 1))
    torch.testing.assert_close(half_lives(student, rows)[0], -math.log(2) / mean)
    assert decays[0].std() > 0.01


def test_no_half_life_without_decay(teacher, rows):
    assert half_life_results(subquad.linearize(teacher, "deltanet", scale_ids=TEXT), rows) == []
    assert half_life_results(teacher, rows) == []
    hybrid = subquad.linearize(teacher, layer_types={"default": "gla", "1": "attention"}, scale_ids=TEXT)
    assert [r.layer for r in half_life_results(hybrid, rows)] == [None, *[0] * 5]


# ---------------------------------------------------------------------- layer errors


def test_only_the_replaced_layer_has_an_error(teacher, rows):
    student = subquad.linearize(teacher, layer_types={"default": "attention", "1": "gla"}, scale_ids=TEXT)
    found = output_error_results(student, teacher, rows) + swap_results(student, teacher, rows)
    for metric in ("mixer_error", "layer_error", "swap_kl"):
        assert abs(value(found, metric, 0)) < 1e-6
        assert value(found, metric, 1) > 1e-2
        mean = value(found, metric)
        assert mean == pytest.approx(value(found, metric, 1) / 2, rel=1e-3)
    # the teacher with its only different layer swapped in is the student
    whole = compare(student, teacher, [rows])
    assert value(found, "swap_kl", 1) == pytest.approx(whole["kl"], rel=1e-4)
    rise = whole["loss"] - whole["teacher_loss"]
    assert value(found, "swap_loss", 1) == pytest.approx(rise, rel=1e-3, abs=1e-6)


def test_mixer_with_zero_output_has_error_one(teacher, rows):
    student = subquad.linearize(teacher, "gla", scale_ids=TEXT)
    with torch.no_grad():
        student.mixer_layers[0].mixer.o_proj.weight.zero_()
    found = output_error_results(student, teacher, rows)
    assert value(found, "mixer_error", 0) == 1
    assert value(found, "mixer_error", 1) != pytest.approx(1, abs=1e-3)


def test_models_are_restored(make_teacher, rows):
    teacher = make_teacher("mistral").train()
    student = subquad.linearize(teacher, layer_types={"default": "gla", "1": "attention"}, scale_ids=TEXT)
    before = snapshot(teacher), snapshot(student)
    diagnostics_results(student, rows, teacher, top=4)
    diagnostics_results(teacher, rows, student, top=4)
    assert (snapshot(teacher), snapshot(student)) == before


def test_models_are_restored_after_a_failure(teacher, rows):
    student = subquad.linearize(teacher, "gla", scale_ids=TEXT)
    before = snapshot(teacher), snapshot(student)
    ours, theirs = layer_access_pair(student, teacher)
    failure = pytest.raises(RuntimeError, match="intended")
    with failure, ours.installed(), theirs.installed(), theirs.with_layer(1, ours):
        assert theirs.decoder_layers[1] is ours.decoder_layers[1]
        assert theirs.mixing_modules[0] is theirs.mixer_layers[0]
        raise RuntimeError("intended")
    assert (snapshot(teacher), snapshot(student)) == before


def test_installed_mixer_layers_do_not_change_a_transformer(make_teacher, rows):
    for family in ("mistral", "plain"):
        model = make_teacher(family)
        with torch.no_grad():
            whole = model(rows, use_cache=False).logits
            with LayerAccess(model).installed():
                again = model(rows, use_cache=False).logits
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)


def test_models_with_different_layers_are_refused(make_teacher, rows):
    teacher = make_teacher()
    student = subquad.linearize(teacher, "gla", scale_ids=TEXT)
    for message, measure, other, texts in (
        ("layers", swap_results, make_teacher(num_hidden_layers=3), rows),
        ("layer 0", hidden_state_results, make_teacher(num_attention_heads=2), rows),
        ("rows", hidden_state_results, teacher, rows[:, :1]),
        ("top: got 8", comparison_results, teacher, rows[:, :8]),
    ):
        with pytest.raises(UserError, match=message):
            measure(student, other, texts)


# ---------------------------------------------------------------------- memory

PROGRAM = """
import sys
sys.modules["fla"] = None
import torch, subquad
from resource import RUSAGE_SELF, getrusage
from subquad.analysis.diagnostics import comparison_results, matrix_results
torch.set_num_threads(1)
nano, _ = subquad.load_teacher("nano")
nano.model.layers, nano.config.num_hidden_layers = nano.model.layers[:1], 1
student = subquad.linearize(nano, sys.argv[1], scale_ids=torch.arange(12)[None])
ids = torch.randint(3, 4000, (1, 4096))
results = comparison_results(student, nano, ids) + matrix_results(student, ids)
assert all(0 <= result.value < 4096 for result in results)
print(1024 * getrusage(RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [pytest.param("gla", marks=pytest.mark.sample), "gated_deltanet"])
def test_4096_tokens_fit_in_4_gigabytes(mixer):
    """A whole matrix of six heads has 805 MB in float64, and the comparison would hold a dozen."""
    peak = int(run_python("-c", PROGRAM, mixer).split()[-1])
    print(f"{mixer}: {peak / 1e9:.2f} GB")
    assert peak < 4e9


def test_all_layers_count_equally_in_a_mean():
    layers = [{"entropy": torch.tensor([1.0, 3.0])}, {"entropy": torch.tensor([4.0])}]
    found = [(r.layer, r.head, r.value) for r in layer_results("matrices", layers, n=8)]
    assert found == [(None, None, 3.0), (0, None, 2.0), (0, 0, 1.0), (0, 1, 3.0), (1, None, 4.0), (1, 0, 4.0)]
