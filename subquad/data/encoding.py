"""Documents to one stream of tokens, each with what a row has to know of it beside it.

Free of torch: the processes that tokenise import it.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from subquad.data.chat import Conversation, Span, Template
from subquad.data.workers import Workers, processors
from subquad.utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = str | Conversation

START = np.uint32(1 << 30)
"""This token is the first of a document."""
LOSS_IGNORED = np.uint32(1 << 31)
"""This token is read, but not learned."""
TOKEN = np.uint32((1 << 30) - 1)
BATCH_CHARACTERS = 2**20
IN_PROCESS_BATCHES = 32
"""Batches that a process tokenises by itself before it starts others: what is small is done before they are up."""


@dataclass(frozen=True)
class _RenderedDoc:
    """A document as text to be tokenised, behind `prefix`; what is learned of it, where that is not all."""

    text: str
    prefix: tuple[int, ...] = ()
    spans: list[Span] | None = None


class Encoder:
    """Documents to tokens with their flags, `uint32`.

    A text stands behind the tokenizer's end-of-text token (where it has none, its beginning-of-text token, else
    nothing), a conversation as its chat template writes it.

    assistant_only_loss: flag the tokens of other roles as LOSS_IGNORED; skip conversations without an assistant.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", assistant_only_loss: bool = False):
        self.tokenizer, self.assistant_only_loss = tokenizer, assistant_only_loss
        self.separator = tuple(separator(tokenizer))
        self.template = Template(tokenizer)

    def encode(self, batch: Sequence[Document]) -> np.ndarray:
        """`[tokens]`; a document gives the same ones whatever others are in its batch."""
        written = [self._written(document) for document in batch]
        texts = [w for w in written if isinstance(w, _RenderedDoc)]
        encoded = iter(self._encoded([w.text for w in texts], any(w.spans is not None for w in texts)))
        pieces: list[np.ndarray] = []
        # Runs of texts without spans, nearly everything, become arrays at once.
        for plain, run in itertools.groupby(written, lambda w: isinstance(w, _RenderedDoc) and w.spans is None):
            if plain:
                pieces.append(_run([(*w.prefix, *next(encoded)[0]) for w in run]))  # type: ignore[union-attr]
                continue
            for w in run:
                if isinstance(w, _RenderedDoc):
                    ids, offsets = next(encoded)
                    pieces.append(_flagged(ids, _inside(offsets, w.spans or [])))
                elif w is not None:
                    pieces.append(w)
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)

    def is_python(self, batch: Sequence[Document]) -> bool:
        """Whether Python code does most of the work for such a batch."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None) is not None
        return not fast or any(isinstance(document, Conversation) for document in batch)

    def _written(self, document: Document) -> _RenderedDoc | np.ndarray | None:
        """A document as text; as tokens where the template gives those itself; None where nothing is to be learned."""
        if isinstance(document, str):
            return _RenderedDoc(document, self.separator)
        if not self.assistant_only_loss:
            return _RenderedDoc(self.template.render(document))
        if not document.has_assistant:
            return None
        if self.template.marks_assistant:
            return _flagged(*self.template.marked(document))
        text = self.template.render(document)
        return _RenderedDoc(text, spans=self.template.assistant_spans(document, text))

    def _encoded(self, texts: list[str], with_offsets: bool) -> Iterable[tuple[list[int], list[Span]]]:
        """Tokens of each text, and the characters that each stands for where that is asked."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Left behind by earlier calls.
            backend.no_padding()
            backend.no_truncation()
            encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
            return ((e.ids, e.offsets if with_offsets else []) for e in encode(texts, add_special_tokens=False))
        if with_offsets:
            raise UserError(
                "assistant_only_loss needs a tokenizer that knows which characters its tokens stand for (a fast one), "
                "or a chat template with {% generation %}"
            )
        if not texts:
            return ()
        tokens = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return ((ids, []) for ids in tokens["input_ids"])  # type: ignore[union-attr]


def separator(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What stands before each text."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return [token]
    return []


def identity(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """What has to be the same for a text to give the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), separator(tokenizer)]
    definition = json.loads(backend.to_str())
    # Left behind by earlier calls; the calls here set neither.
    definition.pop("truncation", None)
    definition.pop("padding", None)
    return [definition, separator(tokenizer)]


def _run(documents: list[tuple[int, ...]]) -> np.ndarray:
    lengths = np.fromiter((len(d) for d in documents if d), np.int64)
    tokens = np.fromiter(itertools.chain.from_iterable(documents), np.uint32, count=int(lengths.sum()))
    tokens[np.cumsum(lengths) - lengths] |= START
    return tokens


def _flagged(ids: Sequence[int], counted: Sequence[bool]) -> np.ndarray:
    tokens = np.array(ids, np.uint32)
    tokens[~np.array(counted, bool)] |= LOSS_IGNORED
    tokens[:1] |= START
    return tokens


def _inside(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Whether each token has a character within one of the spans, which are in order."""
    inside, at = [], 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside.append(at < len(spans) and end > spans[at][0])
    return inside


# ---------------------------------------------------------------------- all documents of a source


def token_stream(
    encoder: Encoder, documents: Iterator[Document], limit: int | None, name: str, jobs: int | None = None
) -> Iterator[np.ndarray]:
    """The tokens of whole documents, up to the one with which there are `limit` of them, in arrays of any size.

    The same tokens whatever the number of processes. Plain text is the tokenizer's own threads' work: they keep two
    processors as busy as processes do, and what is left to Python, 15 ms for a million characters, would keep twenty.
    Chat templates and tokenizers in Python need processes.

    jobs: how many; None: one for plain text, else as many as there are processors.
    """
    count = 0

    def batches() -> Iterator[list[Document]]:
        while limit is None or count < limit:
            # A token is seldom shorter than two characters: so a batch hardly ever goes past the limit.
            characters = BATCH_CHARACTERS if limit is None else min(BATCH_CHARACTERS, 2 * (limit - count))
            batch = _take_characters(documents, characters)
            if not batch:
                return
            yield batch

    with tqdm(desc=f"tokenising {name}", unit=" tokens", unit_scale=True, delay=3, file=sys.stderr) as progress:
        for tokens in _in_processes(encoder, batches(), jobs):
            if limit is not None and count + len(tokens) > limit:
                # The last document is the one that reaches the limit, however the others were batched.
                starts = np.flatnonzero(tokens & START)
                tokens = tokens[: next(iter(starts[starts >= limit - count]), None)]
            count += len(tokens)
            progress.update(len(tokens))
            yield tokens
            if limit is not None and count >= limit:
                return


def _in_processes(encoder: Encoder, batches: Iterator[list[Document]], jobs: int | None) -> Iterator[np.ndarray]:
    yield from map(encoder.encode, itertools.islice(batches, IN_PROCESS_BATCHES))
    batch = next(batches, None)
    if batch is None:
        return
    batches = itertools.chain([batch], batches)
    if jobs is None:
        jobs = processors() if encoder.is_python(batch) else 1
    # A tokenizer of someone else's code may not be importable elsewhere.
    if jobs == 1 or not type(encoder.tokenizer).__module__.startswith("transformers."):
        yield from map(encoder.encode, batches)
        return
    with Workers(encoder, jobs) as workers:
        yield from workers.map(batches)


def _take_characters(documents: Iterator[Document], characters: int) -> list[Document]:
    """The next documents, until they have so many characters."""
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return batch
