"""The tasks of `recall.py`: contexts with questions, drawn from a tokenizer and natural text.

The pieces of a prompt are tokenized separately, so that a prompt has exactly the requested length, and the tokens of an
answer are those in the context.
"""

import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from subquad.utils import UserError

NUM_DISTRACTORS = 3
TEXT_PAIRS = 8
"""Pairs in a context of `assoc_text`."""
TOKENS_PER_PAIR = 16
"""Context tokens per pair of `assoc_tokens`."""
COPY_TOKENS = 8
"""Tokens of the repeated sequence that the answer consists of."""
SAME_LENGTH_DRAWS = 200
"""Draws for a distractor with as many tokens as the answer."""
REPEATED = "\nThe rain fell on the roof and the wind went through the grass. Nothing else happened on that day."
WORD_LIST = """
anchor apple arrow basket bell bottle bread bridge button candle castle chair clock cloud coat copper desert door drum
eagle engine feather field finger fire forest garden glass gold hammer harbor honey horse house iron island jacket
kettle key kitchen ladder lake lamp leaf letter market mirror moon mountain needle ocean orange paper pearl pepper piano
pocket pond queen rabbit ring river road rope rose salt school shadow ship silver snow spoon star stone storm street
sugar summer table thread tiger tower train valley violin wagon wall water wheel window winter wolf
"""
WORDS = WORD_LIST.split()


@dataclass(frozen=True)
class Question:
    """A query that follows a context, its answer, and wrong candidates; all token ids."""

    query: Tensor
    answer: Tensor
    distractors: tuple[Tensor, ...]
    depth: float | None
    """Position of the answer in the context, from 0 (its start) to 1; None for tasks with one position."""


@dataclass(frozen=True)
class Item:
    """A context and questions about it, whose queries have equal lengths."""

    context: Tensor
    questions: tuple[Question, ...]


Task = Callable[["PromptSource", int, Sequence[float], int], Iterator[Item]]
"""Draws items from a source, with prompts of a length in tokens: for each depth, a number of questions."""


class PromptSource:
    """The tokenizer, natural text `haystack: [N]` and random generator that tasks draw from."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, haystack: Tensor, rng: random.Random):
        self.tokenizer, self.haystack, self.rng = tokenizer, haystack, rng

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def prefix(self) -> list[int]:
        """The tokens that the tokenizer prepends to every text: a beginning-of-text token, or none."""
        whole, plain = self.tokenizer("a").input_ids, self.encode("a")
        found = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return list(whole[:found])

    @cached_property
    def ordinary_tokens(self) -> list[int]:
        """All tokens that are not special."""
        special = set(self.tokenizer.all_special_ids)
        return [token for token in range(len(self.tokenizer)) if token not in special]

    @cached_property
    def words(self) -> list[str]:
        """The words of `WORDS` that, after a space, have the most common number of tokens; all if these are too few."""
        sizes = {word: len(self.encode(" " + word)) for word in WORDS}
        common = Counter(sizes.values()).most_common(1)[0][0]
        found = [word for word in WORDS if sizes[word] == common]
        return found if len(found) >= 3 * TEXT_PAIRS else list(WORDS)

    def sample_tokens(self, count: int, exclude: Sequence[int] = ()) -> list[int]:
        """Distinct ordinary tokens, none of `exclude`."""
        avoided = set(exclude)
        free = [token for token in self.ordinary_tokens if token not in avoided]
        if count > len(free):
            raise UserError(
                f"tokenizer: has {len(free)} unused ordinary tokens, the task needs {count}; expected a shorter length"
            )
        return self.rng.sample(free, count)

    def sample_text(self, count: int) -> list[int]:
        """Consecutive tokens of the natural text from a random start."""
        if count > len(self.haystack):
            raise UserError(f"haystack: got {len(self.haystack)} tokens of text, expected at least {count}")
        start = self.rng.randrange(len(self.haystack) - count + 1)
        return self.haystack[start : start + count].tolist()

    def repeated_text(self, count: int) -> list[int]:
        """`REPEATED`, repeated."""
        sentence = self.encode(REPEATED)
        return (sentence * (count // len(sentence) + 1))[:count]


def make_item(context: Sequence[int], *questions: Question) -> Item:
    return Item(torch.tensor(context), questions)


def make_question(
    query: Sequence[int], answer: Sequence[int], distractors: Sequence[Sequence[int]], depth: float | None
) -> Question:
    return Question(torch.tensor(query), torch.tensor(answer), tuple(torch.tensor(d) for d in distractors), depth)


def check_length(length: int, needed: int, task: str) -> None:
    if length < needed:
        raise UserError(f"length: got {length}, expected at least {needed} tokens for {task}")


# ---------------------------------------------------------------------- needles

VALUE_KINDS: dict[str, Callable[[PromptSource], str]] = {
    "number": lambda source: str(source.rng.randint(10_000, 99_999)),
    "word": lambda source: source.rng.choice(source.words),
    "uuid": lambda source: str(uuid.UUID(int=source.rng.getrandbits(128), version=4)),
}


def draw_needles(
    kind: str, filler: str, source: PromptSource, length: int, depths: Sequence[float], items: int
) -> Iterator[Item]:
    """A statement within a long text, whose beginning is the query (Kamradt's needle in a haystack).

    filler: the method of `source` that draws the text.
    """
    for depth in depths:
        for _ in range(items):
            name = source.rng.choice(source.words)
            answer, *distractors = draw_values(source, kind, name)
            opening = source.encode(f"\nThe {kind} of the {name} is")
            statement = [*opening, *answer, *source.encode(".\n")]
            check_length(length, len(statement) + len(opening), f"needle_{kind}")
            text = getattr(source, filler)(length - len(statement) - len(opening))
            start = round(depth * len(text))
            context = [*text[:start], *statement, *text[start:]]
            yield make_item(context, make_question(opening, answer, distractors, depth))


def draw_values(source: PromptSource, kind: str, name: str) -> list[list[int]]:
    """Distinct values other than `name`; if enough draws find some, with as many tokens as the first."""
    draw, texts = VALUE_KINDS[kind], {name}
    values: list[list[int]] = []
    for attempt in range(SAME_LENGTH_DRAWS * (NUM_DISTRACTORS + 1)):
        text = draw(source)
        tokens = source.encode(" " + text)
        same_length_only = attempt < SAME_LENGTH_DRAWS * len(values)
        if text in texts or (values and same_length_only and len(tokens) != len(values[0])):
            continue
        texts.add(text)
        values.append(tokens)
        if len(values) > NUM_DISTRACTORS:
            break
    return values


# ---------------------------------------------------------------------- associations


def draw_word_pairs(source: PromptSource, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """Pairs of words between passages of natural text, several of which are queried (multi-query)."""
    for _ in range(items):
        words = source.rng.sample(source.words, 2 * TEXT_PAIRS)
        keys = [source.encode(f"\n{word}:") for word in words[:TEXT_PAIRS]]
        values = [source.encode(f" {word}") for word in words[TEXT_PAIRS:]]
        end = source.encode("\n")
        pairs = [[*key, *value, *end] for key, value in zip(keys, values, strict=True)]
        query_tokens = max(map(len, keys))
        needed = sum(map(len, pairs)) + query_tokens
        check_length(length, needed, "assoc_text")
        context = spread_evenly(pairs, source.sample_text(length - needed))
        yield make_item(context, *pair_questions(source, keys, values, depths, query_tokens))


def draw_token_pairs(source: PromptSource, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """Pairs of random tokens between random tokens (MQAR of Zoology, arXiv 2312.04927, zero-shot)."""
    count = max(NUM_DISTRACTORS + 1, length // TOKENS_PER_PAIR)
    check_length(length, 2 * count + 1, "assoc_tokens")
    for _ in range(items):
        drawn = source.sample_tokens(2 * count)
        keys, values = [[k] for k in drawn[:count]], [[v] for v in drawn[count:]]
        filler = sample_noise(source, length - 2 * count - 1, drawn)
        context = spread_evenly([[*k, *v] for k, v in zip(keys, values, strict=True)], filler)
        yield make_item(context, *pair_questions(source, keys, values, depths, 1))


def draw_induction(source: PromptSource, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """A B between random tokens, and A as the query: B follows (Olsson et al., arXiv 2209.11895)."""
    check_length(length, NUM_DISTRACTORS + 3, "induction")
    for depth in depths:
        for _ in range(items):
            key, value = source.sample_tokens(2)
            others = source.sample_tokens(NUM_DISTRACTORS, exclude=[key, value])
            filler = [*others, *sample_noise(source, length - 3 - NUM_DISTRACTORS, [key, value])]
            source.rng.shuffle(filler)
            start = round(depth * len(filler))
            context = [*filler[:start], key, value, *filler[start:]]
            yield make_item(context, make_question([key], [value], [[other] for other in others], depth))


def pair_questions(
    source: PromptSource, keys: list[list[int]], values: list[list[int]], depths: Sequence[float], query_tokens: int
) -> Iterator[Question]:
    """For each depth, a question about the pair there; distractors are values of other pairs.

    Shorter keys are padded with newlines to `query_tokens` tokens.
    """
    for depth in depths:
        at = round(depth * (len(keys) - 1))
        distractors = source.rng.sample([value for i, value in enumerate(values) if i != at], NUM_DISTRACTORS)
        padding = source.encode("\n") * query_tokens
        missing = query_tokens - len(keys[at])
        yield make_question([*padding[:missing], *keys[at]], values[at], distractors, depth)


def spread_evenly(pairs: list[list[int]], filler: list[int]) -> list[int]:
    """`pairs` within `filler` at equal distances, the first at its start and the last at its end."""
    context, before = [], 0
    for index, pair in enumerate(pairs):
        start = round(index / max(1, len(pairs) - 1) * len(filler))
        context += [*filler[before:start], *pair]
        before = start
    return context


def sample_noise(source: PromptSource, count: int, exclude: Sequence[int]) -> list[int]:
    """Random ordinary tokens with repetition, none of `exclude`."""
    avoided = set(exclude)
    free = [token for token in source.ordinary_tokens if token not in avoided]
    if not free:
        raise UserError("tokenizer: has no unused ordinary token for filler; expected a larger vocabulary")
    return source.rng.choices(free, k=count)


# ---------------------------------------------------------------------- copying


def draw_copies(source: PromptSource, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """A sequence of random tokens twice, whose last tokens are the answer (arXiv 2402.01032).

    Distractors are the answer's tokens in another order. The answer has one position: `depths` set only the number of
    questions.
    """
    check_length(length, 5 * COPY_TOKENS, "copy")
    size, odd = divmod(length + COPY_TOKENS, 2)
    for _ in range(items * len(depths)):
        sequence = [*sample_noise(source, size - COPY_TOKENS, []), *source.sample_tokens(COPY_TOKENS)]
        whole = [*sample_noise(source, odd, []), *sequence, *sequence]
        answer = sequence[-COPY_TOKENS:]
        distractors: list[list[int]] = []
        while len(distractors) < NUM_DISTRACTORS:
            other = source.rng.sample(answer, COPY_TOKENS)
            distractors += [other] if other not in (answer, *distractors) else []
        yield make_item(whole[: length - 1], make_question(whole[length - 1 : length], answer, distractors, None))


def make_items(task: str, source: PromptSource, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """The items of a task, each after the tokenizer's prefix, which counts towards the length."""
    for made in TASKS[task](source, length - len(source.prefix), depths, items):
        yield replace(made, context=torch.cat([made.context.new_tensor(source.prefix), made.context]))


TASKS: dict[str, Task] = {
    **{f"needle_{kind}": partial(draw_needles, kind, "sample_text") for kind in VALUE_KINDS},
    **{f"needle_{kind}_repeated": partial(draw_needles, kind, "repeated_text") for kind in VALUE_KINDS},
    "assoc_text": draw_word_pairs,
    "assoc_tokens": draw_token_pairs,
    "copy": draw_copies,
    "induction": draw_induction,
}
