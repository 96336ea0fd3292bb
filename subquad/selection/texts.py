"""Texts on which groups are ranked: contexts, and endings whose tokens are predicted."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from subquad.data.packing import IGNORE_INDEX
from subquad.data.recall_tasks import PromptSource, draw_needles
from subquad.utils import UserError

KINDS = ("number", "word", "number", "uuid", "word", "number")
"""Values of the statements in each context, in random order."""
ANSWER_TOKENS = 8
"""Longer answers are cut, those of uuid."""
ENDING_TOKENS = 96
"""Of `plain_texts`."""


HAYSTACK = 32, 512
"""Rows and tokens of each row of the natural text that a ranking reads."""


class Texts(NamedTuple):
    """Texts of equal lengths, and what is measured at their ends.

    contexts: `[B, T]`. endings: the tokens after them, `[B, S]`. labels: the token that follows each token of an
    ending, `[B, S]`; -100 where nothing is measured.
    """

    contexts: Tensor
    endings: Tensor
    labels: Tensor


def retrieval_texts(
    tokenizer: PreTrainedTokenizerBase, haystack: Tensor, length: int, rows: int, window: int, seed: int
) -> Texts:
    """`rows` contexts of about `length` tokens of the text `haystack: [N]`, with statements of `KINDS` at even depths;
    the endings ask about all of them, one after another in another order, and hold the answers, which are the labels.
    All statements are more than `window` tokens before the endings.

    Raises:
        UserError: `length` or the haystack is too short.
    """
    if length < 3 * window:
        raise UserError(
            f"window: got {window}, expected at most {length // 3}, a third of the {length} tokens of a text"
        )
    source = PromptSource(tokenizer, haystack, random.Random(seed))
    last = 1 - 1.5 * window / length
    depths = [0.02 + (last - 0.02) * i / (len(KINDS) - 1) for i in range(len(KINDS))]
    contexts, endings, labels = [], [], []
    for _ in range(rows):
        item = draw_needles(source.rng.sample(KINDS, len(KINDS)), "sample_text", source, length, *depths)
        contexts.append(item.context)
        asked = source.rng.sample(item.questions, len(item.questions))
        pairs = [(question.query, question.answer[:ANSWER_TOKENS]) for question in asked]
        endings.append([token for query, answer in pairs for token in (*query, *answer)])
        ignored = [IGNORE_INDEX]
        labels.append([token for query, answer in pairs for token in (*ignored * (len(query) - 1), *answer, *ignored)])
    shortest = min(map(len, contexts))
    prompts = torch.tensor([source.prefix + context[len(context) - shortest :] for context in contexts])
    return Texts(prompts, padded(endings, 0), padded(labels, IGNORE_INDEX))


def plain_texts(haystack: Tensor, length: int, rows: int) -> Texts:
    """`rows` pieces of `haystack: [N]`, evenly spaced, of `length` tokens; each token of their endings is predicted."""
    if len(haystack) <= length:
        raise UserError(f"haystack: got {len(haystack)} tokens of text, expected more than {length}")
    starts = torch.linspace(0, len(haystack) - length - 1, rows).long().tolist()
    pieces = torch.stack([haystack[start : start + length + 1] for start in starts])
    context = length - min(ENDING_TOKENS, length // 2)
    return Texts(pieces[:, :context], pieces[:, context:-1], pieces[:, context + 1 :])


def padded(rows: Sequence[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
