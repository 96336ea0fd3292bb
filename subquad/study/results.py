"""Collects the results of a study and writes `results.json` and `results.sqlite` (schema: docs/study.md)."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from subquad.analysis.mixing_matrices import MatrixPairs, unpack_pairs
from subquad.analysis.suites import MATRICES
from subquad.config import Recipe
from subquad.distill.recipe_stages import recipe_stages
from subquad.evaluate.results import Result
from subquad.study.runs import Run, find_runs, read_json, unrelated_runs
from subquad.utils import UserError, check_directory, run_info, write_json_atomic

RESULTS, DATABASE = "results.json", "results.sqlite"
TASK = "validation text"
"""Task of the results that every run measures at its end."""
SCHEMA = """
CREATE TABLE runs (
    run TEXT PRIMARY KEY, digest TEXT, state TEXT, teacher TEXT, mixer TEXT, stages TEXT, copy_qkv INTEGER,
    seed INTEGER, parameters INTEGER, tokens INTEGER, seconds REAL, device TEXT, commit_hash TEXT, versions TEXT,
    recipe TEXT, error TEXT
);
CREATE TABLE results (
    run TEXT, source TEXT, task TEXT, metric TEXT, value REAL, stderr REAL, low REAL, high REAL, n INTEGER,
    length INTEGER, batch INTEGER, depth REAL, layer INTEGER, head INTEGER, teacher TEXT
);
"""


def run_results(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The result of each finished run, with its name under `run`."""
    return [{"run": run.name, **result} for run in runs if (result := run.result()) is not None]


# ---------------------------------------------------------------------- writing


def write_results(output: Path, runs: Sequence[Run]) -> None:
    """Writes both files, each atomically."""
    states = [{"run": run.name, "state": run.state, "error": run.error_text()} for run in runs]
    recipes = [run.recipe.model_dump(mode="json") for run in runs]
    content = {**run_info(), "recipes": recipes, "runs": states, "results": run_results(runs)}
    write_json_atomic(output / RESULTS, content)
    write_database(output / DATABASE, runs, evaluation_results(output))


def write_database(path: Path, runs: Sequence[Run], evaluated: Sequence[Result]) -> None:
    """Writes the tables `runs`, one row for each run, and `results`, one row for each measured number."""
    unrelated = unrelated_runs(path.parent, runs)
    measured = [row for run in runs for row in result_rows(run)]
    for result in evaluated:
        if result.model not in unrelated:
            values = asdict(result)
            measured.append({"run": values.pop("model"), "source": "evaluation", **values})
    partial = path.with_name(path.name + ".part")
    partial.unlink(missing_ok=True)
    with sqlite3.connect(partial) as database:
        database.executescript(SCHEMA)
        for table, rows in (("runs", map(run_row, runs)), ("results", measured)):
            for row in rows:
                columns, places = ", ".join(row), ", ".join("?" * len(row))
                database.execute(f"INSERT INTO {table} ({columns}) VALUES ({places})", tuple(row.values()))
    database.close()
    partial.replace(path)


def run_row(run: Run) -> dict[str, Any]:
    """The row of a run in the table `runs`, by column."""
    recipe, info, result = run.recipe, run.info() or {}, run.result() or {}
    return {
        "run": run.name,
        "digest": recipe.digest(),
        "state": run.state,
        "teacher": recipe.teacher,
        "mixer": recipe.student.name,
        "stages": ",".join(recipe_stages(recipe)),
        "copy_qkv": int(recipe.student.copy_qkv),
        "seed": recipe.seed,
        **{name: result.get(name) for name in ("parameters", "tokens", "seconds")},
        "device": info.get("device"),
        "commit_hash": info.get("commit"),
        "versions": json.dumps(info.get("versions")) if info else None,
        "recipe": json.dumps(recipe.model_dump(mode="json")),
        "error": run.error_text(),
    }


def result_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of the table `results` that a finished run measured itself: the numbers that `runs` does not have."""
    common = {"run": run.name, "source": "run", "task": TASK, "teacher": run.recipe.teacher}
    in_runs = run_row(run)
    return [
        {**common, "metric": metric, "value": float(value)}
        for metric, value in (run.result() or {}).items()
        if metric not in in_runs and isinstance(value, int | float) and not isinstance(value, bool)
    ]


# ---------------------------------------------------------------------- reading


def evaluation_results(output: Path) -> list[Result]:
    """The results of all evaluations of the study. A teacher that was evaluated several times appears once."""
    results: dict[tuple[Any, ...], Result] = {}
    for path in sorted(output.glob(f"evaluation*/{RESULTS}")):
        for values in (read_json(path) or {}).get("results", []):
            result = Result(**values)
            results.setdefault(result.key, result)
    return list(results.values())


def saved_matrices(output: Path) -> dict[str, MatrixPairs]:
    """The saved mixing matrices of student and teacher, by the name of the run."""
    matrices = {}
    for path in sorted(output.glob(f"evaluation*/{MATRICES}/*.json")):
        if (content := read_json(path)) is not None:
            matrices[path.stem] = unpack_pairs(content["heads"])
    return matrices


def read_study(output: Path) -> list[Run]:
    """The runs of the recipe with which the study in `output` was last run.

    Raises:
        UserError: `output` holds no study, or one of another version.
    """
    check_directory(output)
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
