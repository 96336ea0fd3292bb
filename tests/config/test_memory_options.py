"""Options of stages that train memories beside windows, in recipes."""

import pytest

from subquad.config import load_recipe, load_study
from tests.helpers.recipe_files import BASE, mistake

WITH_MEMORY = "student={mixer: gla, mixer_kwargs: {window: 4}}"
MISTAKES = {
    "far_weight=0.5": "far_weight: got 0.5, expected a student with a memory",
    "window_dropout=[0.9, 0.5]": "window_dropout: got [0.9, 0.5], expected a student with a memory",
    "window_dropout=[0.9]": "window_dropout: got [0.9], expected two probabilities",
    "window_dropout=[0.5, 1.5]": "window_dropout: got [0.5, 1.5], expected two probabilities",
    "window_dropout=0.5": "window_dropout: got 0.5, expected two probabilities",
    "far_weight=-1": "far_weight: got -1, expected a number greater than or equal to 0",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_mistakes_in_recipes(write, option):
    assert f"stages.hidden.{MISTAKES[option]}" in mistake(write(BASE), [f"stages.hidden.{option}"])


def test_students_with_a_memory_are_recognized(write):
    key = "stages.hidden.far_weight"
    types = "student={layer_types: {default: attention, 1: {mixer: gla, window: 4}}}"
    for student in (WITH_MEMORY, types, "student={budget: 96, budget_memory: gla}"):
        assert load_recipe(write(BASE), [student, f"{key}=1"]).stages.hidden.far_weight == 1
    for student in ("student=gla", "student={layer_types: {default: {mixer: attention, window: 4}}}"):
        assert "expected a student with a memory" in mistake(write(BASE), [student, f"{key}=1"])
        assert load_recipe(write(BASE), [student, f"{key}=0"]).stages.hidden.far_weight == 0
    layers = "stages.hidden.target=decoder_layer"
    assert "expected target: mixer" in mistake(write(BASE), [WITH_MEMORY, layers, f"{key}=1"])
    study = load_study(write(BASE), [WITH_MEMORY, "stages.hidden.window_dropout=[[0.9, 0.5], null]"])
    assert [recipe.stages.hidden.window_dropout for recipe in study] == [[0.9, 0.5], None]
