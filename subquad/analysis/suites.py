"""The suites that explain a student's scores: recall and diagnostics."""

from typing import Any

from torch import Tensor

from subquad.analysis.ablations import ablation_results
from subquad.analysis.diagnostics import diagnostics_results, sample_matrix_pairs
from subquad.analysis.mixing_matrices import pack_pairs
from subquad.analysis.near_far import near_far_results
from subquad.analysis.recall import recall_results
from subquad.data.recall_tasks import TASKS
from subquad.evaluate.results import Result, label_results
from subquad.evaluate.runner import EvalModel, Evaluation
from subquad.utils import write_json_atomic

MATRICES = "matrices"
"""The directory of packed mixing matrices, one file for each student."""


def recall_suite(e: Evaluation, model: EvalModel) -> list[Result]:
    s = e.settings

    def ask() -> list[Result]:
        haystack = e.validation_ids(model, 4 * max(s.recall_lengths)).flatten()
        return recall_results(model.model, model.tokenizer, haystack, tasks, s.recall_lengths, items=s.recall_items)

    tasks = s.recall_tasks or tuple(TASKS)
    results = e.results("recall", model, (e.text_key, tasks, s.recall_lengths, s.recall_items), ask)
    if e.figures is not None:
        from subquad.analysis import plots

        plots.draw_recall(label_results(model.name, None, results), e.figures)
    return results


def diagnostics_suite(e: Evaluation, model: EvalModel) -> list[Result]:
    """Each model against the teacher; the teacher against itself gives the values of a perfect student."""
    teacher = None if e.teacher is None else e.teacher.model
    dependencies = (e.teacher, e.text_key, e.settings.diag_rows, e.settings.diag_tokens)

    def diagnose(one: EvalModel) -> list[Result]:
        def measure() -> list[Result]:
            ids = diagnostic_ids(e, one)
            ablations = ablation_results(one.model, ids) + near_far_results(one.model, ids)
            return diagnostics_results(one.model, ids, teacher) + ablations

        return e.results("diagnostics", one, dependencies, measure)

    def sample() -> list[dict[str, Any]]:
        assert teacher is not None
        return pack_pairs(sample_matrix_pairs(model.model, teacher, diagnostic_ids(e, model)))

    results = diagnose(model)
    if model in e.students and teacher is not None and e.output is not None:
        heads = e.outcome(MATRICES, model, dependencies, sample)
        if heads is not None:
            (e.output / MATRICES).mkdir(exist_ok=True)
            write_json_atomic(e.output / MATRICES / f"{model.name.replace('/', '-')}.json", {"heads": heads})
    if e.figures is not None:
        from subquad.analysis import plots

        if model in e.students:
            plots.draw_student(model.name, model.model, teacher, diagnostic_ids(e, model), e.figures)
        if model is e.models[-1]:
            plots.draw_cka([r for one in e.models for r in label_results(one.name, None, diagnose(one))], e.figures)
    return results


def diagnostic_ids(e: Evaluation, model: EvalModel) -> Tensor:
    """The texts for diagnostics, `[diag_rows, at most diag_tokens]`."""
    s = e.settings
    return e.validation_ids(model, s.diag_rows * s.text.seq_len)[: s.diag_rows, : s.diag_tokens]
