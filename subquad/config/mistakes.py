"""Describes the mistakes that pydantic finds in a recipe, one line each."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic.fields import FieldInfo

from subquad.config.schema import MixtureSource, Recipe, Stages, conflicts
from subquad.config.section import KeyPath, Section, format_value
from subquad.config.yaml_tree import INVALID, Node
from subquad.registry import STAGES
from subquad.utils import nearest

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


def describe(tree: Node, errors: Sequence[Any]) -> list[str]:
    """A line for each error of pydantic, and for each conflict between sections whose own values are valid."""
    wrong = [(tuple(str(key) for key in error["loc"]), error) for error in errors]
    reported = [(path, error, _explain(path, error)) for path, error in wrong if error["input"] is not INVALID]
    unknown = [text for _, error, text in reported if error["type"] == "extra_forbidden"]

    def is_misspelled(path: KeyPath, error: Any) -> bool:
        """Whether a missing key is the nearest name of an unknown one, whose line is enough."""
        return error["type"] == "missing" and any(f"'{'.'.join(path)}'" in text for text in unknown)

    lines = [(path, text) for path, error, text in reported if not is_misspelled(path, error)]
    found = conflicts(_without(tree.plain(), [path for path, _ in wrong]))
    lines += [(path, f"{'.'.join(path)}: {text}") for path, text in found]
    return [f"{tree.origin(path)}: {text}" for path, text in lines]


def _without(recipe: dict[str, Any], paths: Sequence[KeyPath]) -> dict[str, Any]:
    """`recipe` with None at `paths`."""
    for path in paths:
        inner: Any = recipe
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[path[-1]] = None
    return recipe


def _explain(path: KeyPath, error: Any) -> str:
    """An error of pydantic as: key, value, expected value."""
    dotted, kind, context = ".".join(path), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {dotted!r}{_nearest_key(path)}"
    if kind == "missing":
        section = section_at(path[:-1])
        return f"{dotted} is missing; expected: {_first_sentence(section.model_fields[path[-1]])}"
    if kind == "value_error":
        return f"{dotted}: {context['error']}"
    got = f"{dotted}: got {format_value(error['input'])}, expected"
    if kind == "literal_error":
        names = re.findall(r"'([^']+)'", context["expected"])
        return f"{got} one of {', '.join(names)}{nearest(error['input'], names).partition('; expected')[0]}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{got} a mapping with the keys {', '.join(keys(section_at(path)))}"
    if kind in _EXPECTED:
        return f"{got} {_EXPECTED[kind]}"
    return f"{got} a number {error['msg'].removeprefix('Input should be ')}"


def _first_sentence(field: FieldInfo) -> str:
    return re.split(r"\.(?:\s|$)", " ".join((field.description or "").split()))[0]


def section_at(path: Sequence[str]) -> type[Section]:
    """The section at a path. A key that is no field names a source of a mixture."""
    section: type[Section] = Recipe
    for key in path:
        field = section.model_fields.get(key)
        if field is not None:
            section = subsection(field) or section
        else:
            section = STAGES[key].Options if section is Stages and key in STAGES else MixtureSource
    return section


def keys(section: type[Section]) -> list[str]:
    return list(STAGES if section is Stages else section.model_fields)


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section of a field, which may be null; None for a plain value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def dotted_keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if (inner := subsection(field)) is not None:
            yield from dotted_keys(inner, f"{prefix}{name}.")


def _nearest_key(path: KeyPath) -> str:
    """The end of a message about an unknown key: the same name elsewhere in the recipe, else the nearest sibling."""
    prefix = "".join(f"{key}." for key in path[:-1])
    sibling = nearest(path[-1], keys(section_at(path[:-1])))
    elsewhere = [key for key in dotted_keys() if key.rpartition(".")[2] == path[-1]]
    if "did you mean" not in sibling and elsewhere:
        depth = min(key.count(".") for key in elsewhere)
        return f"; did you mean {' or '.join(repr(key) for key in elsewhere if key.count('.') == depth)}?"
    return sibling.replace("did you mean '", f"did you mean '{prefix}")
