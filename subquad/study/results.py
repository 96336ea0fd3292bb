"""Collects the results of a study and writes `results.json` and `results.sqlite` (schema: docs/study.md)."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from subquad.analysis.mixing_matrices import MatrixPairs, unpack_pairs
from subquad.analysis.suites import MATRICES
from subquad.config import Recipe
from subquad.distill.recipe_stages import recipe_stages
from subquad.evaluate.results import Result
from subquad.study.runs import Run, find_runs, read_json, unrelated_runs
from subquad.utils import UserError, run_info, write_json_atomic

RESULTS, DATABASE = "results.json", "results.sqlite"
TASK = "validation text"
"""Task of the results that every run measures at its end."""
RUN_COLUMNS = (
    "run", "digest", "state", "teacher", "mixer", "stages", "copy_qkv", "seed", "parameters", "tokens", "seconds",
    "device", "commit_hash", "versions", "recipe", "error",
)  # fmt: skip
RESULT_FIELDS = tuple(field.name for field in fields(Result) if field.name != "model")
RESULT_COLUMNS = ("run", "source", *RESULT_FIELDS)
INTEGER_COLUMNS = ("copy_qkv", "seed", "parameters", "tokens", "n", "length", "batch", "layer", "head")
REAL_COLUMNS = ("seconds", "value", "stderr", "low", "high", "depth")


def run_results(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The result of each finished run, with its name under `run`."""
    return [{"run": run.name, **result} for run in runs if (result := run.result()) is not None]


# ---------------------------------------------------------------------- writing


def write_results(output: Path, runs: Sequence[Run]) -> None:
    """Writes both files, each atomically."""
    states = [{"run": run.name, "state": run.state, "error": full_error(run)} for run in runs]
    recipes = [run.recipe.model_dump(mode="json") for run in runs]
    content = {**run_info(), "recipes": recipes, "runs": states, "results": run_results(runs)}
    write_json_atomic(output / RESULTS, content)
    write_database(output / DATABASE, runs, evaluation_results(output))


def full_error(run: Run) -> str | None:
    """The type and the complete message of a failed run."""
    error = run.error()
    return None if error is None else f"{error['type']}: {error['message']}"


def write_database(path: Path, runs: Sequence[Run], evaluated: Sequence[Result]) -> None:
    """Writes the tables `runs`, one row for each run, and `results`, one row for each measured number."""
    unrelated = unrelated_runs(path.parent, runs)
    records = [record for run in runs for record in result_records(run)]
    for result in evaluated:
        if result.model not in unrelated:
            records.append((result.model, "evaluation", *(getattr(result, name) for name in RESULT_FIELDS)))
    partial = path.with_name(path.name + ".part")
    partial.unlink(missing_ok=True)
    with sqlite3.connect(partial) as database:
        database.execute(f"CREATE TABLE runs ({_declare(RUN_COLUMNS)}, PRIMARY KEY (run))")
        database.execute(f"CREATE TABLE results ({_declare(RESULT_COLUMNS)})")
        database.executemany(_insert("runs", RUN_COLUMNS), [run_record(run) for run in runs])
        database.executemany(_insert("results", RESULT_COLUMNS), records)
    database.close()
    partial.replace(path)


def _declare(columns: Sequence[str]) -> str:
    types = dict.fromkeys(INTEGER_COLUMNS, "INTEGER") | dict.fromkeys(REAL_COLUMNS, "REAL")
    return ", ".join(f"{name} {types.get(name, 'TEXT')}" for name in columns)


def _insert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})"


def run_record(run: Run) -> tuple[Any, ...]:
    """The row of a run in the table `runs`."""
    recipe, info, result = run.recipe, run.info() or {}, run.result() or {}
    values = {
        "run": run.name,
        "digest": recipe.digest(),
        "state": run.state,
        "teacher": recipe.teacher,
        "mixer": recipe.student.name,
        "stages": ",".join(recipe_stages(recipe)),
        "copy_qkv": int(recipe.student.copy_qkv),
        "seed": recipe.seed,
        "parameters": result.get("parameters"),
        "tokens": result.get("tokens"),
        "seconds": result.get("seconds"),
        "device": info.get("device"),
        "commit_hash": info.get("commit"),
        "versions": json.dumps(info.get("versions")) if info else None,
        "recipe": json.dumps(recipe.model_dump(mode="json")),
        "error": full_error(run),
    }
    return tuple(values[name] for name in RUN_COLUMNS)


def result_records(run: Run) -> list[tuple[Any, ...]]:
    """The rows of the table `results` that a finished run measured itself."""
    records = []
    for metric, value in (run.result() or {}).items():
        if metric not in RUN_COLUMNS and isinstance(value, int | float) and not isinstance(value, bool):
            values = {"task": TASK, "teacher": run.recipe.teacher, "metric": metric, "value": float(value)}
            records.append((run.name, "run", *(values.get(name) for name in RESULT_FIELDS)))
    return records


# ---------------------------------------------------------------------- reading


def evaluation_results(output: Path) -> list[Result]:
    """The results of all evaluations of the study. A teacher that was evaluated several times appears once."""
    results: dict[tuple[Any, ...], Result] = {}
    for path in sorted(output.glob(f"evaluation*/{RESULTS}")):
        for values in (read_json(path) or {}).get("results", []):
            result = Result.from_dict(values)
            results.setdefault(result.key, result)
    return list(results.values())


def saved_matrices(output: Path) -> dict[str, MatrixPairs]:
    """The saved mixing matrices of student and teacher, by the name of the run."""
    matrices = {}
    for path in sorted(output.glob(f"evaluation*/{MATRICES}/*.json")):
        content = read_json(path)
        if content is not None:
            matrices[path.stem] = unpack_pairs(content["heads"])
    return matrices


def read_study(output: Path) -> list[Run]:
    """The runs of the recipe with which the study in `output` was last run.

    Raises:
        UserError: `output` holds no study, or one of another version.
    """
    content = read_json(output / RESULTS)
    if content is None or "runs" not in content:
        raise UserError(f"{str(output)!r} holds no results.json; expected the directory of a study (subquad study)")
    try:
        recipes = [Recipe.model_validate(recipe) for recipe in content["recipes"]]
    except (KeyError, ValueError):
        raise UserError(
            f"{output / RESULTS} was written by another version of Subquad; run `subquad study` here once"
        ) from None
    return find_runs(recipes, output)
