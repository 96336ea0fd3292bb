"""The suites of the presets: language, zero-shot, generation, long, efficiency."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from subquad.data import token_rows
from subquad.evaluate import generation, long_context
from subquad.evaluate.efficiency import TASK, efficiency_results
from subquad.evaluate.jobs import EvalJob, EvalModel, Evaluation
from subquad.evaluate.lm_eval import Task, TaskResult, evenly_spaced, zero_shot
from subquad.evaluate.perplexity import language_results, token_sums, unigram_loss
from subquad.evaluate.results import Result
from subquad.evaluate.statistics import mean
from subquad.evaluate.suites import Suite
from subquad.evaluate.task_scores import TaskScores, accuracy_results, summary_results

logger = logging.getLogger(__name__)
UNIGRAM_TOKENS = 200_000

Outcomes = Mapping[str, Any]
"""Outcomes of finished jobs by job name."""


def stored_results(job: str, model: EvalModel, outcomes: Outcomes) -> list[Result]:
    """The results of a job whose outcome is a list of results."""
    return [Result.from_dict(result) for result in outcomes.get(f"{job}: {model.name}", [])]


def teacher_outcome(e: Evaluation, job: str, outcomes: Outcomes) -> Any:
    return None if e.teacher is None else outcomes.get(f"{job}: {e.teacher.name}")


# ---------------------------------------------------------------------- language


def language_jobs(e: Evaluation) -> list[EvalJob]:
    def sums(model: EvalModel) -> list[list[float]]:
        teacher = None if e.teacher is None else e.teacher.model
        batches = DataLoader(e.validation_rows(model), batch_size=4)
        return token_sums(model.model, teacher, batches, model.tokenizer).tolist()

    def unigram(teacher: EvalModel) -> float:
        train = token_rows(e.settings.text, teacher.tokenizer, "train", limit=UNIGRAM_TOKENS)
        validation = DataLoader(e.validation_rows(teacher), batch_size=4)
        return unigram_loss((row["input_ids"] for row in train), validation, teacher.vocab_size)

    dependencies = (e.text_key, e.settings.tokens)
    jobs = [e.job("language", model, dependencies, partial(sums, model), e.teacher) for model in e.models]
    if e.teacher is not None:
        jobs.append(e.job("unigram", e.teacher, dependencies, partial(unigram, e.teacher)))
    return jobs


def language(e: Evaluation, model: EvalModel, outcomes: Outcomes) -> list[Result]:
    sums = outcomes.get(f"language: {model.name}")
    if sums is None:
        return []
    unigram = teacher_outcome(e, "unigram", outcomes)
    return language_results(e.text_name, torch.tensor(sums, dtype=torch.float64), unigram)


# ---------------------------------------------------------------------- zero-shot


def zero_shot_jobs(e: Evaluation) -> list[EvalJob]:
    s = e.settings

    def score(model: EvalModel, task: Task) -> dict[str, Any]:
        options: dict[str, Any] = {"limit": s.limit, "batch_size": s.batch_size, "include": s.include}
        return zero_shot(model.model, model.tokenizer, task, **options).as_dict()

    return [
        e.job(f"zero-shot {task.name}", model, (*task.identity, s.limit), partial(score, model, task))
        for task in s.tasks
        for model in e.models
    ]


def zero_shot_results(e: Evaluation, model: EvalModel, outcomes: Outcomes) -> list[Result]:
    results: list[Result] = []
    scores: dict[str, TaskScores] = {}
    for task in e.settings.tasks:
        student = outcomes.get(f"zero-shot {task.name}: {model.name}")
        teacher = teacher_outcome(e, f"zero-shot {task.name}", outcomes)
        if student is None:
            continue
        found = TaskResult.from_dict(student)
        results += [*found.results, Result(task.name, "chance", found.chance, n=len(found.scores))]
        if teacher is not None and len(found.scores):
            scores[task.name] = found.paired_with(TaskResult.from_dict(teacher))
    for name, pair in scores.items():
        results += accuracy_results(name, pair)
    return [*results, *(summary_results(scores) if scores else [])]


# ---------------------------------------------------------------------- generation


def generation_jobs(e: Evaluation) -> list[EvalJob]:
    s = e.settings

    def generate(model: EvalModel) -> list[list[int]]:
        prompts = e.validation_ids(model, s.prompts * s.text.seq_len)[: s.prompts, : s.prompt_tokens]
        return generation.continuations(model.model, prompts, s.generated_tokens).tolist()

    def last_words(model: EvalModel, task: Task) -> list[float]:
        items = task.items()
        chosen = [(items[i]["context"], items[i]["continuation"]) for i in evenly_spaced(len(items), s.lastword_items)]
        return generation.last_word_scores(model.model, model.tokenizer, chosen).tolist()

    dependencies = (e.text_key, s.prompts, s.prompt_tokens, s.generated_tokens)
    jobs = [e.job("continuations", model, dependencies, partial(generate, model)) for model in e.models]
    return jobs + [
        e.job(f"words {task.name}", model, (*task.identity, s.lastword_items), partial(last_words, model, task))
        for task in s.tasks
        if task.is_last_word
        for model in e.models
    ]


def generation_results(e: Evaluation, model: EvalModel, outcomes: Outcomes) -> list[Result]:
    results = []
    written = outcomes.get(f"continuations: {model.name}")
    teacher = teacher_outcome(e, "continuations", outcomes)
    if written is not None:
        results += generation.repetition_results(e.text_name, torch.tensor(written))
        if teacher is not None:
            results += generation.agreement_results(e.text_name, torch.tensor(written), torch.tensor(teacher))
    for task in e.settings.tasks:
        scores = outcomes.get(f"words {task.name}: {model.name}")
        if scores is not None:
            results.append(mean(torch.tensor(scores)).result(task.name, "acc_generated"))
    return results


# ---------------------------------------------------------------------- long and efficiency


def long_jobs(e: Evaluation) -> list[EvalJob]:
    s = e.settings

    def read(model: EvalModel) -> list[dict[str, Any]]:
        lengths = long_context.supported_lengths(model.model, s.lengths)
        if not lengths:
            logger.info("%s: skipped, supports fewer than %d positions", model.name, min(s.lengths))
            return []
        documents = e.cached(
            model,
            "documents",
            lambda: long_context.long_documents(s.text, model.tokenizer, max(s.lengths), s.documents),
        )
        losses = long_context.position_losses(model.model, documents[:, : max(lengths)], label=model.name)
        return [result.as_dict() for result in long_context.context_results(e.text_name, losses, lengths)]

    dependencies = (e.text_key, s.lengths, s.documents)
    return [e.job("long context", model, dependencies, partial(read, model)) for model in e.models]


def efficiency_jobs(e: Evaluation) -> list[EvalJob]:
    """One job for all models, which run interleaved."""
    s = e.settings

    def measure() -> dict[str, list[dict[str, Any]]]:
        models = {model.name: model.model for model in e.models}
        found = efficiency_results(models, s.cost_lengths, s.batches, s.repeats, s.max_prefill_seconds)
        return {name: [result.as_dict() for result in results] for name, results in found.items()}

    models = [(model.name, model) for model in e.models]
    return [EvalJob(TASK, (models, s.cost_lengths, s.batches, s.repeats, s.max_prefill_seconds), measure)]


def efficiency(e: Evaluation, model: EvalModel, outcomes: Outcomes) -> list[Result]:
    return [Result.from_dict(result) for result in outcomes.get(TASK, {}).get(model.name, [])]


LANGUAGE = Suite(language_jobs, language)
ZERO_SHOT = Suite(zero_shot_jobs, zero_shot_results)
GENERATION = Suite(generation_jobs, generation_results)
LONG = Suite(long_jobs, lambda e, model, outcomes: stored_results("long context", model, outcomes))
EFFICIENCY = Suite(efficiency_jobs, efficiency)
