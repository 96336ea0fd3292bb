"""Tasks of recall: contexts with questions, drawn from a tokenizer and natural text.

The pieces of a prompt are tokenized separately, so that a prompt has exactly the requested length, and the tokens of an
answer are those in the context.
"""

import itertools
import random
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from subquad.data.encoding import text_prefix
from subquad.utils import UserError

Tokens = list[int]
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

    query: Tokens
    answer: Tokens
    distractors: list[Tokens]
    depth: float | None
    """Position of the answer in the context, from 0 (its start) to 1; None for tasks with one position."""


@dataclass(frozen=True)
class Item:
    """A context and questions about it, whose queries have equal lengths."""

    context: Tokens
    questions: list[Question]


class PromptSource:
    """The tokenizer, natural text `haystack: [N]` and random generator that tasks draw from."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, haystack: Tensor, rng: random.Random):
        self.tokenizer, self.haystack, self.rng = tokenizer, haystack, rng

    def encode(self, text: str) -> Tokens:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def prefix(self) -> Tokens:
        """The tokens that the tokenizer prepends to every text: a beginning-of-text token, or none."""
        return text_prefix(self.tokenizer)

    @cached_property
    def ordinary_tokens(self) -> Tokens:
        """All tokens that are not special."""
        special = set(self.tokenizer.all_special_ids)
        return [token for token in range(len(self.tokenizer)) if token not in special]

    @cached_property
    def words(self) -> list[str]:
        """The words of `WORDS` that, after a space, have the most common number of tokens; all if these are too few."""
        sizes = {word: len(self.encode(" " + word)) for word in WORDS}
        common = Counter(sizes.values()).most_common(1)[0][0]
        found = [word for word in WORDS if sizes[word] == common]
        return found if len(found) >= 3 * TEXT_PAIRS else WORDS

    def sample_tokens(self, count: int, exclude: Collection[int] = (), repeat: bool = False) -> Tokens:
        """Ordinary tokens, none of `exclude`; distinct ones unless `repeat`."""
        avoided = set(exclude)
        free = [token for token in self.ordinary_tokens if token not in avoided]
        needed = 1 if repeat else count
        if len(free) < needed:
            raise UserError(
                f"tokenizer: has {len(free)} unused ordinary tokens, the task needs {needed}; expected a shorter "
                "length, or a larger vocabulary"
            )
        return self.rng.choices(free, k=count) if repeat else self.rng.sample(free, count)

    def sample_text(self, count: int) -> Tokens:
        """Consecutive tokens of the natural text from a random start."""
        if count > len(self.haystack):
            raise UserError(f"haystack: got {len(self.haystack)} tokens of text, expected at least {count}")
        start = self.rng.randrange(len(self.haystack) - count + 1)
        return self.haystack[start : start + count].tolist()

    def repeated_text(self, count: int) -> Tokens:
        """`REPEATED`, repeated."""
        return list(itertools.islice(itertools.cycle(self.encode(REPEATED)), count))


def check_length(length: int, needed: int, task: str) -> None:
    if length < needed:
        raise UserError(f"length: got {length}, expected at least {needed} tokens for {task}")


def insert(pieces: Sequence[Tokens], depths: Sequence[float], filler: Tokens) -> Tokens:
    """`pieces` within `filler`, each at its depth."""
    context, before = [], 0
    for piece, depth in zip(pieces, depths, strict=True):
        start = round(depth * len(filler))
        context += [*filler[before:start], *piece]
        before = start
    return context + filler[before:]


# ---------------------------------------------------------------------- needles

VALUE_KINDS: dict[str, Callable[[PromptSource], str]] = {
    "number": lambda source: str(source.rng.randint(10_000, 99_999)),
    "word": lambda source: source.rng.choice(source.words),
    "uuid": lambda source: str(uuid.UUID(int=source.rng.getrandbits(128), version=4)),
}


def draw_needle(kind: str, filler: str, source: PromptSource, length: int, depth: float) -> Item:
    """A statement within a long text, whose beginning is the query (Kamradt's needle in a haystack).

    filler: the method of `source` that draws the text.
    """
    return draw_needles([kind], filler, source, length, depth)


def draw_needles(kinds: Sequence[str], filler: str, source: PromptSource, length: int, *depths: float) -> Item:
    """Statements about different names within a long text, one of each of `kinds` at each of `depths`, and a question
    about each. The queries can differ in length; the prompt with the longest has `length` tokens."""
    pieces, questions = [], []
    for kind, name, depth in zip(kinds, source.rng.sample(source.words, len(kinds)), depths, strict=True):
        answer, *distractors = draw_values(source, kind, name)
        opening = source.encode(f"\nThe {kind} of the {name} is")
        pieces.append([*opening, *answer, *source.encode(".\n")])
        questions.append(Question(opening, answer, distractors, depth))
    needed = sum(map(len, pieces)) + max(len(question.query) for question in questions)
    check_length(length, needed, f"needle_{kinds[0]}")
    return Item(insert(pieces, depths, getattr(source, filler)(length - needed)), questions)


def draw_values(source: PromptSource, kind: str, name: str) -> list[Tokens]:
    """An answer and its distractors: distinct values other than `name`, with equally many tokens if enough draws find
    some."""
    texts = {name}
    values: list[Tokens] = []
    for attempt in itertools.count():
        text = VALUE_KINDS[kind](source)
        tokens = source.encode(" " + text)
        any_length = attempt >= SAME_LENGTH_DRAWS * len(values)
        if text not in texts and (any_length or len(tokens) == len(values[0])):
            texts.add(text)
            values.append(tokens)
        if len(values) > NUM_DISTRACTORS:
            break
    return values


# ---------------------------------------------------------------------- associations


def draw_word_pairs(source: PromptSource, length: int, *depths: float) -> Item:
    """Pairs of words between passages of natural text, several of which are queried (multi-query)."""
    words = source.rng.sample(source.words, 2 * TEXT_PAIRS)
    keys = [source.encode(f"\n{word}:") for word in words[:TEXT_PAIRS]]
    values = [source.encode(f" {word}") for word in words[TEXT_PAIRS:]]
    end = source.encode("\n")
    pairs = [[*key, *value, *end] for key, value in zip(keys, values, strict=True)]
    needed = sum(map(len, pairs)) + max(map(len, keys))
    check_length(length, needed, "assoc_text")
    context = spread_evenly(pairs, source.sample_text(length - needed))
    return Item(context, list(pair_questions(source, keys, values, depths)))


def draw_token_pairs(source: PromptSource, length: int, *depths: float) -> Item:
    """Pairs of random tokens between random tokens (MQAR of Zoology, arXiv 2312.04927, zero-shot)."""
    count = max(NUM_DISTRACTORS + 1, length // TOKENS_PER_PAIR)
    check_length(length, 2 * count + 1, "assoc_tokens")
    drawn = source.sample_tokens(2 * count)
    keys, values = [[key] for key in drawn[:count]], [[value] for value in drawn[count:]]
    filler = source.sample_tokens(length - 2 * count - 1, drawn, repeat=True)
    context = spread_evenly([[*key, *value] for key, value in zip(keys, values, strict=True)], filler)
    return Item(context, list(pair_questions(source, keys, values, depths)))


def draw_induction(source: PromptSource, length: int, depth: float) -> Item:
    """A B between random tokens, and A as the query: B follows (Olsson et al., arXiv 2209.11895)."""
    check_length(length, NUM_DISTRACTORS + 3, "induction")
    pair = source.sample_tokens(2)
    others = source.sample_tokens(NUM_DISTRACTORS, exclude=pair)
    filler = others + source.sample_tokens(length - 3 - NUM_DISTRACTORS, pair, repeat=True)
    source.rng.shuffle(filler)
    question = Question(pair[:1], pair[1:], [[other] for other in others], depth)
    return Item(insert([pair], [depth], filler), [question])


def pair_questions(
    source: PromptSource, keys: list[Tokens], values: list[Tokens], depths: Sequence[float]
) -> Iterator[Question]:
    """For each depth, a question about the pair there; distractors are values of other pairs.

    Shorter keys are padded with newlines to the length of the longest.
    """
    longest = max(map(len, keys))
    for depth in depths:
        at = round(depth * (len(keys) - 1))
        distractors = source.rng.sample([value for i, value in enumerate(values) if i != at], NUM_DISTRACTORS)
        padding = (source.encode("\n") * longest)[: longest - len(keys[at])]
        yield Question(padding + keys[at], values[at], distractors, depth)


def spread_evenly(pairs: list[Tokens], filler: Tokens) -> Tokens:
    """`pairs` within `filler` at equal distances, the first at its start and the last at its end."""
    return insert(pairs, [index / max(1, len(pairs) - 1) for index in range(len(pairs))], filler)


# ---------------------------------------------------------------------- copying


def draw_copy(source: PromptSource, length: int, _depth: float) -> Item:
    """A sequence of random tokens twice, whose last tokens are the answer (arXiv 2402.01032).

    Distractors are the answer's tokens in another order. The answer has one position, whatever the depth.
    """
    check_length(length, 5 * COPY_TOKENS, "copy")
    size, odd = divmod(length + COPY_TOKENS, 2)
    noise = source.sample_tokens(size - COPY_TOKENS, repeat=True)
    answer = source.sample_tokens(COPY_TOKENS)
    whole = [*source.sample_tokens(odd, repeat=True), *noise, *answer, *noise]
    distractors: list[Tokens] = []
    while len(distractors) < NUM_DISTRACTORS:
        other = source.rng.sample(answer, COPY_TOKENS)
        if other not in (answer, *distractors):
            distractors.append(other)
    return Item(whole[:-1], [Question(whole[-1:], answer, distractors, None)])


TASKS: dict[str, Callable[..., Item]] = {
    **{f"needle_{kind}": partial(draw_needle, kind, "sample_text") for kind in VALUE_KINDS},
    **{f"needle_{kind}_repeated": partial(draw_needle, kind, "repeated_text") for kind in VALUE_KINDS},
    "assoc_text": draw_word_pairs,
    "assoc_tokens": draw_token_pairs,
    "copy": draw_copy,
    "induction": draw_induction,
}
"""Functions of a source, the length of the prompt, and a depth, or for `MULTI_QUERY` all depths."""
MULTI_QUERY = "assoc_text", "assoc_tokens"


def make_items(task: str, source: PromptSource, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """`items` questions for each depth, after the tokenizer's prefix, which counts towards the length."""
    for asked in [depths] if task in MULTI_QUERY else [[depth] for depth in depths]:
        for _ in range(items):
            made = TASKS[task](source, length - len(source.prefix), *asked)
            yield Item(source.prefix + made.context, made.questions)
