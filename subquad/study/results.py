"""The results of a study as files that anything reads: `results.json` and, as long-form rows, `results.sqlite`.

What they hold is collected from the directories of the runs and from `evaluation`; docs/study.md has the schema.
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from subquad.analysis.saved_matrices import Beside, unpack
from subquad.config import Recipe
from subquad.distill.stage_cache import ORDER
from subquad.evaluate.jobs import MATRICES
from subquad.evaluate.results import Result
from subquad.study.runs import Run, find_runs, read, run_directories
from subquad.utils import UserError, run_info, write_json_atomic

RESULTS, DATABASE = "results.json", "results.sqlite"
TASK = "held-out text"
"""Task of the rows that every run measures of itself."""
RUN_COLUMNS = (
    "run",
    "digest",
    "state",
    "teacher",
    "mixer",
    "stages",
    "copy_qkv",
    "seed",
    "parameters",
    "tokens",
    "seconds",
    "device",
    "commit_hash",
    "versions",
    "recipe",
    "error",
)
ROW_FIELDS = tuple(field.name for field in fields(Result) if field.name != "model")
ROW_COLUMNS = ("run", "source", *ROW_FIELDS)


def stage_names(recipe: Recipe) -> list[str]:
    return [name for name in ORDER if getattr(recipe.stages, name) is not None]


def table_rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The row of results of each finished run, under its name."""
    return [{"run": run.name, **result["row"]} for run in runs if (result := run.result()) is not None]


def write_results(output: Path, runs: Sequence[Run]) -> None:
    """Writes both files anew, each whole or not at all."""
    states = [{"run": run.name, "state": run.state, "error": _short(run.error())} for run in runs]
    head = {**run_info(), "recipe": [run.recipe.model_dump(mode="json") for run in runs]}
    write_json_atomic(output / RESULTS, {**head, "runs": states, "rows": table_rows(runs)})
    write_database(output / DATABASE, runs, evaluation_rows(output))


def _short(error: dict[str, Any] | None) -> str | None:
    return None if error is None else f"{error['type']}: {error['message']}"


def write_database(path: Path, runs: Sequence[Run], rows: Sequence[Result]) -> None:
    """`runs`, one row a run, and `rows`, one a measured number."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with sqlite3.connect(part) as base:
        base.execute(f"CREATE TABLE runs ({', '.join(_typed(name) for name in RUN_COLUMNS)}, PRIMARY KEY (run))")
        base.execute(f"CREATE TABLE rows ({', '.join(_typed(name) for name in ROW_COLUMNS)})")
        base.executemany(_insert("runs", RUN_COLUMNS), [run_record(run) for run in runs])
        own = [record for run in runs for record in own_records(run)]
        strangers = run_directories(path.parent) - {run.name for run in runs}
        known = [row for row in rows if row.model not in strangers]
        others = [(row.model, "evaluation", *(getattr(row, name) for name in ROW_FIELDS)) for row in known]
        base.executemany(_insert("rows", ROW_COLUMNS), own + others)
    base.close()
    part.replace(path)


def _typed(name: str) -> str:
    whole = ("copy_qkv", "seed", "parameters", "tokens", "n", "length", "batch", "layer", "head")
    real = ("seconds", "value", "stderr", "low", "high", "depth")
    return f"{name} {'INTEGER' if name in whole else 'REAL' if name in real else 'TEXT'}"


def _insert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})"


def run_record(run: Run) -> tuple[Any, ...]:
    recipe, result = run.recipe, run.result() or {}
    row = result.get("row", {})
    values = {
        "run": run.name,
        "digest": recipe.digest(),
        "state": run.state,
        "teacher": recipe.teacher,
        "mixer": recipe.student.name,
        "stages": ",".join(stage_names(recipe)),
        "copy_qkv": int(recipe.student.copy_qkv),
        "seed": recipe.seed,
        "parameters": row.get("parameters"),
        "tokens": row.get("tokens"),
        "seconds": row.get("seconds"),
        "device": result.get("device"),
        "commit_hash": result.get("commit"),
        "versions": json.dumps(result.get("versions")) if result else None,
        "recipe": json.dumps(recipe.model_dump(mode="json")),
        "error": _short(run.error()),
    }
    return tuple(values[name] for name in RUN_COLUMNS)


def own_records(run: Run) -> list[tuple[Any, ...]]:
    """What a finished run measured of itself, in long form."""
    row = (run.result() or {}).get("row", {})
    about = {"task": TASK, "teacher": run.recipe.teacher}
    found = []
    for metric, value in row.items():
        if metric not in RUN_COLUMNS and isinstance(value, int | float) and not isinstance(value, bool):
            record = {**about, "metric": metric, "value": float(value)}
            found.append((run.name, "run", *(record.get(name) for name in ROW_FIELDS)))
    return found


def evaluation_rows(output: Path) -> list[Result]:
    """Of all evaluations beside the runs; a teacher that was measured in several stands there once."""
    found: dict[tuple[Any, ...], Result] = {}
    for path in sorted(output.glob(f"evaluation*/{RESULTS}")):
        for values in (read(path) or {}).get("rows", []):
            row = Result.from_dict(values)
            found.setdefault(row.subject, row)
    return list(found.values())


def kept_matrices(output: Path) -> dict[str, Beside]:
    """By the name of its run, matrices of a student beside its teacher's."""
    found = {}
    for path in sorted(output.glob(f"evaluation*/{MATRICES}/*.json")):
        kept = read(path)
        if kept is not None:
            found[path.stem] = unpack(kept["heads"])
    return found


def read_study(output: Path) -> list[Run]:
    """The runs of the study in `output`: those of the recipe it was last run with.

    Raises:
        UserError: there is no study.
    """
    written = read(output / RESULTS)
    if written is None or "rows" not in written:
        raise UserError(f"{str(output)!r} holds no results.json; expected the directory of a study (subquad study)")
    try:
        recipes = [Recipe.model_validate(recipe) for recipe in written["recipe"]]
    except ValueError:
        raise UserError(f"{output / RESULTS} is of another version of Subquad; run `subquad study` here once") from None
    return find_runs(recipes, output)
