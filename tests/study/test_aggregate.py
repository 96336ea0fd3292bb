"""Aggregation over seeds: interval coverage, grouping, labels and the significantly best group."""

import numpy as np
import pytest
import scipy.stats

from subquad.study.aggregate import Mean, best_group, group_by_seed, group_labels, significant_best
from tests.helpers.studies import STAGE_SETS, synthetic_recipes, write_study


@pytest.mark.parametrize("seeds", [2, 3, 40])
def test_intervals_are_those_of_students_t(seeds):
    mean = Mean.of(list(range(seeds)))
    exact = scipy.stats.t.interval(0.95, seeds - 1, np.mean(range(seeds)), scipy.stats.sem(range(seeds)))
    assert (mean.low, mean.high) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_the_mean_in_95_percent_of_samples(seeds):
    samples = np.random.default_rng(0).normal(7.0, 2.0, (4000, seeds))
    covered = [mean.low <= 7.0 <= mean.high for mean in (Mean.of(list(sample)) for sample in samples)]
    assert 0.94 < np.mean(covered) < 0.96


def test_one_seed_has_no_interval_and_is_disjoint_from_nothing():
    one_seed, two_seeds = Mean.of([3.0]), Mean.of([9.0, 9.1])
    assert (one_seed.low, one_seed.high, one_seed.n) == (None, None, 1)
    assert not one_seed.intervals_disjoint(two_seeds)
    assert not two_seeds.intervals_disjoint(one_seed)
    assert two_seeds.intervals_disjoint(Mean.of([1.0, 1.1]))


@pytest.fixture
def groups(tmp_path):
    return group_by_seed(write_study(tmp_path, synthetic_recipes(("gla", "retnet", "xlstm")), evaluated=False))


def test_runs_are_grouped_by_seed_and_labeled_by_what_differs(groups):
    assert len(groups) == 3 * 3 * 2
    assert all(len(group.runs) == 3 for group in groups)
    labels = group_labels(groups)
    assert len(set(labels.values())) == len(groups)
    assert "gla 1+2+3 copied" in labels.values()
    assert "xlstm 3 not copied" in labels.values()


def test_the_best_group_is_significant_if_its_interval_is_disjoint(groups):
    best = best_group(groups, "perplexity", lower_is_better=True)
    assert best.mean("perplexity").value == min(group.mean("perplexity").value for group in groups)
    assert best_group(groups, "top1_agreement", lower_is_better=False) is best
    distant = [g for g in groups if g.mixer in ("xlstm", "retnet") and g.stages == "1+2+3" and g.copy_qkv]
    assert significant_best(distant, "perplexity", lower_is_better=True) is best


@pytest.mark.parametrize(
    ("mixers", "seeds"),
    [(("gla", "mamba2"), (3, 3)), (("gla", "retnet"), (1, 1)), (("xlstm", "retnet"), (3, 1))],
    ids=["overlapping intervals", "one seed", "another has one seed"],
)
def test_no_group_is_significant_if_intervals_overlap_or_are_unknown(mixers, seeds, tmp_path):
    runs = write_study(tmp_path, synthetic_recipes(mixers, STAGE_SETS[:1], (True,)), evaluated=False)
    groups = group_by_seed(r for r in runs if r.recipe.seed < seeds[mixers.index(r.recipe.student.mixer)])
    low, high = sorted((group.mean("perplexity") for group in groups), key=lambda mean: mean.value)
    assert None in (low.high, high.low) or low.high > high.low, "the synthetic results must overlap"
    assert significant_best(groups, "perplexity", lower_is_better=True) is None
