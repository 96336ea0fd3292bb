"""The sentences of the report: whether the best student is called better, and what the notes say is missing."""

import json

import pytest

from subquad.report.text import report_notes, significance, summary
from subquad.study.aggregate import best_group, group_by_seed
from subquad.study.runs import find_runs
from tests.helpers.studies import STAGE_SETS, synthetic_recipes, write_study


@pytest.mark.parametrize(
    ("mixers", "sentence"),
    [
        (("xlstm", "retnet"), "Its interval does not overlap any other."),
        (("gla", "mamba2"), "Its interval overlaps that of mamba2: the difference is not significant."),
    ],
)
def test_overlap_of_intervals_is_stated(tmp_path, mixers, sentence):
    groups = group_by_seed(write_study(tmp_path, synthetic_recipes(mixers, STAGE_SETS[:1], (True,)), evaluated=False))
    assert significance(groups, best_group(groups, "perplexity", lower_is_better=True)) == sentence


def test_a_single_seed_is_stated(tmp_path):
    runs = write_study(tmp_path, synthetic_recipes(("gla", "retnet"), seeds=(0,)), evaluated=False)
    groups = group_by_seed(runs)
    assert "With one seed there is no interval" in dict(summary(groups, []))["How sure"]
    assert any("Every student has one seed" in note for note in report_notes(runs, groups, [], 0))


def test_some_groups_with_a_single_seed_are_stated(tmp_path):
    runs = write_study(tmp_path, synthetic_recipes(("xlstm", "retnet"), seeds=(0, 1, 2)), evaluated=False)
    runs = [r for r in runs if not (r.recipe.student.mixer == "retnet" and r.recipe.seed)]
    assert any("have one seed" in note for note in report_notes(runs, group_by_seed(runs), [], 0))


def test_a_study_without_finished_runs_has_a_summary(tmp_path):
    groups = group_by_seed(find_runs(synthetic_recipes(("gla",)), tmp_path))
    assert summary(groups, []) == [("Best student", "No run is finished yet.")]


def test_students_that_training_made_worse_or_better_than_the_teacher_are_noted(tmp_path):
    runs = write_study(tmp_path, synthetic_recipes(("gla", "xlstm"), STAGE_SETS[:1], (True,), (0,)), evaluated=False)
    assert not [note for note in report_notes(runs, group_by_seed(runs), [], 0) if "worse" in note or "100%" in note]
    for run, changed in zip(runs, ({"kl_at_init": 0.01}, {"recovered_share": 1.02}), strict=True):
        content = json.loads((run.directory / "result.json").read_text())
        content["result"] |= changed
        (run.directory / "result.json").write_text(json.dumps(content))
    notes = report_notes(runs, group_by_seed(runs), [], 0)
    assert "Training made gla worse: the KL from the teacher is higher than before." in notes
    assert "Recovered above 100%: xlstm, with a lower loss on this text than the teacher's." in notes
