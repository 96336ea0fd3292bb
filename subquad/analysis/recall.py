"""Zero-shot recall from the context: needles, associations, copies and induction, by length and depth.

Each context is read once; all questions and candidate answers continue from a copy of its cache. `acc` compares the
likelihoods of the right answer and the distractors; `acc_generated` checks whether greedy decoding writes the answer,
that is, whether each of its tokens is the most likely one.
"""

import copy
import itertools
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad import progress
from subquad.data.recall_tasks import NUM_DISTRACTORS, TASKS, Item, PromptSource, Question, make_items
from subquad.evaluate.efficiency import prefill
from subquad.evaluate.results import Result
from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.utils import UserError, eval_mode, nearest

BATCH_TOKENS = 4096
"""Context tokens per forward pass."""


class Answer(NamedTuple):
    """How a model answered one question."""

    depth: float | None
    acc: float
    """1 if the right answer is the most likely candidate, 1 / n in a tie of n."""
    acc_generated: float
    """1 if greedy decoding writes the right answer."""
    loglikelihood: float
    """Of the right answer, in nats, the mean over its tokens."""


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
    """Recall of a teacher or student.

    Args:
        haystack: token ids `[N]` of natural text, several times as many as the longest context.
        tasks: names in `TASKS`; docs/analysis.md describes them.
        lengths: tokens of the prompt, the question included.
        depths: position of the answer in the context, from 0 (its start) to 1 (right before the question).
        items: questions per length and depth.
        seed: of the random draws. All models with this tokenizer get the same questions.

    Returns:
        For each task and length, over all depths (results without depth) and for each: `acc`, `acc_generated`,
        `loglikelihood` (nats per token) and `chance` (of `acc`).

    Raises:
        UserError: an unknown task; a length that is too short for a task; too little text or too few tokens.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"recall task: got {task!r}{nearest(task, TASKS)}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths: got {list(depths)}, expected numbers from 0 to 1")
    results = []
    with eval_mode(model):
        for task, length in itertools.product(tasks, lengths):
            source = PromptSource(tokenizer, haystack, random.Random(f"{seed} {task} {length}"))
            answers = list(answer_all(model, make_items(task, source, length, depths, items)))
            for depth in (None, *sorted({a.depth for a in answers if a.depth is not None})):
                group = [answer for answer in answers if depth in (None, answer.depth)]
                make = partial(Result, task, n=len(group), length=length, depth=depth)
                for metric in ("acc", "acc_generated", "loglikelihood"):
                    values = [getattr(answer, metric) for answer in group]
                    stderr = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
                    results.append(make(metric, statistics.fmean(values), stderr))
                results.append(make("chance", 1 / (1 + NUM_DISTRACTORS)))
    return results


@torch.no_grad()
def answer_all(model: PreTrainedModel, items: Iterable[Item]) -> Iterator[Answer]:
    """Answers all questions, in batches of contexts of equal length. `model` is in evaluation mode."""
    by_length = sorted(items, key=lambda item: len(item.context))
    with progress.bar(sum(len(item.questions) for item in by_length), "recall", "questions", delay=3) as bar:
        for length, group in itertools.groupby(by_length, key=lambda item: len(item.context)):
            same = list(group)
            size = max(1, BATCH_TOKENS // max(1, length))
            for batch in (same[start : start + size] for start in range(0, len(same), size)):
                cache = prefill(model, torch.tensor([item.context for item in batch]))[CACHE_ARGUMENT]
                for questions in zip(*(item.questions for item in batch), strict=True):
                    yield from answer_questions(model, cache, questions)
                    bar.update(len(questions))


def answer_questions(model: PreTrainedModel, context: Any, questions: Sequence[Question]) -> Iterator[Answer]:
    """Answers one question per row of `context`, a cache that is not changed."""
    candidates = [[question.answer, *question.distractors] for question in questions]
    count, query_tokens = len(candidates[0]), len(questions[0].query)
    rows = [torch.tensor(q.query + answer) for q, group in zip(questions, candidates, strict=True) for answer in group]
    # padding follows all tokens that are read
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    cache = copy.deepcopy(context)
    repeat_rows(cache, len(candidates), count)
    out = model(input_ids=input_ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    logits = out.logits[:, query_tokens - 1 : -1].float()
    answers = input_ids[:, query_tokens:]
    log_p = F.log_softmax(logits, dim=-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    is_top = logits.argmax(-1) == answers
    for number, (question, group) in enumerate(zip(questions, candidates, strict=True)):
        first = number * count
        scores = [log_p[first + i, : len(answer)].mean().item() for i, answer in enumerate(group)]
        acc = float(scores[0] == max(scores)) / scores.count(max(scores))
        yield Answer(question.depth, acc, float(is_top[first, : len(question.answer)].all()), scores[0])


def repeat_rows(cache: Any, rows: int, count: int) -> None:
    """Repeats each of the `rows` of `cache` `count` times, in place."""
    if all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", ())):
        cache.batch_repeat_interleave(count)
    else:  # recurrent layers of `transformers` have only this
        cache.reorder_cache(torch.arange(rows).repeat_interleave(count))
