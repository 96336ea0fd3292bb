"""The suites that explain a student's scores: recall and diagnostics."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from subquad.analysis.ablations import ablation_results
from subquad.analysis.diagnostics import diagnostics_results, sample_matrix_pairs
from subquad.analysis.mixing_matrices import pack_pairs
from subquad.analysis.recall import recall_results
from subquad.evaluate.jobs import EvalJob, EvalModel, Evaluation
from subquad.evaluate.results import Result
from subquad.evaluate.standard_suites import Outcomes, stored_results
from subquad.evaluate.suites import Suite
from subquad.utils import write_json_atomic

MATRICES = "matrices"
"""The jobs whose outcomes are packed matrices, and the directory of their files."""


def recall_jobs(e: Evaluation) -> list[EvalJob]:
    s = e.settings

    def ask(model: EvalModel) -> list[dict[str, Any]]:
        haystack = e.validation_ids(model, 4 * max(s.recall_lengths)).flatten()
        options: dict[str, Any] = {"lengths": s.recall_lengths, "items": s.recall_items}
        return [result.as_dict() for result in recall_results(model.model, model.tokenizer, haystack, **options)]

    dependencies = (e.text_key, s.recall_lengths, s.recall_items)
    return [e.job("recall", model, dependencies, partial(ask, model)) for model in e.models]


def draw_recall(e: Evaluation, results: Sequence[Result], directory: Path) -> None:
    from subquad.analysis import plots

    plots.draw_recall(results, directory)


def diagnostics_jobs(e: Evaluation) -> list[EvalJob]:
    """Each model against the teacher; the teacher against itself gives the values of a perfect student."""
    s, teacher = e.settings, e.teacher

    def diagnose(model: EvalModel) -> list[dict[str, Any]]:
        ids = e.diagnostic_ids(model)
        results = diagnostics_results(model.model, ids, None if teacher is None else teacher.model)
        return [result.as_dict() for result in results + ablation_results(model.model, ids)]

    def matrices(model: EvalModel, teacher: EvalModel) -> list[dict[str, Any]]:
        return pack_pairs(sample_matrix_pairs(model.model, teacher.model, e.diagnostic_ids(model)))

    dependencies = (e.text_key, s.diag_rows, s.diag_tokens)
    jobs = [e.job("diagnostics", model, dependencies, partial(diagnose, model), teacher) for model in e.models]
    if teacher is None:
        return jobs
    return jobs + [
        e.job(MATRICES, model, dependencies, partial(matrices, model, teacher), teacher) for model in e.students
    ]


def save_matrices(e: Evaluation, outcomes: Outcomes, directory: Path) -> None:
    for model in e.students:
        heads = outcomes.get(f"{MATRICES}: {model.name}")
        if heads is not None:
            (directory / MATRICES).mkdir(exist_ok=True)
            write_json_atomic(directory / MATRICES / f"{model.name.replace('/', '-')}.json", {"heads": heads})


def draw_diagnostics(e: Evaluation, results: Sequence[Result], directory: Path) -> None:
    from subquad.analysis import plots

    teacher, ids = None if e.teacher is None else e.teacher.model, e.diagnostic_ids(e.students[0])
    for model in e.students:
        plots.draw_student(model.name, model.model, teacher, ids, directory)
    plots.draw_cka(results, directory)


RECALL = Suite(recall_jobs, lambda e, model, outcomes: stored_results("recall", model, outcomes), draw=draw_recall)
DIAGNOSTICS = Suite(
    diagnostics_jobs,
    lambda e, model, outcomes: stored_results("diagnostics", model, outcomes),
    save=save_matrices,
    draw=draw_diagnostics,
)
