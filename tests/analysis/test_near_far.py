"""A student with near and far as both, as one of them and as none; diagnostics and other ablations of such students."""

import pytest
import torch

import subquad
from subquad.analysis.ablations import ablation_results, mean_loss
from subquad.analysis.diagnostics import diagnostics_results, half_lives
from subquad.analysis.near_far import near_far_results
from subquad.evaluate.baselines import equal_bytes, share_weights
from subquad.evaluate.results import select
from subquad.evaluate.table import format_tables
from tests.helpers.known_models import snapshot
from tests.helpers.near_far import near_far_student, near_far_types
from tests.helpers.results import select_one
from tests.helpers.students import SCALE_IDS, logits, make_student

PARTS = ["both", "near_only", "far_only", "neither"]


@pytest.fixture
def rows():
    return torch.randint(3, 61, (3, 30), generator=torch.Generator().manual_seed(5))


def scores(student, rows):
    found = near_far_results(student, rows)
    assert [result.metric for result in found] == PARTS
    assert {(result.task, result.n, result.length) for result in found} == {("near and far", 90, 30)}
    return {result.metric: result.value for result in found}


@pytest.mark.parametrize("merge", ["mass", "add"])
def test_four_rows(teacher, rows, merge):
    student = near_far_student(teacher, near_far_types("gla", [4, 9], 2, merge=merge))
    before = snapshot(student)
    found = scores(student, rows)
    assert snapshot(student) == before
    windows = {"default": {"mixer": "attention", "window": [4, 9], "sinks": 2}}
    near = subquad.linearize(teacher, layer_types=windows, scale_ids=SCALE_IDS)
    assert found["both"] == mean_loss(student.eval(), rows)
    assert found["near_only"] == pytest.approx(mean_loss(near, rows), rel=1e-6)
    assert found["neither"] == select_one(ablation_results(student, rows), task="without_mixing", metric="loss").value
    far = near_far_student(teacher, near_far_types("gla", [4, 9], 2)).eval()
    with torch.no_grad():
        for layer in far.mixer_layers:
            layer.mixer.load_state_dict(student.mixer_layers[layer.index].mixer.state_dict())
            layer.merge.m_proj.bias.fill_(1e4)
    assert found["far_only"] == pytest.approx(mean_loss(far, rows), rel=1e-6)
    assert len({round(value, 4) for value in found.values()}) == 4


def test_a_part_is_restored_after_an_error(teacher, rows):
    student = near_far_student(teacher, near_far_types("gla", 4))
    expected, calls = logits(student, rows), []

    def score(model, texts):
        calls.append(logits(model, texts))
        if len(calls) == 3:
            raise KeyError("score")
        return 0.0

    with pytest.raises(KeyError):
        near_far_results(student, rows, score)
    assert torch.equal(calls[0], expected)
    assert not torch.equal(calls[1], expected)
    assert not torch.equal(calls[2], calls[1])
    assert torch.equal(logits(student, rows), expected)


def test_the_four_rows_are_one_table(teacher, rows):
    lines = format_tables(near_far_results(near_far_student(teacher, near_far_types("gla", 4)), rows)).splitlines()
    assert lines[0] == "near and far"
    assert "neither (30" in lines[1]
    assert "tokens)" in lines[2]


def test_other_models_have_no_rows(teacher, rows):
    assert near_far_results(teacher, rows) == []
    assert near_far_results(make_student(teacher, "gla"), rows) == []


HYBRID = {
    "0": {"mixer": "gated_deltanet", "window": 4, "sinks": 1},
    "1": {"mixer": "mamba2", "window": [3, 7], "merge": "add", "output_norm": False},
    "2": "gla",
    "3": {"mixer": "attention", "window": 20},
}


def test_ablations_and_diagnostics_of_a_hybrid(make_teacher, rows):
    teacher = make_teacher(num_hidden_layers=4)
    student = near_far_student(teacher, HYBRID)
    before = snapshot(student)
    found = ablation_results(student, rows, window=5)
    assert {result.task for result in found} == {
        *("intact", "without_layer", "without_mixers", "without_attention", "without_mixing"),
        *("window_5", "frozen_gate", "frozen_decay"),
    }

    def loss(task, layer=None):
        return select_one(found, task=task, metric="loss", layer=layer).value

    assert loss("without_mixers") == loss("without_layer", 2)
    assert loss("without_attention") == loss("without_layer", 3)
    assert loss("frozen_decay") != loss("intact")
    diagnosed = diagnostics_results(student, rows, teacher, top=4)
    for metric in ("mixer_error", "swap_kl", "topk_mass_overlap", "row_cosine"):
        assert [select_one(diagnosed, metric=metric, layer=i, head=None).value >= 0 for i in range(4)] == [True] * 4
    assert len(select(diagnosed, metric="half_life", head=None)) == 4  # of all, and of three layers
    assert snapshot(student) == before


def test_half_lives_of_a_memory(teacher, rows):
    student = subquad.linearize(teacher, "gla", window=4, half_life=20.0, scale_ids=SCALE_IDS)
    for values in half_lives(student, rows):
        torch.testing.assert_close(values, torch.full_like(values, 20.0), rtol=1e-3, atol=0)


def test_a_fresh_student_is_nearer_to_the_teacher_than_its_windows(teacher, rows):
    """Its matrices are the teacher's rows where nothing has left."""
    student = subquad.linearize(teacher, "gla", window=30, scale_ids=SCALE_IDS)
    diagnosed = diagnostics_results(student, rows, teacher, top=4)
    assert select_one(diagnosed, metric="topk_mass_overlap", layer=None).value == pytest.approx(1)
    assert select_one(diagnosed, metric="mixer_error", layer=None).value == pytest.approx(0, abs=1e-9)


def test_weights_can_be_shared_with_the_teacher(teacher, rows):
    student = subquad.linearize(teacher, "gla", window=4, sinks=1, scale_ids=SCALE_IDS)
    expected = logits(student, rows)
    shared = share_weights(student, teacher)
    assert shared.mixer_layers[0].attention.q_proj.weight is teacher.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(logits(shared, rows), expected)
    found = equal_bytes(shared)
    cache = shared.new_cache()
    logits(shared, torch.randint(3, 61, (1, 100)), past_key_values=cache)
    assert found.student == cache.nbytes()
    assert found.window > 4
