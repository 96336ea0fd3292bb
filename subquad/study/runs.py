"""The runs of a study as directories. A run is identified by the `recipe.yaml` in its directory, not by its name.

Reads directories; trains nothing.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from subquad.config import Recipe, load_recipe, run_name
from subquad.utils import UserError, write_json_atomic, write_text_atomic

State = Literal["finished", "failed", "unfinished", "new"]
RECIPE, RESULT, ERROR, METRICS = "recipe.yaml", "result.json", "error.json", "metrics.jsonl"


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
        """`failed` until the run is retried; `unfinished` if it was interrupted or is running."""
        if (self.directory / RESULT).exists():
            return "finished"
        if (self.directory / ERROR).exists():
            return "failed"
        return "unfinished" if (self.directory / RECIPE).exists() else "new"

    def info(self) -> dict[str, Any] | None:
        """The content of `result.json`: the result with versions, commit and device; None unless finished."""
        return read_json(self.directory / RESULT)

    def result(self) -> dict[str, Any] | None:
        """The metrics of a finished run by name; None unless finished."""
        info = self.info()
        return None if info is None else info["result"]

    def error(self) -> dict[str, Any] | None:
        """`type`, `message` and `traceback` of a failed run."""
        return None if self.state == "finished" else read_json(self.directory / ERROR)

    def error_text(self) -> str | None:
        """The type and the message of a failed run."""
        error = self.error()
        return None if error is None else f"{error['type']}: {error['message']}"

    def error_line(self) -> str:
        """The type and the first line of the message of a failed run."""
        return (self.error_text() or "").partition("\n")[0]

    def start(self) -> None:
        """Makes the state `unfinished`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / RECIPE).exists():
            write_text_atomic(self.directory / RECIPE, self.recipe.to_yaml())
        (self.directory / ERROR).unlink(missing_ok=True)

    def fail(self, error_type: str, message: str, traceback: str = "") -> None:
        """Writes `error.json` to the run's directory."""
        self.start()
        write_json_atomic(self.directory / ERROR, {"type": error_type, "message": message, "traceback": traceback})


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is missing or invalid."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def find_runs(recipes: Sequence[Recipe], output: Path) -> list[Run]:
    """Returns the run of each recipe below `output`.

    A recipe that already has a directory keeps it, whatever its name. A new run is named by `run_name`; if that name is
    taken, eight digits of the recipe's digest are appended.

    Raises:
        UserError: `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output: got the file {str(output)!r}, expected a new directory or that of a study")
    known: dict[str, Path] = {}
    for run in sorted(all_runs(output), key=lambda run: (run.state != "finished", run.name)):
        known.setdefault(run.recipe.digest(), run.directory)
    runs, taken = [], {path.name for path in output.glob("*") if path.is_file() or any(path.iterdir())}
    for recipe in recipes:
        directory = known.get(recipe.digest())
        if directory is None:
            name = run_name(recipe, recipes)
            directory = output / (f"{name}-{recipe.digest()[:8]}" if name in taken else name)
            taken.add(directory.name)
        runs.append(Run(recipe, directory))
    return runs


def all_runs(output: Path) -> list[Run]:
    """The runs of all run directories below `output` whose recipe this version can read."""
    runs = []
    for path in sorted(output.glob(f"*/{RECIPE}")):
        with contextlib.suppress(UserError):
            runs.append(Run(load_recipe(path), path.parent))
    return runs


def unrelated_runs(output: Path, runs: Sequence[Run]) -> set[str]:
    """Names of run directories below `output` that do not belong to `runs`, of recipes that the study had before."""
    return {path.parent.name for path in output.glob(f"*/{RECIPE}")} - {run.name for run in runs}
