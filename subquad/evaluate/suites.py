"""How much an evaluation measures (`Settings`), and the suites of its presets.

A suite is a function of an `Evaluation` and one of its models that returns the model's results, without the fields
`model` and `teacher`. It measures in `Evaluation.outcome` or `results`, which store what they compute.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from subquad.config import Data
from subquad.data import token_rows
from subquad.evaluate import generation, long_context
from subquad.evaluate.efficiency import TASK, efficiency_results
from subquad.evaluate.lm_eval import Task, TaskResult, zero_shot
from subquad.evaluate.perplexity import UNIGRAM_TOKENS, language_results, token_sums, unigram_loss
from subquad.evaluate.results import Result
from subquad.evaluate.statistics import TaskScores, accuracy_results, mean, summary_results
from subquad.registry import SUITES
from subquad.utils import UserError, device_name, nearest

if TYPE_CHECKING:
    from subquad.evaluate.runner import EvalModel, Evaluation

logger = logging.getLogger(__name__)
STANDARD_SUITES = ("language", "zero-shot", "generation", "long", "efficiency")
"""The suites of the presets `quick` and `full`."""

CONTEXT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Settings:
    """What to measure and how much of it. The defaults are those of a full evaluation."""

    suites: tuple[str, ...] = STANDARD_SUITES
    text: Data = field(default_factory=lambda: Data(source="python-stdlib"))
    """The validation text, read in rows of `text.seq_len` tokens."""
    tokens: int = 131_072
    """Validation tokens for perplexity and KL."""
    tasks: tuple[Task, ...] = ()
    include: Path | None = None
    """Directory of task definitions for lm-eval (its `--include_path`)."""
    limit: int | None = None
    """Maximum number of items per task."""
    prompts: int = 64
    """Number of validation rows whose beginning is continued."""
    prompt_tokens: int = 64
    generated_tokens: int = 256
    """Tokens generated per prompt."""
    lastword_items: int = 500
    """Items of a last-word task that are answered by generation."""
    lengths: tuple[int, ...] = CONTEXT_LENGTHS
    """Context lengths for perplexity."""
    documents: int = 4
    """Number of documents, each of the longest length."""
    cost_lengths: tuple[int, ...] = CONTEXT_LENGTHS
    """Prompt lengths for prefill and decoding time."""
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 3
    max_prefill_seconds: float = 60.0
    """Lengths with a longer expected prefill are skipped."""
    baselines: tuple[str, ...] = ("window",)
    """Models measured beside: "window", the teacher behind the uniform window of as many bytes as each student; "int8",
    the teacher in int8."""
    recall_lengths: tuple[int, ...] = (128, 256, 512)
    """Context lengths of the recall tasks."""
    recall_tasks: tuple[str, ...] | None = None
    """Recall tasks (docs/analysis.md); None: all."""
    recall_items: int = 8
    """Questions per length and depth."""
    diag_rows: int = 4
    """Number of validation rows for diagnostics."""
    diag_tokens: int = 256
    """Tokens of each of these rows."""


QUICK = Settings(
    tokens=8192,
    limit=100,
    prompts=8,
    generated_tokens=64,
    lastword_items=50,
    lengths=CONTEXT_LENGTHS[:4],
    documents=2,
    cost_lengths=(512, 2048),
    batches=(1,),
    repeats=2,
    max_prefill_seconds=5.0,
)


def settings_for(names: Sequence[str]) -> Settings:
    """The settings for names of suites and presets.

    `quick` is a small version of `STANDARD_SUITES`; `full` is all of them, with the teacher in int8. `recall` and
    `diagnostics` are in neither preset.

    Raises:
        UserError: an unknown name; `quick` together with others; no name.
    """
    for name in names:
        if name not in ("quick", "full") and name not in SUITES:
            raise UserError(f"suite: got {name!r}{nearest(name, ['quick', 'full', *SUITES])}")
    if not names or ("quick" in names and len(names) > 1):
        raise UserError(f"suite: got {', '.join(names) or 'none'}, expected quick alone, or any of full and the suites")
    if names[0] == "quick":
        return QUICK
    wanted = {*names, *(STANDARD_SUITES if "full" in names else ())}
    baselines = ("window", "int8") if "full" in names else ("window",)
    return replace(Settings(), suites=tuple(name for name in SUITES if name in wanted), baselines=baselines)


# ---------------------------------------------------------------------- suites


def language_suite(e: "Evaluation", model: "EvalModel") -> list[Result]:
    def sums() -> list[list[float]]:
        batches = DataLoader(e.validation_rows(model), batch_size=4)
        return token_sums(
            model.model, None if e.teacher is None else e.teacher.model, batches, model.tokenizer
        ).tolist()

    def unigram() -> float:
        train = token_rows(e.settings.text, model.tokenizer, "train", limit=UNIGRAM_TOKENS)
        validation = DataLoader(e.validation_rows(model), batch_size=4)
        return unigram_loss((row["input_ids"] for row in train), validation, model.vocab_size)

    text = (e.text_key, e.settings.tokens)
    found = e.outcome("language", model, (e.teacher, *text), sums)
    if found is None:
        return []
    baseline = None if e.teacher is None else e.outcome("unigram", e.teacher, text, unigram)
    return language_results(e.text_name, torch.tensor(found, dtype=torch.float64), baseline)


def task_result(
    e: "Evaluation", suite: str, model: "EvalModel | None", task: Task, limit: int | None
) -> TaskResult | None:
    """None without a model, or if the task fails."""
    if model is None:
        return None
    run = partial(zero_shot, model.model, model.tokenizer, task, limit=limit, include=e.settings.include)
    outcome = e.outcome(f"{suite} {task.name}", model, (task.key, limit), lambda: asdict(run()))
    return outcome and TaskResult(**{**outcome, "results": [Result(**result) for result in outcome["results"]]})


def zero_shot_suite(e: "Evaluation", model: "EvalModel") -> list[Result]:
    results: list[Result] = []
    pairs: dict[str, TaskScores] = {}
    for task in e.settings.tasks:
        own, reference = (task_result(e, "zero-shot", one, task, e.settings.limit) for one in (model, e.teacher))
        if own is not None:
            results += [*own.results, Result(task.name, "chance", own.chance, n=len(own.scores))]
            if reference is not None and own.scores:
                pairs[task.name] = TaskScores(own.scores, reference.scores, own.chance)
                results += accuracy_results(task.name, pairs[task.name])
    return results + summary_results(pairs)


def generation_suite(e: "Evaluation", model: "EvalModel") -> list[Result]:
    s = e.settings

    def written(one: "EvalModel") -> torch.Tensor | None:
        def compute() -> list[list[int]]:
            prompts = e.validation_ids(one, s.prompts * s.text.seq_len)[: s.prompts, : s.prompt_tokens]
            return generation.continuations(one.model, prompts, s.generated_tokens).tolist()

        outcome = e.outcome("continuations", one, (e.text_key, s.prompts, s.prompt_tokens, s.generated_tokens), compute)
        return None if outcome is None else torch.tensor(outcome)

    results = []
    own, reference = written(model), None if e.teacher is None else written(e.teacher)
    if own is not None:
        results += generation.repetition_results(e.text_name, own)
    if own is not None and reference is not None:
        results += generation.agreement_results(e.text_name, own, reference)
    for task in s.tasks:
        words = task.generated
        found = None if words is None else task_result(e, "generation", model, words, s.lastword_items)
        if found is not None:
            results.append(mean(task.name, "acc_generated", torch.tensor(found.scores)))
    return results


def long_suite(e: "Evaluation", model: "EvalModel") -> list[Result]:
    s = e.settings

    def read() -> list[Result]:
        lengths = long_context.supported_lengths(model.model, s.lengths)
        if not lengths:
            logger.info("%s: skipped, supports fewer than %d positions", model.name, min(s.lengths))
            return []
        arguments = (s.text, model.tokenizer, max(s.lengths), s.documents)
        documents = e.cached(model, "documents", lambda: long_context.long_documents(*arguments))
        losses = long_context.position_losses(model.model, documents[:, : max(lengths)], label=model.name)
        return long_context.context_results(e.text_name, losses, lengths)

    return e.results("long context", model, (e.text_key, s.lengths, s.documents), read)


def efficiency_suite(e: "Evaluation", model: "EvalModel") -> list[Result]:
    """One job for all models, which run interleaved."""
    s = e.settings
    options = (s.cost_lengths, s.batches, s.repeats, s.max_prefill_seconds)

    def measure() -> dict[str, list[dict[str, Any]]]:
        found = efficiency_results({one.name: one.model for one in e.models}, *options)
        return {name: [result.as_dict() for result in results] for name, results in found.items()}

    device = device_name(e.models[0].model.device)
    outcome = e.outcome(TASK, e.models[0], ([(one.name, one) for one in e.models], device, *options), measure)
    return [Result(**result) for result in outcome[model.name]] if outcome else []
