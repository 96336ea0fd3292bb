"""Bootstrap intervals against formulas, and task score ratios against known values."""

import math

import pytest
import torch

from subquad.evaluate.results import Result, label_results, select, select_one
from subquad.evaluate.statistics import estimate, mean
from subquad.evaluate.task_scores import (
    TaskScores,
    accuracy_ratio,
    accuracy_ratio_above_chance,
    accuracy_results,
    difference,
    mean_accuracy_ratio,
    summary_results,
    win_and_tie_rate,
)


def test_standard_error_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() * 3 + 2
    found = mean(values)
    assert found.value == pytest.approx(values.mean().item())
    assert found.stderr == pytest.approx(values.std().item() / 20, rel=0.1)
    assert found.low == pytest.approx(found.value - 1.96 * found.stderr, abs=0.3 * found.stderr)
    assert found.high == pytest.approx(found.value + 1.96 * found.stderr, abs=0.3 * found.stderr)
    assert found.n == 400


def test_intervals_are_reproducible():
    values = torch.rand(50)
    assert mean(values) == mean(values)


def test_units_are_drawn_as_a_whole():
    """Ten rows of a hundred equal tokens have the error of ten numbers."""
    rows = torch.randn(10, generator=torch.Generator().manual_seed(1)).double()
    sums = torch.stack([100 * rows, torch.full((10,), 100.0).double()], 1)
    found = estimate(sums, lambda s: s[..., 0] / s[..., 1], n=1000)
    assert found.stderr == pytest.approx(rows.std().item() / math.sqrt(10), rel=0.2)
    assert found.n == 1000


def test_one_unit_has_no_interval_and_none_is_refused():
    assert math.isnan(mean(torch.tensor([3.0])).stderr)
    with pytest.raises(ValueError, match="at least one unit"):
        mean(torch.empty(0))


@pytest.fixture
def scores():
    teacher = torch.tensor([1.0] * 80 + [0.0] * 20)
    student = torch.tensor([1.0] * 65 + [0.0] * 35)
    return TaskScores(student, teacher, chance=0.5)


def test_accuracy_ratios(scores):
    assert accuracy_ratio(scores).value == pytest.approx(0.65 / 0.8)
    assert accuracy_ratio_above_chance(scores).value == pytest.approx(0.15 / 0.3)
    assert difference(scores).value == pytest.approx(-0.15)
    assert scores.teacher_above_chance


def test_model_compared_with_itself(scores):
    itself = TaskScores(scores.teacher, scores.teacher, 0.5)
    for result in accuracy_results("task", itself):
        expected = 0.0 if result.metric == "difference" else 1.0
        assert result.value == expected, result
        if result.stderr is not None:
            assert result.stderr == 0, result


def test_paired_intervals_are_narrow():
    """Errors on the same items leave almost no uncertainty about the difference."""
    teacher = torch.tensor([1.0, 0.0] * 200)
    student = teacher.clone()
    student[0] = 0
    paired = difference(TaskScores(student, teacher, 0.0)).stderr
    unpaired = difference(TaskScores(student.roll(1), teacher, 0.0)).stderr
    assert paired < unpaired / 10


def test_mean_excludes_tasks_with_the_teacher_at_chance(scores):
    guessing = torch.tensor([1.0, 0.0] * 50)
    tasks = {"known": scores, "unknown": TaskScores(1 - guessing, guessing, 0.5)}
    found = mean_accuracy_ratio(tasks)
    assert found.n == 1
    assert found.value == pytest.approx(0.5)
    assert mean_accuracy_ratio({"unknown": tasks["unknown"]}) is None
    results = summary_results(tasks)
    assert select_one(results, metric="accuracy_ratio_above_chance").value == pytest.approx(0.5)
    assert select_one(results, metric="win_and_tie@0").value == 0.5
    assert select_one(results, metric="win_and_tie@0").n == 2


def test_win_and_tie_rate_at_tolerances():
    pairs = [(0.5, 0.5), (0.96, 1.0), (0.2, 0.4), (0.6, 0.5)]
    assert win_and_tie_rate(pairs, 0.0) == 0.5
    assert win_and_tie_rate(pairs, 0.05) == 0.75
    assert win_and_tie_rate(pairs, 0.5) == 1.0


def test_results_round_trip_through_dicts():
    result = Result("text", "perplexity", 3.5, stderr=0.1, length=512)
    named = label_results("gla", "nano", [result])[0]
    assert named.as_dict() == {
        "model": "gla",
        "teacher": "nano",
        "task": "text",
        "metric": "perplexity",
        "value": 3.5,
        "stderr": 0.1,
        "length": 512,
    }
    assert Result.from_dict(named.as_dict()) == named
    assert select([named], model="gla", length=512) == [named]
    with pytest.raises(LookupError, match="0 results"):
        select_one([named], metric="kl")
