"""Intervals against formulas, and recovered shares against cases whose answer is known."""

import math

import pytest
import torch

from subquad.evaluate.recovery import (
    TaskScores,
    difference,
    mean_recovered,
    recovered,
    recovered_above_chance,
    recovery_results,
    summary_results,
    win_and_tie_rate,
)
from subquad.evaluate.results import Result, of, one, select
from subquad.evaluate.statistics import estimate, mean


def test_the_error_of_a_mean_is_that_of_the_formula():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() * 3 + 2
    found = mean(values)
    assert found.value == pytest.approx(values.mean().item())
    assert found.stderr == pytest.approx(values.std().item() / 20, rel=0.1)
    assert found.low == pytest.approx(found.value - 1.96 * found.stderr, abs=0.3 * found.stderr)
    assert found.high == pytest.approx(found.value + 1.96 * found.stderr, abs=0.3 * found.stderr)
    assert found.n == 400


def test_the_same_numbers_give_the_same_interval():
    values = torch.rand(50)
    assert mean(values) == mean(values)


def test_units_are_drawn_whole():
    """Ten rows of a hundred equal tokens know no more than ten numbers."""
    rows = torch.randn(10, generator=torch.Generator().manual_seed(1)).double()
    sums = torch.stack([100 * rows, torch.full((10,), 100.0).double()], 1)
    found = estimate(sums, lambda s: s[..., 0] / s[..., 1], n=1000)
    assert found.stderr == pytest.approx(rows.std().item() / math.sqrt(10), rel=0.2)
    assert found.n == 1000


def test_one_unit_has_no_interval_and_none_no_mean():
    assert math.isnan(mean(torch.tensor([3.0])).stderr)
    with pytest.raises(ValueError, match="at least one unit"):
        mean(torch.empty(0))


@pytest.fixture
def scores():
    teacher = torch.tensor([1.0] * 80 + [0.0] * 20)
    student = torch.tensor([1.0] * 65 + [0.0] * 35)
    return TaskScores(student, teacher, chance=0.5)


def test_recovered_shares(scores):
    assert recovered(scores).value == pytest.approx(0.65 / 0.8)
    assert recovered_above_chance(scores).value == pytest.approx(0.15 / 0.3)
    assert difference(scores).value == pytest.approx(-0.15)
    assert scores.teacher_knows


def test_a_model_beside_itself_recovers_all(scores):
    itself = TaskScores(scores.teacher, scores.teacher, 0.5)
    for row in recovery_results("task", itself):
        expected = {"difference": 0.0, "teacher_above_chance": 1.0}.get(row.metric, 1.0)
        assert row.value == expected, row
        if row.stderr is not None:
            assert row.stderr == 0, row


def test_pairing_makes_intervals_narrow():
    """Student and teacher that err on the same items differ by almost nothing, surely."""
    teacher = torch.tensor([1.0, 0.0] * 200)
    student = teacher.clone()
    student[0] = 0
    paired = difference(TaskScores(student, teacher, 0.0)).stderr
    apart = difference(TaskScores(student.roll(1), teacher, 0.0)).stderr
    assert paired < apart / 10


def test_the_mean_leaves_out_what_the_teacher_does_not_know(scores):
    guessing = torch.tensor([1.0, 0.0] * 50)
    tasks = {"known": scores, "unknown": TaskScores(1 - guessing, guessing, 0.5)}
    found = mean_recovered(tasks)
    assert found.n == 1
    assert found.value == pytest.approx(0.5)
    assert mean_recovered({"unknown": tasks["unknown"]}) is None
    rows = summary_results(tasks)
    assert one(rows, metric="recovered_share").value == pytest.approx(0.5)
    assert one(rows, metric="win_and_tie@0").value == 0.5
    assert one(rows, metric="win_and_tie@0").n == 2


def test_win_and_tie_rate_at_tolerances():
    pairs = [(0.5, 0.5), (0.96, 1.0), (0.2, 0.4), (0.6, 0.5)]
    assert win_and_tie_rate(pairs, 0.0) == 0.5
    assert win_and_tie_rate(pairs, 0.05) == 0.75
    assert win_and_tie_rate(pairs, 0.5) == 1.0


def test_rows_go_to_dictionaries_and_back():
    row = Result("text", "perplexity", 3.5, stderr=0.1, length=512)
    named = of("gla", "nano", [row])[0]
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
    with pytest.raises(LookupError, match="0 rows"):
        one([named], metric="kl")
