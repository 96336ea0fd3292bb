"""Bootstrap intervals against formulas, and task score ratios against known values."""

import math

import pytest
import torch

from subquad.evaluate.results import Result, label_results, select
from subquad.evaluate.statistics import TaskScores, accuracy_results, estimate, mean, summary_results
from tests.helpers.results import select_one


def test_standard_error_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() * 3 + 2
    found = mean("text", "loss", values)
    assert found.value == pytest.approx(values.mean().item())
    assert found.stderr == pytest.approx(values.std().item() / 20, rel=0.1)
    assert found.low == pytest.approx(found.value - 1.96 * found.stderr, abs=0.3 * found.stderr)
    assert found.high == pytest.approx(found.value + 1.96 * found.stderr, abs=0.3 * found.stderr)
    assert found.n == 400


def test_intervals_are_reproducible():
    values = torch.rand(50)
    assert mean("text", "loss", values) == mean("text", "loss", values)


def test_units_are_drawn_as_a_whole():
    """Ten rows of a hundred equal tokens have the error of ten numbers."""
    rows = torch.randn(10, generator=torch.Generator().manual_seed(1)).double()
    sums = torch.stack([100 * rows, torch.full((10,), 100.0).double()], 1)
    found = estimate("text", "loss", sums, lambda s: s[..., 0] / s[..., 1], n=1000)
    assert found.stderr == pytest.approx(rows.std().item() / math.sqrt(10), rel=0.2)
    assert found.n == 1000


def test_one_unit_has_no_interval_and_none_is_refused():
    assert math.isnan(mean("text", "loss", torch.tensor([3.0])).stderr)
    with pytest.raises(ValueError, match="at least one unit"):
        mean("text", "loss", torch.empty(0))


@pytest.fixture
def scores():
    teacher = [1.0] * 80 + [0.0] * 20
    student = [1.0] * 65 + [0.0] * 35
    return TaskScores(student, teacher, chance=0.5)


def test_accuracy_ratios(scores):
    found = {result.metric: result.value for result in accuracy_results("task", scores)}
    expected = {"accuracy_ratio": 0.65 / 0.8, "accuracy_ratio_above_chance": 0.15 / 0.3, "difference": -0.15}
    assert found == pytest.approx({**expected, "teacher_above_chance": 1})


def test_model_compared_with_itself(scores):
    itself = TaskScores(scores.teacher, scores.teacher, 0.5)
    for result in accuracy_results("task", itself):
        expected = 0.0 if result.metric == "difference" else 1.0
        assert result.value == expected, result
        if result.stderr is not None:
            assert result.stderr == 0, result


def test_paired_intervals_are_narrow():
    """Errors on the same items leave almost no uncertainty about the difference."""
    teacher = [1.0, 0.0] * 200
    student = [0.0, *teacher[1:]]
    pairs = TaskScores(student, teacher, 0.0), TaskScores([0.0, *student[:-1]], teacher, 0.0)
    paired, unpaired = (select_one(accuracy_results("task", pair), metric="difference").stderr for pair in pairs)
    assert paired < unpaired / 10


def test_mean_excludes_tasks_with_the_teacher_at_chance(scores):
    unknown = TaskScores([0.0, 1.0] * 50, [1.0, 0.0] * 50, 0.5)
    results = summary_results({"known": scores, "unknown": unknown})
    found = select_one(results, metric="accuracy_ratio_above_chance")
    assert found.n == 1
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.5 < found.high
    assert select_one(results, metric="win_and_tie@0").n == 2
    assert not select(summary_results({"unknown": unknown}), metric="accuracy_ratio_above_chance")


def test_win_and_tie_rate_at_tolerances():
    means = [(0.5, 0.5), (0.96, 1.0), (0.2, 0.4), (0.6, 0.5)]
    tasks = {str(pair): TaskScores(*([mean] * 2 for mean in pair), 0.0) for pair in means}
    rates = {result.metric: result.value for result in summary_results(tasks) if "@" in result.metric}
    assert rates == {f"win_and_tie@{t}": 0.5 if t < 0.05 else 0.75 for t in (0, 0.01, 0.02, 0.05, 0.1)}


def test_results_round_trip_through_dicts():
    result = Result("text", "perplexity", 3.5, stderr=0.1, length=512)
    named = label_results("gla", "nano", [result])[0]
    expected = {"model": "gla", "teacher": "nano", "task": "text", "metric": "perplexity", "value": 3.5}
    assert named.as_dict() == {**expected, "stderr": 0.1, "length": 512}
    assert Result(**named.as_dict()) == named
    assert select([named], model="gla", length=512) == [named]
    assert select([named], metric="kl") == []
