"""Recipes: every choice that defines a student, as one validated tree read from YAML.

    recipe = load_recipe("smollm2-135m", ["stages.hidden.lr=1e-3"])

A study is a recipe in which any key may hold a list; `load_study` returns one recipe for each combination. All mistakes
of a recipe are one `UserError` with a line for each: place, key, value, expected value, nearest valid name.
"""

from subquad.config.load import load_recipe, load_study, schema
from subquad.config.run_names import different_keys, run_name
from subquad.config.schema import (
    Data,
    EndToEndStage,
    HiddenStage,
    Lora,
    MatrixStage,
    MixtureSource,
    Recipe,
    Stage,
    Stages,
    Student,
)

__all__ = [
    "Data",
    "EndToEndStage",
    "HiddenStage",
    "Lora",
    "MatrixStage",
    "MixtureSource",
    "Recipe",
    "Stage",
    "Stages",
    "Student",
    "different_keys",
    "load_recipe",
    "load_study",
    "run_name",
    "schema",
]
