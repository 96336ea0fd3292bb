"""Measures the finished students of a study beside their teacher, as `subquad eval` does."""

import logging
from collections.abc import Sequence
from pathlib import Path

from subquad.evaluate import command
from subquad.evaluate.results import Result
from subquad.evaluate.suites import settings_of
from subquad.study.results import RESULTS
from subquad.study.runs import Run
from subquad.utils import write_json_atomic

logger = logging.getLogger(__name__)


def check_suites(suites: Sequence[str]) -> None:
    """UserError where there is no such suite; before anything is trained."""
    settings_of(suites)


def evaluate_study(runs: Sequence[Run], output: Path, suites: Sequence[str]) -> dict[str, str]:
    """Puts rows into `output`/evaluation; with several teachers or corpora, into one directory for each. What is
    measured already is not measured again. Returns of parts that failed why, by name."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.state == "finished":
            groups.setdefault(f"{run.recipe.teacher} {run.recipe.data.model_dump_json()}", []).append(run)
    failed = {}
    for number, group in enumerate(groups.values(), 1):
        place = output / ("evaluation" if number == 1 else f"evaluation-{number}")
        logger.info("measuring %d students beside %s", len(group), group[0].recipe.teacher)
        rows: dict[tuple, Result] = {}
        for run in group:  # one in memory at a time; the teacher's parts are kept, and so measured once
            found = command.run([str(run.directory)], teacher=run.recipe.teacher, suites=suites, output=str(place))
            failed.update(found.failed)
            for row in found.rows:
                rows.setdefault(row.subject, row)
            write_json_atomic(place / RESULTS, {**found.head, "rows": [row.as_dict() for row in rows.values()]})
    return failed
