"""Reads recipes and studies from YAML files and `--set` overrides."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from subquad.config import yaml_tree
from subquad.config.schema import Data, MixtureSource, Recipe, Section, Stages, Student, conflicts
from subquad.config.yaml_tree import KeyPath, Node, format_value
from subquad.registry import STAGES
from subquad.utils import UserError, nearest

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "dict_type": "a mapping of names to values",
}
"""What pydantic expected, by the type of its error."""
RECIPES = Path(__file__).parents[1] / "recipes"
"""The recipes of the package."""
MAX_MISTAKES = 100
"""Of one recipe, in messages."""
_SHORTHANDS = {"data": Data.SHORTHAND, "student": Student.SHORTHAND}


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

    path: a file, or the name of a recipe of the package, such as "small-budget".

    Raises:
        UserError: all mistakes of the file, the overrides and their values. Lists are mistakes too: see `load_study`.
    """
    return _load(path, overrides, single=True)[0]


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> list[Recipe]:
    """The recipes of a study, one for each combination of the lists in a YAML file, without duplicates.

    Any key may hold a list, as in `seed: [0, 1]`. A list of mappings, as `student: [{mixer: gla}, {mixer: softmax,
    copy_qkv: false}]`, names the combinations. The first list of the file changes slowest.

    Raises:
        UserError: all mistakes of all recipes, each once.
    """
    return list({recipe.digest(): recipe for recipe in _load(path, overrides, single=False)}.values())


def _load(path: str | Path, overrides: Iterable[str], single: bool) -> list[Recipe]:
    """The recipe of a file with overrides; unless `single`, all recipes of the product of its lists."""
    problems: list[str] = []
    tree = yaml_tree.read(_recipe_path(path), problems)
    for override in overrides:
        where = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        name, equals, text = override.partition("=")
        keys = tuple(key.strip() for key in name.split("."))
        if not equals or not all(keys):
            problems.append(f"{where}: expected key=value, such as stages.hidden.lr=1e-3")
            continue
        try:
            tree = tree.put(keys, yaml_tree.parse(text, where, problems, keys), _SHORTHANDS)
        except UserError as error:
            problems += error.problems
    recipes = []
    if not single and tree.combinations() > yaml_tree.MAX_COMBINATIONS:
        raise UserError(f"{path}: got more than {yaml_tree.MAX_COMBINATIONS:,} combinations; shorten its lists")
    for variant in [tree] if single else tree.product():
        try:
            recipes.append(Recipe.model_validate(variant.plain()))
        except ValidationError as error:
            problems += _describe(variant, error, "; `subquad study` runs all values of a list" if single else "")
    if problems:
        raise UserError(*sorted(dict.fromkeys(problems), key=_line))
    return recipes


def _recipe_path(given: str | Path) -> Path:
    """A file, or the recipe of the package with this name."""
    path, known = Path(given).expanduser(), {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.yaml"))}
    if path.is_file() or (not path.is_dir() and (path.suffix or len(path.parts) > 1)):
        return path
    if (name := str(given)) in known:
        return known[name]
    raise UserError(f"recipe: got {name!r}, no file and no recipe of the package{nearest(name, known)}")


def _line(problem: str) -> float:
    """The line of a problem in the file; overrides come after all lines, in their order."""
    place = re.match(r"(?!--set )[^:]*:(\d+): ", problem)
    return int(place[1]) if place else math.inf


def _describe(tree: Node, error: ValidationError, list_hint: str) -> Iterator[str]:
    """A line for each error of pydantic, and for each conflict between sections whose own values are valid."""
    valid, unknown, lines = tree, "", []
    for each in error.errors(include_url=False)[:MAX_MISTAKES]:
        path = tuple(str(key) for key in each["loc"])
        node, text = tree.find(path), _explain(path, each)
        valid = valid.put(path, Node(None, ""), {})
        unknown += text if each["type"] == "extra_forbidden" else ""
        hint = list_hint if isinstance(node.value, list) else ""
        lines.append((f"'{'.'.join(path)}'" if each["type"] == "missing" else None, f"{node.where}: {text}{hint}"))
    # A missing key that is the nearest name of an unknown one is misspelled: the line of the unknown one is enough.
    yield from (line for missing, line in lines if missing is None or missing not in unknown)
    for path, text in conflicts(valid.plain()):
        yield f"{tree.find(path).where}: {'.'.join(path)}: {text}"


def _explain(path: KeyPath, error: Any) -> str:
    """An error of pydantic as: key, value, expected value."""
    dotted, kind = ".".join(path), error["type"]
    if kind == "extra_forbidden":
        return f"unknown key {dotted!r}{_nearest_key(path)}"
    if kind == "missing":
        description = " ".join((_section_at(path[:-1]).model_fields[path[-1]].description or "").split())
        return f"{dotted} is missing; expected: {description.partition('. ')[0].removesuffix('.')}"
    if kind == "value_error":
        return f"{dotted}: {error['ctx']['error']}"
    if kind == "literal_error":
        names = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        expected = f"one of {', '.join(names)}{nearest(error['input'], names).partition('; expected')[0]}"
    elif kind == "model_type":
        expected = f"a mapping with the keys {', '.join(_keys(_section_at(path)))}"
    else:
        expected = _EXPECTED.get(kind) or f"a number {error['msg'].removeprefix('Input should be ')}"
    return f"{dotted}: got {format_value(error['input'])}, expected {expected}"


def _nearest_key(path: KeyPath) -> str:
    """The end of a message about an unknown key: the nearest sibling, else the same name elsewhere in the recipe."""
    sibling = nearest(path[-1], _keys(_section_at(path[:-1])))
    elsewhere = [key for key in _key_paths() if key[-1] == path[-1]]
    if "did you mean" in sibling or not elsewhere:
        return sibling.replace("did you mean '", "did you mean '" + "".join(f"{key}." for key in path[:-1]))
    depth = min(map(len, elsewhere))
    return f"; did you mean {' or '.join(repr('.'.join(key)) for key in elsewhere if len(key) == depth)}?"


def _section_at(path: KeyPath) -> type[Section]:
    """The section at a path. A key that is no field names a stage of another package or a source of a mixture."""
    section: type[Section] = Recipe
    for key in path:
        if key in section.model_fields:
            section = _subsection(section.model_fields[key]) or section
        else:
            section = STAGES[key].Options if section is Stages and key in STAGES else MixtureSource
    return section


def _keys(section: type[Section]) -> list[str]:
    return list(STAGES if section is Stages else section.model_fields)


def _subsection(field: FieldInfo) -> type[Section] | None:
    """The section of a field, which may be null; None for a plain value."""
    types = (field.annotation, *get_args(field.annotation))
    return next((each for each in types if isinstance(each, type) and issubclass(each, Section)), None)


def _key_paths(section: type[Section] = Recipe, path: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        yield (*path, name)
        if (inner := _subsection(field)) is not None:
            yield from _key_paths(inner, (*path, name))
