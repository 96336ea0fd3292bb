"""The suites that explain a student's scores: recall and diagnostics."""

from typing import Any

from torch import Tensor

from subquad.analysis.ablations import ablation_results
from subquad.analysis.diagnostics import diagnostics_results, sample_matrix_pairs
from subquad.analysis.mixing_matrices import pack_pairs
from subquad.analysis.recall import recall_results
from subquad.evaluate.results import Result, label_results
from subquad.evaluate.runner import EvalModel, Evaluation
from subquad.utils import write_json_atomic

MATRICES = "matrices"
"""The directory of packed mixing matrices, one file for each student."""


def recall_suite(e: Evaluation, model: EvalModel) -> list[Result]:
    s = e.settings

    def ask() -> list[Result]:
        haystack = e.validation_ids(model, 4 * max(s.recall_lengths)).flatten()
        return recall_results(model.model, model.tokenizer, haystack, lengths=s.recall_lengths, items=s.recall_items)

    results = e.results("recall", model, (e.text_key, s.recall_lengths, s.recall_items), ask)
    if e.figures is not None:
        from subquad.analysis import plots

        plots.draw_recall(label_results(model.name, None, results), e.figures)
    return results


def diagnostics_suite(e: Evaluation, model: EvalModel) -> list[Result]:
    """Each model against the teacher; the teacher against itself gives the values of a perfect student."""
    results = diagnose(e, model)
    if model in e.students and e.teacher is not None:
        save_matrices(e, model, e.teacher)
    if e.figures is not None:
        from subquad.analysis import plots

        if model in e.students:
            teacher = None if e.teacher is None else e.teacher.model
            plots.draw_student(model.name, model.model, teacher, diagnostic_ids(e, model), e.figures)
        if model is e.models[-1]:
            every = [result for one in e.models for result in label_results(one.name, None, diagnose(e, one))]
            plots.draw_cka(every, e.figures)
    return results


def diagnostic_ids(e: Evaluation, model: EvalModel) -> Tensor:
    """The texts for diagnostics, `[diag_rows, at most diag_tokens]`."""
    s = e.settings
    return e.validation_ids(model, s.diag_rows * s.text.seq_len)[: s.diag_rows, : s.diag_tokens]


def diagnose(e: Evaluation, model: EvalModel) -> list[Result]:
    def measure() -> list[Result]:
        ids = diagnostic_ids(e, model)
        found = diagnostics_results(model.model, ids, None if e.teacher is None else e.teacher.model)
        return found + ablation_results(model.model, ids)

    return e.results(
        "diagnostics", model, (e.teacher, e.text_key, e.settings.diag_rows, e.settings.diag_tokens), measure
    )


def save_matrices(e: Evaluation, model: EvalModel, teacher: EvalModel) -> None:
    if e.output is None:
        return
    dependencies = (teacher, e.text_key, e.settings.diag_rows, e.settings.diag_tokens)

    def measure() -> list[dict[str, Any]]:
        return pack_pairs(sample_matrix_pairs(model.model, teacher.model, diagnostic_ids(e, model)))

    heads = e.outcome(MATRICES, model, dependencies, measure)
    if heads is not None:
        (e.output / MATRICES).mkdir(exist_ok=True)
        write_json_atomic(e.output / MATRICES / f"{model.name.replace('/', '-')}.json", {"heads": heads})
