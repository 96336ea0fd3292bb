"""Encodes documents as one stream of tokens, with flags for document starts and for tokens without a loss.

Imports no torch, because the tokenizing processes import this module.
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
from subquad.data.workers import Workers, usable_processors
from subquad.utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = str | Conversation

DOC_START = np.uint32(1 << 30)
"""Flag of the first token of a document."""
LOSS_IGNORED = np.uint32(1 << 31)
"""Flag of a token that is excluded from the loss."""
TOKEN_MASK = np.uint32((1 << 30) - 1)
"""The token id, without flags."""
BATCH_CHARACTERS = 2**20
IN_PROCESS_BATCHES = 32
"""Batches that are tokenized before worker processes are started, so that small texts need none."""


@dataclass(frozen=True)
class _RenderedDoc:
    """A document as text that follows the tokens of `prefix`; the spans in the loss, None for the whole text."""

    text: str
    prefix: tuple[int, ...] = ()
    spans: list[Span] | None = None


class Encoder:
    """Encodes documents as token ids with flags, `uint32`.

    A text follows the tokenizer's end-of-text token (without one, its beginning-of-text token, or nothing); a
    conversation is rendered by the chat template.

    assistant_only_loss: flag the tokens of other roles as LOSS_IGNORED, and skip conversations without an assistant.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", assistant_only_loss: bool = False):
        self.tokenizer, self.assistant_only_loss = tokenizer, assistant_only_loss
        self.separator = tuple(separator(tokenizer))
        self.template = Template(tokenizer)

    def encode(self, batch: Sequence[Document]) -> np.ndarray:
        """The tokens of all documents, `[tokens]`. The tokens of a document do not depend on the batch."""
        rendered = [self._render(document) for document in batch]
        texts = [doc for doc in rendered if isinstance(doc, _RenderedDoc)]
        encoded = iter(self._tokenize([doc.text for doc in texts], any(doc.spans is not None for doc in texts)))
        pieces: list[np.ndarray] = []
        # Runs of texts without spans, nearly all documents, become one array each.
        for plain, run in itertools.groupby(rendered, lambda doc: isinstance(doc, _RenderedDoc) and doc.spans is None):
            if plain:
                pieces.append(_join_documents([(*doc.prefix, *next(encoded)[0]) for doc in run]))  # type: ignore[union-attr]
                continue
            for doc in run:
                if isinstance(doc, _RenderedDoc):
                    ids, offsets = next(encoded)
                    pieces.append(_set_flags(ids, _overlaps_spans(offsets, doc.spans or [])))
                elif doc is not None:
                    pieces.append(doc)
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)

    def is_python_bound(self, batch: Sequence[Document]) -> bool:
        """Whether Python code does most of the work for a batch."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None) is not None
        return not fast or any(isinstance(document, Conversation) for document in batch)

    def _render(self, document: Document) -> _RenderedDoc | np.ndarray | None:
        """A document as text, or as tokens if the template marks the assistant; None if no token is in the loss."""
        if isinstance(document, str):
            return _RenderedDoc(document, self.separator)
        if not self.assistant_only_loss:
            return _RenderedDoc(self.template.render(document))
        if not document.has_assistant:
            return None
        if self.template.has_generation_tags:
            return _set_flags(*self.template.tokenize_with_mask(document))
        text = self.template.render(document)
        return _RenderedDoc(text, spans=self.template.assistant_spans(document, text))

    def _tokenize(self, texts: list[str], with_offsets: bool) -> Iterable[tuple[list[int], list[Span]]]:
        """Token ids of each text, and with offsets the characters of each token."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Earlier calls may have set these.
            backend.no_padding()
            backend.no_truncation()
            encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
            return ((e.ids, e.offsets if with_offsets else []) for e in encode(texts, add_special_tokens=False))
        if with_offsets:
            raise UserError(
                "data.assistant_only_loss: got true for a tokenizer without character offsets, expected a fast one "
                "or a chat template with {% generation %}"
            )
        if not texts:
            return ()
        tokens = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return ((ids, []) for ids in tokens["input_ids"])  # type: ignore[union-attr]


def separator(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens before each text."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return [token]
    return []


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """Identifies the tokenizer: equal fingerprints give equal tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), separator(tokenizer)]
    definition = json.loads(backend.to_str())
    # Earlier calls may have set these, and they do not affect the encoder.
    definition.pop("truncation", None)
    definition.pop("padding", None)
    return [definition, separator(tokenizer)]


def _join_documents(documents: list[tuple[int, ...]]) -> np.ndarray:
    """One array of documents, with flags at their starts."""
    lengths = np.fromiter((len(d) for d in documents if d), np.int64)
    tokens = np.fromiter(itertools.chain.from_iterable(documents), np.uint32, count=int(lengths.sum()))
    tokens[np.cumsum(lengths) - lengths] |= DOC_START
    return tokens


def _set_flags(ids: Sequence[int], in_loss: Sequence[bool]) -> np.ndarray:
    """The tokens of one document, with flags at its start and at tokens that are not in the loss."""
    tokens = np.array(ids, np.uint32)
    tokens[~np.array(in_loss, bool)] |= LOSS_IGNORED
    tokens[:1] |= DOC_START
    return tokens


def _overlaps_spans(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Whether each token has a character in one of the spans, which are sorted."""
    overlaps, index = [], 0
    for start, end in offsets:
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        overlaps.append(index < len(spans) and end > spans[index][0])
    return overlaps


# ---------------------------------------------------------------------- all documents of a source


def token_stream(
    encoder: Encoder, documents: Iterator[Document], limit: int | None, name: str, jobs: int | None = None
) -> Iterator[np.ndarray]:
    """The tokens of whole documents, in arrays of any size, until there are at least `limit` tokens.

    The tokens do not depend on the number of processes. Plain text needs one process: the tokenizer's threads use two
    processors as well as processes do, and Python's part, 15 ms per million characters, would suffice for twenty. Chat
    templates and tokenizers written in Python need more.

    jobs: number of processes; None: one for plain text, else one per processor.
    """
    count = 0

    def batches() -> Iterator[list[Document]]:
        while limit is None or count < limit:
            # Tokens are rarely shorter than two characters, so a batch rarely exceeds the limit.
            characters = BATCH_CHARACTERS if limit is None else min(BATCH_CHARACTERS, 2 * (limit - count))
            batch = _take_characters(documents, characters)
            if not batch:
                return
            yield batch

    with tqdm(desc=f"tokenizing {name}", unit=" tokens", unit_scale=True, delay=3, file=sys.stderr) as progress:
        for tokens in _encode_batches(encoder, batches(), jobs):
            if limit is not None and count + len(tokens) > limit:
                # The last document is the one that reaches the limit, independent of the batches.
                starts = np.flatnonzero(tokens & DOC_START)
                tokens = tokens[: next(iter(starts[starts >= limit - count]), None)]
            count += len(tokens)
            progress.update(len(tokens))
            yield tokens
            if limit is not None and count >= limit:
                return


def _encode_batches(encoder: Encoder, batches: Iterator[list[Document]], jobs: int | None) -> Iterator[np.ndarray]:
    yield from map(encoder.encode, itertools.islice(batches, IN_PROCESS_BATCHES))
    batch = next(batches, None)
    if batch is None:
        return
    batches = itertools.chain([batch], batches)
    if jobs is None:
        jobs = usable_processors() if encoder.is_python_bound(batch) else 1
    # A tokenizer class from outside transformers may not be importable in the workers.
    if jobs == 1 or not type(encoder.tokenizer).__module__.startswith("transformers."):
        yield from map(encoder.encode, batches)
        return
    with Workers(encoder, jobs) as workers:
        yield from workers.map(batches)


def _take_characters(documents: Iterator[Document], characters: int) -> list[Document]:
    """The next documents, until they have at least so many characters."""
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return batch
