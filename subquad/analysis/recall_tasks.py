"""Questions about a context, made of a tokenizer, real text and chance: the tasks of `recall.py`. Knows no model.

Prompts are put together from pieces that are tokenised alone, so that each has exactly the length that was asked for,
and the tokens of an answer are those that stand in the context.
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

DISTRACTORS = 3
TEXT_PAIRS = 8
"""Associations in a text; random tokens hold one in every `TOKENS_A_PAIR` tokens."""
TOKENS_A_PAIR = 16
COPIED = 8
"""Tokens of a repeated sequence that are asked for."""
SAME_LENGTH_DRAWS = 200
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
    """Behind a context stands `ask`, and then `answer` should; each of `distractors` might. All are token ids."""

    ask: Tensor
    answer: Tensor
    distractors: tuple[Tensor, ...]
    depth: float | None
    """Where the answer stands in the prompt, 0 (its start) to 1; None where a task knows but one place."""


@dataclass(frozen=True)
class Item:
    """A context and questions about it, each of `len(context) + len(ask)` tokens."""

    context: Tensor
    questions: tuple[Question, ...]


Task = Callable[["Source", int, Sequence[float], int], Iterator[Item]]
"""Of a source, a length, depths and a number: so many questions at each depth, with prompts of that length."""


class Source:
    """What tasks are made of."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, haystack: Tensor, rng: random.Random):
        self.tokenizer, self.haystack, self.rng = tokenizer, haystack, rng

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @cached_property
    def start(self) -> list[int]:
        """What this tokenizer puts in front of every text: often a beginning-of-text token, often nothing."""
        whole, plain = self.tokenizer("a").input_ids, self.encode("a")
        found = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return list(whole[:found])

    @cached_property
    def ordinary(self) -> list[int]:
        """Tokens of the vocabulary that are not special."""
        special = set(self.tokenizer.all_special_ids)
        return [token for token in range(len(self.tokenizer)) if token not in special]

    @cached_property
    def words(self) -> list[str]:
        """Those words that this tokenizer writes, behind a space, in the commonest number of tokens; all of them where
        those are too few for a text with pairs."""
        sizes = {word: len(self.encode(" " + word)) for word in WORDS}
        common = Counter(sizes.values()).most_common(1)[0][0]
        found = [word for word in WORDS if sizes[word] == common]
        return found if len(found) >= 3 * TEXT_PAIRS else list(WORDS)

    def tokens(self, count: int, but: Sequence[int] = ()) -> list[int]:
        """Different ordinary tokens, none of `but`."""
        avoided = set(but)
        free = [token for token in self.ordinary if token not in avoided]
        if count > len(free):
            raise UserError(
                f"recall needs {count} different tokens, of which the tokenizer has {len(free)} to spare; ask for a "
                "shorter length"
            )
        return self.rng.sample(free, count)

    def real(self, count: int) -> list[int]:
        """Consecutive tokens of the real text, from somewhere."""
        if count > len(self.haystack):
            raise UserError(f"haystack: got {len(self.haystack)} tokens of text, expected at least {count}")
        start = self.rng.randrange(len(self.haystack) - count + 1)
        return self.haystack[start : start + count].tolist()

    def repeated(self, count: int) -> list[int]:
        """The same two sentences, over and over."""
        sentence = self.encode(REPEATED)
        return (sentence * (count // len(sentence) + 1))[:count]


def item(context: Sequence[int], *questions: Question) -> Item:
    return Item(torch.tensor(context), questions)


def question(
    ask: Sequence[int], answer: Sequence[int], others: Sequence[Sequence[int]], depth: float | None
) -> Question:
    return Question(torch.tensor(ask), torch.tensor(answer), tuple(torch.tensor(o) for o in others), depth)


def check_room(length: int, needed: int, what: str) -> None:
    if length < needed:
        raise UserError(f"length: got {length}, expected at least {needed} tokens, which {what} takes")


# ---------------------------------------------------------------------- needles

VALUES: dict[str, Callable[[Source], str]] = {
    "number": lambda source: str(source.rng.randint(10_000, 99_999)),
    "word": lambda source: source.rng.choice(source.words),
    "uuid": lambda source: str(uuid.UUID(int=source.rng.getrandbits(128), version=4)),
}


def needle(kind: str, filler: str, source: Source, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """One statement in a long text, and its beginning again at the end (Kamradt's needle in a haystack)."""
    for depth in depths:
        for _ in range(items):
            name = source.rng.choice(source.words)
            answer, *others = values(source, kind, name)
            opening = source.encode(f"\nThe {kind} of the {name} is")
            statement = [*opening, *answer, *source.encode(".\n")]
            check_room(length, len(statement) + len(opening), f"its needle_{kind}")
            hay = getattr(source, filler)(length - len(statement) - len(opening))
            place = round(depth * len(hay))
            context = [*hay[:place], *statement, *hay[place:]]
            yield item(context, question(opening, answer, others, depth))


def values(source: Source, kind: str, name: str) -> list[list[int]]:
    """Different values, of as many tokens as the first where enough draws find some."""
    draw, texts = VALUES[kind], {name}
    found: list[list[int]] = []
    for attempt in range(SAME_LENGTH_DRAWS * (DISTRACTORS + 1)):
        text = draw(source)
        tokens = source.encode(" " + text)
        patient = attempt < SAME_LENGTH_DRAWS * len(found)
        if text in texts or (found and patient and len(tokens) != len(found[0])):
            continue
        texts.add(text)
        found.append(tokens)
        if len(found) > DISTRACTORS:
            break
    return found


# ---------------------------------------------------------------------- associations


def assoc_text(source: Source, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """Pairs of words among passages of real text; of each context several are asked for (multi-query)."""
    for _ in range(items):
        words = source.rng.sample(source.words, 2 * TEXT_PAIRS)
        keys = [source.encode(f"\n{word}:") for word in words[:TEXT_PAIRS]]
        held = [source.encode(f" {word}") for word in words[TEXT_PAIRS:]]
        end = source.encode("\n")
        pairs = [[*key, *value, *end] for key, value in zip(keys, held, strict=True)]
        asked = max(map(len, keys))
        needed = sum(map(len, pairs)) + asked
        check_room(length, needed, "its assoc_text")
        context = scattered(pairs, source.real(length - needed))
        yield item(context, *ask_pairs(source, keys, held, depths, asked))


def assoc_tokens(source: Source, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """Pairs of random tokens among random tokens (Zoology's MQAR, arXiv 2312.04927, zero-shot)."""
    count = max(DISTRACTORS + 1, length // TOKENS_A_PAIR)
    check_room(length, 2 * count + 1, "its assoc_tokens")
    for _ in range(items):
        drawn = source.tokens(2 * count)
        keys, held = [[k] for k in drawn[:count]], [[v] for v in drawn[count:]]
        filler = noise(source, length - 2 * count - 1, drawn)
        context = scattered([[*k, *v] for k, v in zip(keys, held, strict=True)], filler)
        yield item(context, *ask_pairs(source, keys, held, depths, 1))


def induction(source: Source, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """A B among random tokens, and A again at the end (Olsson et al., arXiv 2209.11895): B follows."""
    check_room(length, DISTRACTORS + 3, "induction")
    for depth in depths:
        for _ in range(items):
            key, value = source.tokens(2)
            others = source.tokens(DISTRACTORS, but=[key, value])
            filler = [*others, *noise(source, length - 3 - DISTRACTORS, [key, value])]
            source.rng.shuffle(filler)
            place = round(depth * len(filler))
            context = [*filler[:place], key, value, *filler[place:]]
            yield item(context, question([key], [value], [[other] for other in others], depth))


def ask_pairs(
    source: Source, keys: list[list[int]], held: list[list[int]], depths: Sequence[float], asked: int
) -> Iterator[Question]:
    """At each depth, the pair that stands there; distractors are values of other pairs. Each question has `asked`
    tokens: a shorter key comes behind some of the first key's end, a separator."""
    for depth in depths:
        at = round(depth * (len(keys) - 1))
        others = source.rng.sample([value for i, value in enumerate(held) if i != at], DISTRACTORS)
        padding = source.encode("\n") * asked
        short = asked - len(keys[at])
        yield question([*padding[:short], *keys[at]], held[at], others, depth)


def scattered(pairs: list[list[int]], filler: list[int]) -> list[int]:
    """`pairs` among `filler` at equal distances, the first at its start and the last at its end."""
    context, before = [], 0
    for index, pair in enumerate(pairs):
        place = round(index / max(1, len(pairs) - 1) * len(filler))
        context += [*filler[before:place], *pair]
        before = place
    return context


def noise(source: Source, count: int, but: Sequence[int]) -> list[int]:
    """Random tokens, any of which may come again, none of `but`."""
    avoided = set(but)
    free = [token for token in source.ordinary if token not in avoided]
    if not free:
        raise UserError("recall needs random tokens besides those it asks for; the tokenizer has too few")
    return source.rng.choices(free, k=count)


# ---------------------------------------------------------------------- copying


def copying(source: Source, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """A sequence of random tokens twice, and the last of its second time are asked for (arXiv 2402.01032); distractors
    are the same tokens in another order. There is one place, so that `depths` say only how many there are."""
    check_room(length, 5 * COPIED, "copy")
    size, odd = divmod(length + COPIED, 2)
    for _ in range(items * len(depths)):
        sequence = [*noise(source, size - COPIED, []), *source.tokens(COPIED)]
        whole = [*noise(source, odd, []), *sequence, *sequence]
        answer = sequence[-COPIED:]
        others: list[list[int]] = []
        while len(others) < DISTRACTORS:
            other = source.rng.sample(answer, COPIED)
            others += [other] if other not in (answer, *others) else []
        yield item(whole[: length - 1], question(whole[length - 1 : length], answer, others, None))


def make(task: str, source: Source, length: int, depths: Sequence[float], items: int) -> Iterator[Item]:
    """The items of a task; what stands in front of every text counts as part of the length."""
    for made in TASKS[task](source, length - len(source.start), depths, items):
        yield replace(made, context=torch.cat([made.context.new_tensor(source.start), made.context]))


TASKS: dict[str, Task] = {
    **{f"needle_{kind}": partial(needle, kind, "real") for kind in VALUES},
    **{f"needle_{kind}_repeated": partial(needle, kind, "repeated") for kind in VALUES},
    "assoc_text": assoc_text,
    "assoc_tokens": assoc_tokens,
    "copy": copying,
    "induction": induction,
}
