"""What a model can read out of its context, as it is: needles, associations, copies, induction, by length and depth.

Contexts are read once; every question and each of its possible answers continues from what the model then holds. Two
scores: whether the right answer is likelier than the distractors, and whether greedy decoding writes it, which is
whether at each of its tokens the right one is the likeliest.
"""

import copy
import inspect
import itertools
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.analysis.recall_tasks import TASKS, Item, Question, Source, make
from subquad.evaluate.results import Result
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError, eval_mode, nearest

BATCH_TOKENS = 4096
"""Tokens of contexts that are read at a time."""


@dataclass(frozen=True)
class Answer:
    """How one question was answered."""

    depth: float | None
    correct: float
    """Whether the right answer is the likeliest of the candidates; a share where several are."""
    generated: float
    """Whether greedy decoding writes the right answer."""
    log_likelihood: float
    """Of the right answer, the mean of its tokens."""
    chance: float
    """Of being correct without reading."""


def recall_results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Tensor,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = (128, 256, 512),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    items: int = 8,
    seed: int = 0,
) -> list[Result]:
    """Accuracy of a teacher or student at reading its context, zero-shot.

    Args:
        haystack: token ids `[N]` of real text, some times as many as the longest context.
        tasks: of `TASKS`; see docs/explain.md.
        lengths: tokens of the prompt, the question included.
        depths: where the answer stands in it, from 0 (its start) to 1 (right before the question).
        items: questions for each length and depth.
        seed: of all that is drawn. The same questions are asked of every model with this tokenizer.

    Returns:
        For each task and length, over all depths (a row without depth) and at each: `acc` (by likelihood),
        `acc_generated`, `loglikelihood` (nats a token), `chance` (of `acc`, by guessing).

    Raises:
        UserError: an unknown task; a length that is too short for it; too little text or too few tokens.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown recall task {task!r}{nearest(task, TASKS)}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths: got {list(depths)}, expected numbers from 0 to 1")
    found = []
    with eval_mode(model):
        for task, length in itertools.product(tasks, lengths):
            source = Source(tokenizer, haystack, random.Random(f"{seed} {task} {length}"))
            found += summary(task, length, list(answers(model, make(task, source, length, depths, items))))
    return found


def summary(task: str, length: int, answered: Sequence[Answer]) -> list[Result]:
    """Rows of one task and length: over all depths first, then at each."""
    depths = sorted({answer.depth for answer in answered if answer.depth is not None})
    groups: list[tuple[float | None, Sequence[Answer]]] = [(None, answered)]
    groups += [(depth, [a for a in answered if a.depth == depth]) for depth in depths]
    found = []
    for depth, group in groups:
        where = Result(task=task, metric="chance", value=group[0].chance, n=len(group), length=length, depth=depth)
        for metric, field in (("acc", "correct"), ("acc_generated", "generated"), ("loglikelihood", "log_likelihood")):
            values = [getattr(answer, field) for answer in group]
            stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            found.append(replace(where, metric=metric, value=statistics.fmean(values), stderr=stderr))
        found.append(where)
    return found


def answers(model: PreTrainedModel, items: Iterable[Item]) -> Iterator[Answer]:
    """Asks all questions, those about shorter contexts first; `model` in evaluation mode."""
    ordered = sorted(items, key=lambda item: len(item.context))
    for length, group in itertools.groupby(ordered, key=lambda item: len(item.context)):
        same = list(group)
        size = max(1, BATCH_TOKENS // max(1, length))
        for start in range(0, len(same), size):
            yield from ask(model, same[start : start + size])


@torch.no_grad()
def ask(model: PreTrainedModel, batch: Sequence[Item]) -> Iterator[Answer]:
    """All questions of items whose contexts are of one length, and that have as many questions each."""
    contexts = torch.stack([item.context for item in batch]).to(model.device)
    held = model(input_ids=contexts, use_cache=True, **last_only(model))[CACHE_ARGUMENT]
    for questions in zip(*(item.questions for item in batch), strict=True):
        yield from continued(model, held, questions)


def continued(model: PreTrainedModel, held: Any, questions: Sequence[Question]) -> Iterator[Answer]:
    """One question of each row that `held` holds; `held` stays as it is."""
    candidates = [(question.answer, *question.distractors) for question in questions]
    count, asked = len(candidates[0]), len(questions[0].ask)
    rows = [torch.cat([q.ask, answer]) for q, group in zip(questions, candidates, strict=True) for answer in group]
    # What stands behind a shorter answer comes after all that is looked at.
    fed = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    cache = copy.deepcopy(held)
    cache.batch_repeat_interleave(count)
    logits = model(input_ids=fed, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:, asked - 1 : -1].float()
    given = fed[:, asked:]
    each = F.log_softmax(logits, dim=-1).gather(-1, given.unsqueeze(-1)).squeeze(-1)
    best = logits.argmax(-1) == given
    for number, (question, group) in enumerate(zip(questions, candidates, strict=True)):
        place = number * count
        scores = [each[place + i, : len(answer)].mean().item() for i, answer in enumerate(group)]
        right = float(scores[0] == max(scores)) / scores.count(max(scores))
        written = float(best[place, : len(question.answer)].all())
        yield Answer(question.depth, right, written, scores[0], 1 / count)


def last_only(model: PreTrainedModel) -> dict[str, int]:
    """What tells a model that only the logits of the last token are wanted, where it can be told."""
    inner = model.base if isinstance(model, SubquadForCausalLM) else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
