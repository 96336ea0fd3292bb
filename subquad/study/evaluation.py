"""Evaluates the finished students of a study against their teacher, as `subquad eval` does."""

import logging
from collections.abc import Sequence
from pathlib import Path

from subquad.evaluate import command
from subquad.evaluate.results import Result
from subquad.evaluate.suites import settings_for
from subquad.study.results import RESULTS
from subquad.study.runs import Run
from subquad.utils import write_json_atomic

logger = logging.getLogger(__name__)


def check_suites(suites: Sequence[str]) -> None:
    """Raises UserError for an unknown suite."""
    settings_for(suites)


def evaluate_study(runs: Sequence[Run], output: Path, suites: Sequence[str]) -> dict[str, str]:
    """Writes results to `output`/evaluation, or with several teachers or corpora to one directory for each.

    Existing results are reused. One student is in memory at a time. Returns the failed parts: name and reason.
    """
    by_teacher: dict[str, list[Run]] = {}
    for run in runs:
        if run.state == "finished":
            by_teacher.setdefault(f"{run.recipe.teacher} {run.recipe.data.model_dump_json()}", []).append(run)
    failed = {}
    for number, group in enumerate(by_teacher.values(), 1):
        directory = output / ("evaluation" if number == 1 else f"evaluation-{number}")
        teacher = group[0].recipe.teacher
        logger.info("evaluating %d students against %s", len(group), teacher)
        results: dict[tuple, Result] = {}
        for run in group:  # the results of the teacher are cached, so it is evaluated once
            report = command.run([str(run.directory)], teacher=teacher, suites=suites, output=str(directory))
            failed.update(report.failed)
            for result in report.results:
                results.setdefault(result.key, result)
            records = [result.as_dict() for result in results.values()]
            write_json_atomic(directory / RESULTS, {**report.header, "results": records})
    return failed
