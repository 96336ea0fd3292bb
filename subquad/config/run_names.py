"""Names of the runs of a study."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from subquad.config.schema import Recipe
from subquad.config.yaml_tree import KeyPath


def run_name(recipe: Recipe, recipes: Sequence[Recipe]) -> str:
    """The name of a run and of its directory: the mixer, then the keys in which the study's runs of this mixer differ,
    as in `gla-copy_qkv=false-seed=1`. Keys within a stage or within mixer_kwargs are added only if needed."""
    mine = recipe.model_dump(mode="json")
    variants = [r.model_dump(mode="json") for r in recipes if r.student.name == recipe.student.name]

    def shallow(one: Any) -> list[tuple[KeyPath, Any]]:
        return [found for found in _differences(one, variants) if len(found[0]) <= 2]

    rivals = [variant for variant in variants if shallow(variant) == shallow(mine)]
    parts = [recipe.student.name]
    for path, value in [*shallow(mine), *(found for found in _differences(mine, rivals) if len(found[0]) > 2)]:
        text = json.dumps(value) if not isinstance(value, str) else value
        parts.append(f"{'.'.join(path[1:] or path)}={text}")
    name = "-".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", name)[:100]
    return name if safe == name else f"{safe}-{recipe.digest()[:8]}"


def different_keys(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ between two recipes, and the values in `one` and `other`: "on" or "off" for a
    section that only one has, "not set" for a key of a mixer's options that only the other has."""
    a, b = (recipe.model_dump(mode="json") for recipe in (one, other))
    mine, others = dict(_differences(a, [b])), dict(_differences(b, [a]))
    return {".".join(path): (mine.get(path, "not set"), others.get(path, "not set")) for path in {**mine, **others}}


def _differences(mine: Any, all_values: list[Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Paths at which `all_values` differ, with the value of `mine`; "on" for a stage that others skip, else "off"."""
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
