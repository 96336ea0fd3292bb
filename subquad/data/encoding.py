"""Encodes documents as one stream of tokens, with flags for document starts and for tokens without a loss."""

import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from subquad import progress
from subquad.data.chat import ASSISTANT, Conversation, Template
from subquad.data.corpora import Document
from subquad.utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = Sequence[Document] | UserError
"""Documents, or an error while reading."""

DOC_START = np.uint32(1 << 30)
"""Flag of the first token of a document."""
LOSS_IGNORED = np.uint32(1 << 31)
"""Flag of a token that is excluded from the loss."""
TOKEN_MASK = np.uint32((1 << 30) - 1)
"""The token id, without flags."""
BATCH_CHARACTERS = 2**20
IN_PROCESS_BATCHES = 32
"""Batches that are tokenized before worker processes are started, so that small texts need none."""
MAX_WORKERS = 16
"""With more workers, reading is the bottleneck."""


def text_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer puts in front of every text: a beginning-of-text token, or none."""
    whole, plain = (list(tokenizer("a", add_special_tokens=add).input_ids) for add in (True, False))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)]


class Encoder(Dataset):
    """Encodes documents as token ids with flags, `uint32`.

    A text begins as the tokenizer begins one (`text_prefix`) and ends with the end-of-text token. Where the tokenizer
    puts nothing in front, a text follows the end-of-text token (without one, the beginning-of-text token, or nothing).
    A conversation is rendered by the chat template.

    assistant_only_loss: flag the tokens of other roles as LOSS_IGNORED, and skip conversations without an assistant.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", assistant_only_loss: bool = False):
        self.tokenizer, self.assistant_only_loss = tokenizer, assistant_only_loss
        self.template = Template(tokenizer)
        eos, bos = ([x] if isinstance(x, int) else [] for x in (tokenizer.eos_token_id, tokenizer.bos_token_id))
        self.prefix = text_prefix(tokenizer)
        """What the tokenizer puts in front of a text; empty where this is the end-of-text token."""
        if self.prefix == eos:
            self.prefix = []
        self.before, self.after = (self.prefix, eos) if self.prefix else (eos or bos, [])
        """The tokens before and after each text."""
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        """Of a fast tokenizer."""
        if self.backend is not None:  # earlier calls may have set these
            self.backend.no_padding()
            self.backend.no_truncation()

    def fingerprint(self) -> list[Any]:
        """Identifies the tokenizer: equal fingerprints give equal tokens of texts."""
        if self.backend is not None:
            return [json.loads(self.backend.to_str()), self.before, self.after]
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return [type(self.tokenizer).__qualname__, vocabulary, self.before, self.after]

    def encode(self, batch: Sequence[Document]) -> np.ndarray:
        """The tokens of all documents, `[tokens]`. The tokens of a document do not depend on the batch."""
        texts = iter(self._tokenize([document for document in batch if isinstance(document, str)]))
        pieces = [
            self._encode_text(next(texts)) if isinstance(document, str) else self._encode_chat(document)
            for document in batch
        ]
        return np.concatenate([np.empty(0, np.uint32), *pieces])

    def __getitem__(self, batch: Batch) -> np.ndarray | Exception:
        """`encode`, for the workers of a DataLoader, which would live on after an error that one of them raises."""
        try:
            return batch if isinstance(batch, UserError) else self.encode(batch)
        except UserError as error:
            return error
        except Exception:
            return RuntimeError(traceback.format_exc())

    def _encode_text(self, ids: list[int]) -> np.ndarray:
        return _set_flags(self.before + ids + self.after)

    def _encode_chat(self, conversation: Conversation) -> np.ndarray:
        if self.assistant_only_loss:
            if not any(message["role"] == ASSISTANT for message in conversation.messages):
                return np.empty(0, np.uint32)
            if self.template.has_generation_tags:
                return _set_flags(*self.template.tokenize_with_mask(conversation))
        text = self.template.render(conversation.messages, conversation.location)
        if not self.assistant_only_loss:
            return _set_flags(next(iter(self._tokenize([text]))))
        spans = self.template.assistant_spans(conversation, text)
        if self.backend is None:
            raise UserError(
                "data.assistant_only_loss: got true for a tokenizer without character offsets, expected a fast one "
                "or a chat template with {% generation %}"
            )
        encoding = self.backend.encode(text, add_special_tokens=False)
        starts, ends = np.array(spans).T
        offsets = np.array(encoding.offsets).reshape(-1, 2)
        next_span = np.searchsorted(ends, offsets[:, 0], side="right")  # the first that ends after the token begins
        return _set_flags(encoding.ids, offsets[:, 1] > np.append(starts, np.inf)[next_span])

    def _tokenize(self, texts: list[str]) -> Iterable[list[int]]:
        if self.backend is not None:
            return (encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False))
        options: Any = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []  # type: ignore[return-value]


def _set_flags(ids: Sequence[int], in_loss: Sequence[bool] | np.ndarray | None = None) -> np.ndarray:
    """The tokens of one document, with flags at its start and at tokens that are not in the loss (None: all are)."""
    tokens = np.array(ids, np.uint32)
    if in_loss is not None:
        tokens[~np.array(in_loss, bool)] |= LOSS_IGNORED
    tokens[:1] |= DOC_START
    return tokens


# ---------------------------------------------------------------------- all documents of a source


def token_stream(encoder: Encoder, documents: Iterable[Document], limit: float, name: str) -> Iterator[np.ndarray]:
    """The tokens of whole documents, in arrays of any size, until there are at least `limit` tokens.

    `name` is the source's, for the progress bar.
    """
    count = 0
    # Tokens are rarely shorter than two characters, so that one batch rarely exceeds the limit.
    batches = document_batches(documents, min(BATCH_CHARACTERS, 2 * limit))
    with progress.bar(None, f"tokenizing {name}", "tok", delay=3) as bar:
        for tokens in _encode_batches(encoder, batches):
            if isinstance(tokens, Exception):
                raise tokens
            if count + len(tokens) > limit:
                # The last document is the one that reaches the limit, independent of the batches.
                starts = np.flatnonzero(tokens & DOC_START)
                tokens = tokens[: next(iter(starts[starts >= limit - count]), None)]
            count += len(tokens)
            bar.update(len(tokens))
            yield tokens
            if count >= limit:
                return


def document_batches(documents: Iterable[Document], characters: float) -> Iterator[Batch]:
    """Lists of documents, each with at least so many characters, except the last. An error while reading is the last
    batch, for the same reason as in `Encoder.__getitem__`."""
    batch: list[Document] = []
    size = 0
    try:
        for document in documents:
            batch.append(document)
            size += len(document)
            if size >= characters:
                yield batch
                batch, size = [], 0
    except UserError as error:
        yield error
    else:
        if batch:
            yield batch


def _encode_batches(encoder: Encoder, batches: Iterator[Batch]) -> Iterator[np.ndarray | Exception]:
    """The tokens of each batch, in order.

    Plain text needs one process: the tokenizer's threads use two processors as well as processes do, and Python's part,
    15 ms per million characters, would suffice for twenty. Chat templates and tokenizers written in Python need more.
    """
    yield from map(encoder.__getitem__, itertools.islice(batches, IN_PROCESS_BATCHES))
    batch = next(batches, [])
    batches = itertools.chain([batch], batches)
    is_plain = isinstance(batch, UserError) or (encoder.backend is not None and all(isinstance(d, str) for d in batch))
    # Only Linux forks safely, and a spawned process would run the user's script again.
    if not batch or is_plain or sys.platform != "linux":
        yield from map(encoder.__getitem__, batches)
        return
    loader: DataLoader = DataLoader(
        encoder,
        sampler=batches,  # the indices are batches
        batch_size=None,
        num_workers=min(len(os.sched_getaffinity(0)), MAX_WORKERS),
        collate_fn=lambda tokens: tokens,
        worker_init_fn=lambda _: os.environ.update(TOKENIZERS_PARALLELISM="false"),  # one processor per worker
        multiprocessing_context="fork",
        generator=torch.Generator(),  # the global one would advance
    )
    yield from loader
