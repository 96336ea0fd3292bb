"""The table of recipe keys in docs/distillation.md against the recipe's schema."""

import re
from pathlib import Path

import pytest
import yaml

from subquad.config import Recipe, Stage
from subquad.distill.recipe_stages import STAGE_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "distillation.md"
REQUIRED = {"tokens": 1, "lr": 1.0}


@pytest.fixture(scope="module")
def table():
    """The default of each documented key; None for a key without one."""
    section = re.split(r"\n###? ", PAGE.read_text().partition("\n## Recipe\n")[2])[0]
    rows = re.findall(r"^\| `([\w.*]+)` \| \w[\w ]*(?:, `([^`]+)`)? \|", section, re.MULTILINE)
    return {key: default or None for key, default in rows}


def defaults():
    """Every key of a recipe with its default, those of all stages as `stages.*`."""
    tree = {"teacher": "nano", "data": {"source": "x"}, "stages": dict.fromkeys(STAGE_NAMES, REQUIRED)}
    flat = {}

    def walk(prefix, values):
        for name, value in values.items():
            key = f"{prefix}{name}"
            if key in ("data", "student", "stages", "checkpoint", "evaluation") or prefix == "stages.":
                walk(f"{key}.", value)
            elif prefix.startswith("stages.") and name in Stage.model_fields:
                flat[f"stages.*.{name}"] = value
            else:
                flat[key] = value

    walk("", Recipe.model_validate(tree).model_dump(mode="json"))
    return flat


def test_every_recipe_key_is_documented(table):
    assert table.keys() == defaults().keys()


def test_documented_defaults_are_those_of_the_schema(table):
    required = {"teacher", "data.source", "stages.*.tokens", "stages.*.lr"}
    assert {key for key, default in table.items() if default is None} == required
    expected = {key: value for key, value in defaults().items() if key not in {*required, "stages.*.param_groups"}}
    assert {key: yaml.safe_load(table[key]) for key in expected} == expected
