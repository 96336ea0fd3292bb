"""What is said over seeds: intervals that cover as often as they say, and nothing called best that might not be."""

import numpy as np
import pytest
import scipy.stats

from subquad.report.text import distinguished, report_notes, summary
from subquad.study.aggregate import T_QUANTILES, Mean, best, groups, labels, significant_best
from subquad.study.runs import find_runs
from tests.study.made_up import STAGE_SETS, recipes, study


def test_quantiles_are_students():
    expected = scipy.stats.t.ppf(0.975, np.arange(1, len(T_QUANTILES) + 1))
    assert np.allclose(T_QUANTILES, expected, atol=6e-4)
    mean = Mean.of(list(range(40)))
    exact = scipy.stats.t.interval(0.95, 39, np.mean(range(40)), scipy.stats.sem(range(40)))
    assert (mean.low, mean.high) == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_covers_the_truth_as_often_as_it_says(seeds):
    drawn = np.random.default_rng(0).normal(7.0, 2.0, (4000, seeds))
    covered = [mean.low <= 7.0 <= mean.high for mean in (Mean.of(list(row)) for row in drawn)]
    assert 0.94 < np.mean(covered) < 0.96


def test_one_seed_has_no_interval_and_is_apart_from_nothing():
    one, sure = Mean.of([3.0]), Mean.of([9.0, 9.1])
    assert (one.low, one.high, one.n) == (None, None, 1)
    assert not one.intervals_disjoint(sure)
    assert not sure.intervals_disjoint(one)
    assert sure.intervals_disjoint(Mean.of([1.0, 1.1]))


@pytest.fixture
def three_seeds(tmp_path):
    return groups(study(tmp_path, recipes(("gla", "retnet", "xlstm")), evaluated=False))


def test_seeds_are_grouped_and_named_by_what_differs(three_seeds):
    assert len(three_seeds) == 3 * 3 * 2
    assert all(len(group.runs) == 3 for group in three_seeds)
    names = labels(three_seeds)
    assert len(set(names.values())) == len(three_seeds)
    assert "gla 1+2+3 copied" in names.values()
    assert "xlstm 3 fresh" in names.values()


def test_the_best_stands_out_only_where_its_interval_is_apart(three_seeds):
    first = best(three_seeds, "perplexity", lower=True)
    assert first.mean("perplexity").value == min(group.mean("perplexity").value for group in three_seeds)
    assert best(three_seeds, "top1_agreement", lower=False) is first
    far = [
        group
        for group in three_seeds
        if group.mixer in ("xlstm", "retnet") and group.stages == "1+2+3" and group.copied
    ]
    assert significant_best(far, "perplexity", lower=True) is first
    assert distinguished(far, first) == "Its interval lies apart from all others."


def test_nothing_stands_out_where_intervals_overlap(tmp_path):
    found = groups(study(tmp_path, recipes(("gla", "mamba2"), STAGE_SETS[:1], (True,)), evaluated=False))
    first = best(found, "perplexity", lower=True)
    mine, other = (group.mean("perplexity") for group in found)
    assert mine.high > other.low, "made up so that they overlap"
    assert significant_best(found, "perplexity", lower=True) is None
    assert "overlaps that of mamba2: no difference is shown" in distinguished(found, first)


def test_with_one_seed_nothing_stands_out(tmp_path):
    found = groups(study(tmp_path, recipes(("gla", "retnet"), seeds=(0,)), evaluated=False))
    assert significant_best(found, "perplexity", lower=True) is None
    assert "With one seed there is no interval" in dict(summary(found, []))["Best student"]
    assert any(
        "One seed of everything" in note for note in report_notes([r for g in found for r in g.runs], found, [], 0)
    )


def test_a_rival_with_one_seed_keeps_the_best_from_standing_out(tmp_path):
    runs = study(tmp_path, recipes(("xlstm", "retnet"), seeds=(0, 1, 2)), evaluated=False)
    lonely = [r for r in runs if not (r.recipe.student.mixer == "retnet" and r.recipe.seed)]
    found = groups(lonely)
    assert significant_best(found, "perplexity", lower=True) is None
    assert any("have one seed" in note for note in report_notes(lonely, found, [], 0))


def test_nothing_finished_says_so(tmp_path):
    found = groups(find_runs(recipes(("gla",)), tmp_path))
    assert summary(found, []) == [("Best student", "No run is finished yet.")]
