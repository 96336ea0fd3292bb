"""The plan of an evaluation: the parts of its work, and the rows of results from what is done of them."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.analysis.ablations import ablation_results
from subquad.analysis.diagnostics import diagnostics_results
from subquad.analysis.recall import recall_results
from subquad.analysis.saved_matrices import chosen_matrices, pack
from subquad.data import RowSlice, token_rows
from subquad.evaluate import generation, long_context, statistics
from subquad.evaluate.baselines import SINKS, int8_teacher, windowed_teacher
from subquad.evaluate.efficiency import TASK as COST
from subquad.evaluate.efficiency import efficiency_results
from subquad.evaluate.lm_eval import Task, TaskResult, spread, zero_shot
from subquad.evaluate.perplexity import language_results, token_sums, unigram_loss
from subquad.evaluate.recovery import TaskScores, recovery_results, summary_results
from subquad.evaluate.results import Result, of
from subquad.evaluate.suites import Settings
from subquad.utils import UserError

logger = logging.getLogger(__name__)
UNIGRAM_TOKENS = 200_000
MATRICES = "matrices"
"""The parts whose outcomes are matrices to look at, and where they are written."""


@dataclass(frozen=True)
class EvalModel:
    """A model to be measured.

    identity: what has to be the same for its results to be the same (files with their sizes and times, say).
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: tuple[Any, ...] = ()


@dataclass(frozen=True)
class EvalJob:
    """A piece of work whose outcome can be kept: JSON in, JSON out."""

    name: str
    depends: tuple[Any, ...]
    compute: Callable[[], Any]

    @property
    def key(self) -> str:
        text = json.dumps([self.name, *self.depends], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_subjects(subjects: Sequence[EvalModel], teacher: EvalModel | None) -> None:
    """UserError where models cannot be measured side by side: two of one name, or another vocabulary."""
    names = [subject.name for subject in subjects]
    for name in names:
        if names.count(name) > 1 or (teacher is not None and name == teacher.name):
            raise UserError(f"two models are called {name!r}; expected names of their own")
    if teacher is None:
        return
    for subject in subjects:
        sizes = [s.model.get_input_embeddings().num_embeddings for s in (subject, teacher)]  # type: ignore[union-attr]
        words = [s.tokenizer.get_vocab() for s in (subject, teacher)]
        if sizes[0] != sizes[1] or words[0] != words[1]:
            raise UserError(
                f"{subject.name!r} and its teacher {teacher.name!r} have different vocabularies ({sizes[0]} and "
                f"{sizes[1]} tokens{', other words' if sizes[0] == sizes[1] else ''}); expected the teacher it was "
                "made from"
            )


class Evaluation:
    """The plan of an evaluation, and its rows from what of the plan is done."""

    def __init__(self, subjects: Sequence[EvalModel], teacher: EvalModel | None, settings: Settings):
        check_subjects(subjects, teacher)
        self.students, self.teacher, self.settings = list(subjects), teacher, settings
        self.all = [*subjects, *([teacher] if teacher is not None else [])]
        if settings.baselines and teacher is not None:
            self.all += baseline_models(teacher, settings)
        self._text: dict[str, Any] = {}

    # ------------------------------------------------------------------ the plan

    def plan(self) -> list[EvalJob]:
        makers = {
            "language": self._language,
            "zero-shot": self._zero_shot,
            "generation": self._generation,
            "long": self._long,
            "efficiency": self._efficiency,
            "recall": self._recall,
            "diagnostics": self._diagnostics,
        }
        return [part for name in self.settings.parts for part in makers[name]()]

    def _language(self) -> list[EvalJob]:
        s = self.settings
        depends = (s.text.model_dump(mode="json"), s.tokens)

        def sums(subject: EvalModel) -> list[list[float]]:
            teacher = None if self.teacher is None else self.teacher.model
            batches = DataLoader(self._rows(subject), batch_size=4)
            return token_sums(subject.model, teacher, batches, subject.tokenizer).tolist()

        parts = [self._part("language", subject, depends, partial(sums, subject), self.teacher) for subject in self.all]
        if self.teacher is not None:
            parts.append(self._part("unigram", self.teacher, depends, partial(self._unigram, self.teacher)))
        return parts

    def _zero_shot(self) -> list[EvalJob]:
        s = self.settings

        def ask(subject: EvalModel, task: Task) -> dict[str, Any]:
            model, tokenizer = subject.model, subject.tokenizer
            found = zero_shot(model, tokenizer, task, limit=s.limit, batch_size=s.batch_size, include=s.include)
            return found.as_dict()

        return [
            self._part(f"zero-shot {task.name}", subject, (*_identity(task), s.limit), partial(ask, subject, task))
            for task in s.tasks
            for subject in self.all
        ]

    def _generation(self) -> list[EvalJob]:
        s = self.settings
        depends = (s.text.model_dump(mode="json"), s.prompts, s.prompt_tokens, s.generated)

        def write(subject: EvalModel) -> list[list[int]]:
            prompts = self._sample(subject, s.prompts * s.text.seq_len)[: s.prompts, : s.prompt_tokens]
            return generation.continuations(subject.model, prompts, s.generated).tolist()

        def words(subject: EvalModel, task: Task) -> list[float]:
            items = task.items()
            some = [(items[i]["context"], items[i]["continuation"]) for i in spread(len(items), s.lastword_items)]
            return generation.last_word_scores(subject.model, subject.tokenizer, some).tolist()

        parts = [self._part("continuations", subject, depends, partial(write, subject)) for subject in self.all]
        return parts + [
            self._part(f"words {t.name}", subject, (*_identity(t), s.lastword_items), partial(words, subject, t))
            for t in s.tasks
            if t.words
            for subject in self.all
        ]

    def _long(self) -> list[EvalJob]:
        s = self.settings

        def read(subject: EvalModel) -> list[dict[str, Any]]:
            lengths = long_context.readable(subject.model, s.lengths)
            if not lengths:
                logger.info("%s: reads no text of %d tokens", subject.name, min(s.lengths))
                return []
            ids = self._documents(subject, max(s.lengths))[:, : max(lengths)]
            losses = long_context.position_losses(subject.model, ids, label=subject.name)
            return [row.as_dict() for row in long_context.context_results(_source(s), losses, lengths)]

        depends = (s.text.model_dump(mode="json"), s.lengths, s.documents)
        return [self._part("long context", subject, depends, partial(read, subject)) for subject in self.all]

    def _efficiency(self) -> list[EvalJob]:
        s = self.settings

        def cost() -> dict[str, list[dict[str, Any]]]:
            models = {subject.name: subject.model for subject in self.all}
            found = efficiency_results(models, s.cost_lengths, s.batches, s.repeats, s.seconds)
            return {name: [row.as_dict() for row in rows] for name, rows in found.items()}

        who = [(subject.name, subject.identity) for subject in self.all]
        return [EvalJob(COST, (who, s.cost_lengths, s.batches, s.repeats, s.seconds), cost)]

    def _recall(self) -> list[EvalJob]:
        s = self.settings

        def ask(subject: EvalModel) -> list[dict[str, Any]]:
            haystack = self._sample(subject, 4 * max(s.recall_lengths)).flatten()
            rows = recall_results(
                subject.model, subject.tokenizer, haystack, lengths=s.recall_lengths, items=s.recall_items
            )
            return [row.as_dict() for row in rows]

        depends = (s.text.model_dump(mode="json"), s.recall_lengths, s.recall_items)
        return [self._part("recall", subject, depends, partial(ask, subject)) for subject in self.all]

    def _diagnostics(self) -> list[EvalJob]:
        """A student beside its teacher; the teacher beside itself, which is what a perfect student would show."""
        s = self.settings

        def look(subject: EvalModel) -> list[dict[str, Any]]:
            texts = self.texts(subject)
            teacher = None if self.teacher is None else self.teacher.model
            rows = diagnostics_results(subject.model, texts, teacher) + ablation_results(subject.model, texts)
            return [row.as_dict() for row in rows]

        def show(subject: EvalModel, teacher: EvalModel) -> list[dict[str, Any]]:
            return pack(chosen_matrices(subject.model, teacher.model, self.texts(subject)))

        depends = (s.text.model_dump(mode="json"), s.diag_rows, s.diag_tokens)
        parts = [
            self._part("diagnostics", subject, depends, partial(look, subject), self.teacher) for subject in self.all
        ]
        beside = self.teacher
        if beside is None:
            return parts
        return parts + [
            self._part(MATRICES, subject, depends, partial(show, subject, beside), beside) for subject in self.students
        ]

    def _part(
        self, name: str, subject: EvalModel, depends: tuple, compute: Callable[[], Any], beside: EvalModel | None = None
    ) -> EvalJob:
        others = () if beside is None else (beside.name, beside.identity)
        return EvalJob(f"{name}: {subject.name}", (subject.identity, *others, *depends), compute)

    # ------------------------------------------------------------------ text

    def _rows(self, subject: EvalModel, tokens: int | None = None) -> RowSlice:
        s = self.settings
        key = f"{subject.tokenizer.name_or_path} {tokens}"
        if key not in self._text:
            self._text[key] = token_rows(s.text, subject.tokenizer, "validation", limit=tokens or s.tokens)
        rows = self._text[key]
        return rows.take(len(rows))

    def _sample(self, subject: EvalModel, tokens: int) -> Tensor:
        """Rows of held-out text with about so many tokens, `[rows, context]`."""
        rows = self._rows(subject, tokens)
        return torch.stack([rows[i]["input_ids"] for i in range(len(rows))])

    def texts(self, subject: EvalModel) -> Tensor:
        """The texts through which a model's inside is looked at, `[texts, at most text]`."""
        s = self.settings
        return self._sample(subject, s.diag_rows * s.text.seq_len)[: s.diag_rows, : s.diag_tokens]

    def _documents(self, subject: EvalModel, tokens: int) -> Tensor:
        key = f"{subject.tokenizer.name_or_path} documents"
        if key not in self._text:
            s = self.settings
            self._text[key] = long_context.long_documents(s.text, subject.tokenizer, tokens, s.documents)
        return self._text[key]

    def _unigram(self, subject: EvalModel) -> float:
        s = self.settings
        train = token_rows(s.text, subject.tokenizer, "train", limit=UNIGRAM_TOKENS)
        vocabulary: int = subject.model.get_input_embeddings().num_embeddings  # type: ignore[assignment, union-attr]
        held_out = DataLoader(self._rows(subject), batch_size=4)
        return unigram_loss((row["input_ids"] for row in train), held_out, vocabulary)

    # ------------------------------------------------------------------ the rows

    def rows(self, done: Mapping[str, Any]) -> list[Result]:
        """The rows of results from the outcomes of parts by name; of parts that are not done, none."""
        found: list[Result] = []
        for subject in self.all:
            rows = [
                *self._language_rows(subject, done),
                *self._task_rows(subject, done),
                *self._generation_rows(subject, done),
                *[
                    Result.from_dict(row)
                    for part in ("long context", "recall", "diagnostics")
                    for row in done.get(f"{part}: {subject.name}", [])
                ],
                *[Result.from_dict(row) for row in done.get(COST, {}).get(subject.name, [])],
            ]
            found += of(subject.name, None if self.teacher is None else self.teacher.name, rows)
        return found

    def _language_rows(self, subject: EvalModel, done: Mapping[str, Any]) -> list[Result]:
        sums = done.get(f"language: {subject.name}")
        if sums is None:
            return []
        unigram = None if self.teacher is None else done.get(f"unigram: {self.teacher.name}")
        return language_results(_source(self.settings), torch.tensor(sums, dtype=torch.float64), unigram)

    def _task_rows(self, subject: EvalModel, done: Mapping[str, Any]) -> list[Result]:
        rows: list[Result] = []
        scores: dict[str, TaskScores] = {}
        for task in self.settings.tasks:
            mine = done.get(f"zero-shot {task.name}: {subject.name}")
            theirs = None if self.teacher is None else done.get(f"zero-shot {task.name}: {self.teacher.name}")
            if mine is None:
                continue
            result = TaskResult.from_dict(mine)
            rows += [*result.rows, Result(task.name, "chance", result.chance, n=len(result.scores))]
            if theirs is not None and len(result.scores):
                scores[task.name] = result.beside(TaskResult.from_dict(theirs))
        for name, pair in scores.items():
            rows += recovery_results(name, pair)
        return [*rows, *(summary_results(scores) if scores else [])]

    def _generation_rows(self, subject: EvalModel, done: Mapping[str, Any]) -> list[Result]:
        rows = []
        written = done.get(f"continuations: {subject.name}")
        theirs = None if self.teacher is None else done.get(f"continuations: {self.teacher.name}")
        if written is not None:
            rows += generation.repetition_results(_source(self.settings), torch.tensor(written))
            if theirs is not None:
                rows += generation.agreement_results(
                    _source(self.settings), torch.tensor(written), torch.tensor(theirs)
                )
        for task in self.settings.tasks:
            scores = done.get(f"words {task.name}: {subject.name}")
            if scores is not None:
                rows.append(statistics.mean(torch.tensor(scores)).row(task.name, "acc_generated"))
        return rows


def baseline_models(teacher: EvalModel, settings: Settings) -> list[EvalModel]:
    """The teacher in int8 and with a sliding window."""
    window = settings.window
    return [
        replace(teacher, name=f"{teacher.name}, int8", model=int8_teacher(teacher.model)),
        replace(
            teacher, name=f"{teacher.name}, window {window}+{SINKS}", model=windowed_teacher(teacher.model, window)
        ),
    ]


def _source(settings: Settings) -> str:
    source = settings.text.validation or settings.text.source
    return Path(source).name if isinstance(source, str) else " + ".join(Path(name).name for name in source)


def _identity(task: Task) -> tuple[Any, ...]:
    if task.file is None:
        return (task.name,)
    status = task.file.stat()
    return task.name, str(task.file.resolve()), status.st_size, status.st_mtime_ns
