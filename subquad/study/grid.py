"""A study: every student of a recipe with lists, one after the other in one process, and their rows in one file."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from subquad.config import Recipe, run_name
from subquad.data import check_corpus
from subquad.distill.pipeline import distill, examine
from subquad.errors import UserError
from subquad.modeling.teachers import Loaded, check_reference, load_teacher
from subquad.papers import versions, write_json

logger = logging.getLogger(__name__)


def run_study(
    recipes: Sequence[Recipe],
    output: str | os.PathLike,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Distils every recipe into a directory of its own below `output`, skipping finished ones and resuming others.

    After each student `results.json` is written anew: a head (`versions`, `device`, `recipe`) and `rows`, one a
    student.
    `on_row` is called with each row as soon as it is there.

    Raises:
        UserError: a directory below `output` holds the run of another recipe; told before anything is loaded.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {str(output)!r} is a file; expected a directory")
    places = [output / run_name(recipe, recipes) for recipe in recipes]
    finished = [examine(recipe, place) for recipe, place in zip(recipes, places, strict=True)]
    for recipe in recipes:
        check_reference(recipe.teacher)
        check_corpus(recipe.corpus)
    loaded: dict[str, Loaded] = {}
    rows: list[dict[str, Any]] = []
    for recipe, place, known in zip(recipes, places, finished, strict=True):
        if known is None and recipe.teacher not in loaded:
            loaded[recipe.teacher] = load_teacher(recipe.teacher)
        row = known or distill(recipe, place, loaded[recipe.teacher])
        rows.append({"run": place.name, **row})
        on_row(rows[-1])
        head = {**versions(), "recipe": [r.model_dump(mode="json") for r in recipes]}
        write_json(output / "results.json", {**head, "rows": rows})
    return rows
