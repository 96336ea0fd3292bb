"""Documents to rows of tokens: tokenised once into a cache on disk, cut to the context, in an order drawn from a seed.

Knows nothing of models.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from subquad.config import Data
from subquad.data.cache import HEADER, cached
from subquad.data.chat import check_template
from subquad.data.corpora import part_documents
from subquad.data.encoding import LOSS_IGNORED, START, TOKEN, Encoder, identity, token_stream
from subquad.data.mixtures import MixtureSchedule
from subquad.data.sources import Source, Split, SplitOrAll, parts_of
from subquad.utils import UserError

SMALLEST_LIMIT = 2**16
LOSS_IGNORED_LABEL = -100
"""The label of a token that does not count."""


@dataclass(frozen=True)
class Stream:
    """A cache file of tokens, of which `rows` rows are used.

    follows: the first token of a document is predicted from the one before it, as its end: it is the end of a text.
    """

    path: Path
    rows: int
    follows: bool = True
    weight: float = 1.0


class PackedDataset(Dataset):
    """Rows of `context` tokens, each a dictionary of LongTensors `[context]`:

    - `input_ids`;
    - `position_ids`, where documents are kept apart: 0 at the row's first token and at each document's, then counting;
    - `labels`, where some tokens do not count in the loss: those tokens as -100, else the same as `input_ids`, not
      shifted. None count that others than the assistant say, where that was asked, nor the first token of a document
      that is kept apart, unless it is the end-of-text token, with which the document before it ends.

    `len(rows)` is one epoch; `rows[i]` is there for any i >= 0: past its end, an epoch goes over into the next, in
    another order. Each stream of a mixture has its share of any first rows to within one row, goes through all of its
    own before it repeats one, and has an order of its own. The order is a function of the seed alone, so that a run
    continues at row i as if it had never stopped.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        context: int,
        seed: int = 0,
        *,
        separate: bool = True,
        labelled: bool = False,
        most: int | None = None,
    ):
        self.streams, self.context, self.seed = tuple(streams), context, seed
        self.separate, self.labelled = separate, labelled
        rows = sum(stream.rows for stream in streams)
        self._rows = rows if most is None else min(rows, most)
        self._turns = MixtureSchedule([stream.weight for stream in streams])

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < 0:
            raise IndexError(f"row {index}; expected 0 or more")
        part, turn = self._turns[index]
        epoch, place = divmod(turn, self.streams[part].rows)
        return self._item(self._tokens[part][self._order(part, epoch)[place]], self.streams[part].follows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def take(self, count: int, start: int = 0) -> "RowSlice":
        """The `count` rows from row `start` on, over as many epochs as that takes."""
        return RowSlice(self, start, count)

    def _item(self, row: np.ndarray, follows: bool) -> dict[str, Tensor]:
        ids = (row & TOKEN).astype(np.int64)
        item = {"input_ids": ids}
        starts = (row & START) != 0
        if self.separate:
            place = np.arange(self.context)
            item["position_ids"] = place - np.maximum.accumulate(np.where(starts, place, 0))
        if self.labelled:
            ignored = (row & LOSS_IGNORED) != 0
            if self.separate and not follows:
                ignored |= starts
            item["labels"] = np.where(ignored, LOSS_IGNORED_LABEL, ids)
        return {name: torch.from_numpy(values) for name, values in item.items()}

    @functools.cached_property
    def _tokens(self) -> list[np.ndarray]:
        return [
            np.memmap(s.path, dtype="<u4", mode="r", offset=HEADER.size, shape=(s.rows, self.context))
            for s in self.streams
        ]

    @functools.cached_property
    def _orders(self) -> dict[int, tuple[int, np.ndarray]]:
        return {}

    def _order(self, part: int, epoch: int) -> np.ndarray:
        if self._orders.get(part, (None,))[0] != epoch:
            order = np.random.default_rng([self.seed, epoch, part]).permutation(self.streams[part].rows)
            self._orders[part] = epoch, order
        return self._orders[part][1]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files itself: a pickled map would be a copy of all of it.
        return {k: v for k, v in self.__dict__.items() if k not in ("_tokens", "_orders")}


class RowSlice(Dataset):
    """`count` rows of `TokenRows` from row `start` on."""

    def __init__(self, rows: PackedDataset, start: int, count: int):
        self.rows, self.start, self.count = rows, start, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        return self.rows[self.start + index]


def next_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """`[B, T]`: the token that each position predicts, -100 where that does not count: at a row's end, and where labels
    say so."""
    return F.pad(batch.get("labels", batch["input_ids"])[:, 1:], (0, 1), value=LOSS_IGNORED_LABEL)


def token_rows(
    data: Data, tokenizer: PreTrainedTokenizerBase, split: Split, *, limit: int | None = None, seed: int = 0
) -> PackedDataset:
    """The training or held-out text of a recipe as rows of `data.seq_len` tokens.

    Documents stand one after the other, each text behind the tokenizer's end-of-text token (where it has none, its
    beginning-of-text token, else nothing), each conversation as the chat template writes it, and are cut into rows
    without overlap; what is left at the end is dropped.

    Args:
        limit: an epoch has at most this many tokens, rounded up to whole rows, from the beginning of the text; no more
            of a large corpus is read and tokenised than that takes. Of a mixture, each source's share of it.
        seed: of the order of the rows.

    Raises:
        UserError: a corpus that cannot be read, or has too little text for one row; conversations for a tokenizer
            without a chat template.
    """
    context = data.seq_len
    parts = parts_of(data, split)
    if any(source.chat for source, _, _ in parts):
        check_template(tokenizer)
    most = None if limit is None else max(1, -(-limit // context))
    turns = MixtureSchedule([weight for _, _, weight in parts])
    encoder = Encoder(tokenizer, data.assistant_only_loss)
    ends = encoder.separator == (tokenizer.eos_token_id,)
    streams = []
    for k, (source, part, weight) in enumerate(parts):
        share = None if most is None else turns.share(k, most)
        path, count = _cached_tokens(source, part, encoder, None if share is None else share * context)
        if count < context:
            kind = "training" if split == "train" else "held-out"
            raise UserError(
                f"corpus {source.name!r} has {count} tokens of {kind} text, too few for one row; "
                f"expected at least data.seq_len = {context}"
            )
        rows = count // context
        streams.append(Stream(path, rows if share is None else min(rows, share), ends and not source.chat, weight))
    separate = data.document_masking
    labelled = any(source.chat for source, _, _ in parts) or (separate and not ends)
    return PackedDataset(streams, context, seed, separate=separate, labelled=labelled, most=most)


def _cached_tokens(source: Source, split: SplitOrAll, encoder: Encoder, needed: int | None) -> tuple[Path, int]:
    """The cache file with at least `needed` tokens (all of them where None, fewer where there are no more)."""
    # In powers of two, so that runs of similar length share one file.
    limit = None if needed is None else max(SMALLEST_LIMIT, 1 << (needed - 1).bit_length())
    of_chat = [encoder.tokenizer.chat_template, encoder.assistant_only_loss] if source.chat else []
    key = [identity(encoder.tokenizer), source.fingerprint(), split, limit, *of_chat]
    return cached(key, source.name, lambda: token_stream(encoder, part_documents(source, split), limit, source.name))
