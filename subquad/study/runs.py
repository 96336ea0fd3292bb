"""Where the runs of a study lie: a run is found by the recipe in its directory, whatever that is called.

Reads directories; runs nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from subquad.config import Recipe, load_recipe, run_name
from subquad.utils import UserError, write_json_atomic, write_text_atomic

State = Literal["finished", "failed", "unfinished", "new"]
RECIPE, RESULT, ERROR = "recipe.yaml", "result.json", "error.json"


@dataclass(frozen=True)
class Run:
    """A recipe and its directory, which may not exist yet."""

    recipe: Recipe
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def state(self) -> State:
        """`failed` until it is tried again; `unfinished` where it was cut off, or is running."""
        if (self.directory / RESULT).exists():
            return "finished"
        if (self.directory / ERROR).exists():
            return "failed"
        return "unfinished" if (self.directory / RECIPE).exists() else "new"

    def result(self) -> dict[str, Any] | None:
        """What stands in `result.json`: the row, and the versions, commit and device behind it."""
        return read(self.directory / RESULT)

    def error(self) -> dict[str, Any] | None:
        """`type`, `message` and `traceback` of a failed run."""
        return None if self.state == "finished" else read(self.directory / ERROR)

    def fail(self, kind: str, message: str, traceback: str = "") -> None:
        """Leaves why the run failed, in its directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / RECIPE).exists():
            write_text_atomic(self.directory / RECIPE, self.recipe.to_yaml())
        write_json_atomic(self.directory / ERROR, {"type": kind, "message": message, "traceback": traceback})


def read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def find_runs(recipes: Sequence[Recipe], output: Path) -> list[Run]:
    """The run of each recipe below `output`.

    One that has a directory there keeps it, whatever its name. A new one gets `run_name`, with eight digits of its
    recipe's digest behind it where that name is taken.

    Raises:
        UserError: `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output {str(output)!r} is a file; expected a directory, new or of a study")
    known: dict[str, Path] = {}
    for written in sorted(output.glob(f"*/{RECIPE}"), key=lambda path: (not (path.parent / RESULT).exists(), path)):
        known.setdefault(written.read_text(), written.parent)
    runs, taken = [], {path.name for path in output.glob("*") if path.is_file() or any(path.iterdir())}
    for recipe in recipes:
        place = known.get(recipe.to_yaml())
        if place is None:
            name = run_name(recipe, recipes)
            place = output / (f"{name}-{recipe.digest()[:8]}" if name in taken else name)
            taken.add(place.name)
        runs.append(Run(recipe, place))
    return runs


def run_directories(output: Path) -> set[str]:
    """Names of all directories of runs, also of recipes that the study no longer has."""
    return {path.parent.name for path in output.glob(f"*/{RECIPE}")}


def all_runs(output: Path) -> list[Run]:
    """The runs of those directories."""
    found = []
    for name in sorted(run_directories(output)):
        try:
            found.append(Run(load_recipe(output / name / RECIPE), output / name))
        except UserError:  # of another version
            continue
    return found
