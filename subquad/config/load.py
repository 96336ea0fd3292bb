"""Reads recipes and studies from YAML files and `--set` overrides."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from subquad.config import yaml_tree
from subquad.config.mistakes import describe, subsection
from subquad.config.schema import Data, MixtureSource, Recipe, Student
from subquad.config.yaml_tree import Node
from subquad.registry import STAGES
from subquad.utils import UserError


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors. As in a study, any value may be a list."""
    tree = Recipe.model_json_schema()
    stages = tree["$defs"]["Stages"]
    stages["additionalProperties"] = False
    for name in [name for name in STAGES if name not in stages["properties"]]:
        stages["properties"][name] = own = STAGES[name].Options.model_json_schema()
        tree["$defs"] |= own.pop("$defs", {})
    for section in (tree, *tree["$defs"].values()):
        for name, value in section.get("properties", {}).items():
            kept = {key: value.pop(key) for key in ("description", "default", "title") if key in value}
            section["properties"][name] = {**kept, "anyOf": [value, {"type": "array", "items": value}]}
    for section, bare in ((Data, "string"), (Student, "string"), (MixtureSource, "number")):
        tree["$defs"][section.__name__] = {"anyOf": [tree["$defs"][section.__name__], {"type": bare}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "title": "Subquad recipe"}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, changed by `overrides` such as "stages.hidden.lr=1e-3".

    Raises:
        UserError: all mistakes of the file, the overrides and their values. Lists are mistakes too: see `load_study`.
    """
    tree, problems = _load(path, overrides)
    problems += [
        f"{node.where}: {'.'.join(keys)}: got a list, expected one value; `subquad study` runs all values of a list"
        for keys, node in tree.lists()
    ]
    return _validate(tree, problems)[0]


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> list[Recipe]:
    """The recipes of a study, one for each combination of the lists in a YAML file, without duplicates.

    Any key may hold a list, as in `seed: [0, 1]`. A list of mappings, as `student: [{mixer: gla}, {mixer: softmax,
    copy_qkv: false}]`, names the combinations. The first list of the file changes slowest.

    Raises:
        UserError: all mistakes of all recipes, each once.
    """
    variants = _validate(*_load(path, overrides))
    return list({recipe.digest(): recipe for recipe in variants}.values())


def _load(path: str | Path, overrides: Iterable[str]) -> tuple[Node, list[str]]:
    """The tree of a file and its overrides, and the problems found so far."""
    problems: list[str] = []
    bare = {key: inner.SHORTHAND for key, field in Recipe.model_fields.items() if (inner := subsection(field))}
    shorthands = {key: name for key, name in bare.items() if name is not None}
    tree = yaml_tree.read(Path(path).expanduser(), problems).expand(shorthands)
    for override in overrides:
        where = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        name, equals, text = override.partition("=")
        keys = tuple(key.strip() for key in name.split("."))
        if not equals or not all(keys):
            problems.append(f"{where}: expected key=value, such as stages.hidden.lr=1e-3")
            continue
        try:
            node = yaml_tree.parse(text, lambda _line, where=where: where, problems, keys)  # type: ignore[misc]
        except UserError as error:
            problems += error.problems
        else:
            tree = tree.put(keys, node).expand(shorthands)
    return tree, problems


def _validate(tree: Node, problems: list[str]) -> list[Recipe]:
    """Every recipe of the product of the tree's lists. Raises UserError with all problems, each once."""
    recipes = []
    for variant in tree.product(problems):
        try:
            recipes.append(Recipe.model_validate(variant.plain()))
        except ValidationError as error:
            problems += describe(variant, error.errors(include_url=False))
    if problems:
        raise UserError(*sorted(dict.fromkeys(problems), key=_line))
    return recipes


def _line(problem: str) -> float:
    """The line of a problem in the file; overrides come after all lines, in their order."""
    place = re.match(r"(?!--set )[^:]*:(\d+): ", problem)
    return int(place[1]) if place else math.inf
