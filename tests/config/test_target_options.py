"""Sparse targets of stage 3 in recipes: what they exclude."""

import pytest

from subquad.config import load_recipe
from tests.helpers.recipe_files import BASE, mistake

KEY = "stages.end_to_end.teacher_targets"
STAGE = "stages.end_to_end={tokens: 512, lr: 1e-3, teacher_targets: sampled}"
MISTAKES = {
    "temperature=2": f"{KEY}: got sampled with temperature: 2.0, expected temperature: 1",
    "divergence=reverse": f"{KEY}: got sampled with divergence: 'reverse', expected divergence: forward",
    "data=teacher_generated": f"{KEY}: got sampled with data: 'teacher_generated', expected data: corpus",
    "kl_weight=0": f"{KEY}: got sampled with kl_weight: 0, expected a kl_weight above 0",
    "target_size=0": "stages.end_to_end.target_size: got 0",
    "target_size=32769": "stages.end_to_end.target_size: got 32769",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_mistakes_in_recipes(write, option):
    assert MISTAKES[option] in mistake(write(BASE), [STAGE, f"stages.end_to_end.{option}"])


def test_streamed_text_has_no_targets(write):
    assert "data.shuffle_buffer" in mistake(write(BASE), [STAGE, "data.shuffle_buffer=8"])
    assert load_recipe(write(BASE), [STAGE, f"{KEY}=full", "data.shuffle_buffer=8"])


def test_defaults_change_no_run(write):
    recipe = load_recipe(write(BASE), [STAGE])
    assert (recipe.stages.end_to_end.teacher_targets, recipe.stages.end_to_end.target_size) == ("sampled", 64)
    full = load_recipe(write(BASE), [STAGE, f"{KEY}=full"])
    assert "teacher_targets" not in full.without_defaults()["stages"]["end_to_end"]
    assert load_recipe(write(BASE), [STAGE, f"{KEY}=full", "stages.end_to_end.temperature=2"])
