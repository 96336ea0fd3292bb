"""The recipe: everything that decides what a student becomes, as one typed, validated tree; YAML in and out.

    recipe = load_recipe("recipes/smollm2-135m.yaml", ["stages.hidden.lr=1e-3"])

A study is a recipe in which any key holds a list: `load_study` gives the product. Nothing here loads a model or reads a
corpus; whatever is wrong with a recipe is a `UserError` of one line that names file, line and key.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from subquad.config import yaml_tree
from subquad.config.schema import (
    EXPECTED,
    Checkpoint,
    Data,
    EndToEnd,
    Evaluation,
    Hidden,
    Lora,
    Matrix,
    MixtureSource,
    ParamGroup,
    ParamGroups,
    Recipe,
    Section,
    Stage,
    Stages,
    Student,
    shown,
)
from subquad.config.yaml_tree import Node
from subquad.utils import UserError, nearest

__all__ = [
    "Checkpoint",
    "Data",
    "EndToEnd",
    "Evaluation",
    "Hidden",
    "Lora",
    "Matrix",
    "MixtureSource",
    "ParamGroup",
    "ParamGroups",
    "Recipe",
    "Section",
    "Stage",
    "Stages",
    "Student",
    "load_recipe",
    "load_study",
    "run_name",
    "schema",
]


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, from which editors complete and check: any value may be a list, as in a study."""
    tree = Recipe.model_json_schema()
    for section in (tree, *tree["$defs"].values()):
        for name, value in section.get("properties", {}).items():
            kept = {key: value.pop(key) for key in ("description", "default", "title") if key in value}
            section["properties"][name] = {**kept, "anyOf": [value, {"type": "array", "items": value}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "title": "Subquad recipe"}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `overrides` like "stages.hidden.lr=1e-3" put over it.

    Raises:
        UserError: whatever is wrong with file, overrides or values; also a list, which makes it a study.
    """
    tree = _load(path, overrides)
    listed = tree.first_list()
    if listed is not None:
        raise UserError(
            f"{tree.origin(listed)}: {'.'.join(listed)} is a list, which makes this a study of several students; "
            f"run it with `subquad study`, or give one value"
        )
    return _validate(tree)


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> list[Recipe]:
    """One recipe for each combination of the lists in a YAML file, in order, each once.

    Any key may hold a list: `seed: [0, 1]`, or `student:` a list of mappings where not every combination is wanted.
    """
    variants = [_validate(tree) for tree in _load(path, overrides).product()]
    return list({recipe.digest(): recipe for recipe in variants}.values())


def run_name(recipe: Recipe, recipes: Sequence[Recipe]) -> str:
    """The directory of a student within a study: its mixer, and behind it the keys in which the study's students of
    this mixer differ, as in `gla-copy_qkv=false-seed=1`; what a stage or the options hold only where that is needed."""
    mine = recipe.model_dump(mode="json")
    variants = [r.model_dump(mode="json") for r in recipes if r.student.name == recipe.student.name]
    short = _shallow(mine, variants)
    rivals = [variant for variant in variants if _shallow(variant, variants) == short]
    parts = [recipe.student.name]
    for path, value in [*short, *(found for found in _differences(mine, rivals) if len(found[0]) > 2)]:
        text = json.dumps(value) if not isinstance(value, str) else value
        parts.append(f"{'.'.join(path[1:] or path)}={text}")
    name = "-".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", name)[:100]
    return name if safe == name else f"{safe}-{recipe.digest()[:8]}"


def _shallow(mine: Any, variants: list[Any]) -> list[tuple[tuple[str, ...], Any]]:
    return [found for found in _differences(mine, variants) if len(found[0]) <= 2]


def _differences(mine: Any, all_values: list[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths at which `all_values` differ, with the value of `mine` there; "on" for a stage that others skip."""
    if all(value == mine for value in all_values):
        return
    if not isinstance(mine, dict):
        yield path, "off" if any(isinstance(value, dict) for value in all_values) else mine
        return
    mappings = [value for value in all_values if isinstance(value, dict)]
    if len(mappings) < len(all_values):
        yield path, "on"
    for key, value in mine.items():
        yield from _differences(value, [other.get(key) for other in mappings], (*path, key))


def _load(path: str | Path, overrides: Iterable[str]) -> Node:
    tree = yaml_tree.read(Path(path).expanduser())
    for override in overrides:
        where = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        name, equals, text = override.partition("=")
        keys = tuple(key.strip() for key in name.split("."))
        if not equals or not all(keys):
            raise UserError(f"{where}: expected key=value, such as stages.hidden.lr=1e-3")
        tree = tree.put(keys, yaml_tree.parse(text, lambda _line, where=where: where, keys))  # type: ignore[misc]
    return tree


def _validate(tree: Node) -> Recipe:
    try:
        return Recipe.model_validate(tree.plain())
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # A misspelt key is also a missing one: what was written says more than what was not.
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    path = tuple(str(key) for key in problem["loc"])
    raise UserError(f"{tree.origin(path)}: {_explain(path, problem)}")


def _explain(path: tuple[str, ...], problem: Any) -> str:
    """One pydantic error in words: the key, what came, what was expected."""
    dotted, kind, context = ".".join(path), problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {dotted!r}{_nearest_key(path)}"
    if kind == "missing":
        section = _section(path[:-1])
        return f"{dotted} is missing; expected: {_first_sentence(section.model_fields[path[-1]])}"
    if kind == "value_error":
        return f"{dotted}: {context['error']}" if dotted else str(context["error"])
    got = f"{dotted}: got {shown(problem['input'])}, expected"
    if kind == "literal_error":
        names = re.findall(r"'([^']+)'", context["expected"])
        return f"{got} one of {', '.join(names)}{nearest(problem['input'], names).partition('; expected')[0]}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{got} a mapping with the keys {', '.join(_section(path).model_fields)}"
    if kind in EXPECTED:
        return f"{got} {EXPECTED[kind]}"
    return f"{got} a number {problem['msg'].removeprefix('Input should be ')}"


def _first_sentence(field: FieldInfo) -> str:
    return re.split(r"\.(?:\s|$)", " ".join((field.description or "").split()))[0]


def _section(path: Sequence[str]) -> type[Section]:
    """The part of the recipe at a path."""
    section: type[Section] = Recipe
    for key in path:
        section = _subsection(section.model_fields[key]) or section
    return section


def _subsection(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds (also where it may be null); None for a plain value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if (inner := _subsection(field)) is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _nearest_key(path: tuple[str, ...]) -> str:
    """The key that was meant: one with that name elsewhere in the recipe, else the nearest beside it."""
    prefix = "".join(f"{key}." for key in path[:-1])
    siblings = list(_section(path[:-1]).model_fields)
    beside = nearest(path[-1], siblings)
    elsewhere = [key for key in _keys() if key.rpartition(".")[2] == path[-1]]
    if "did you mean" not in beside and elsewhere:
        depth = min(key.count(".") for key in elsewhere)
        return f"; did you mean {' or '.join(repr(key) for key in elsewhere if key.count('.') == depth)}?"
    return beside.replace("did you mean '", f"did you mean '{prefix}")
