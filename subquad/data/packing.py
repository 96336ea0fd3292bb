"""Packing: documents, tokenized once into a cache on disk, cut into rows of `seq_len` tokens in a seeded order."""

import functools
import hashlib
import json
import logging
import math
import shutil
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from subquad import __version__
from subquad.config import Data
from subquad.data.corpora import read
from subquad.data.encoding import DOC_START, LOSS_IGNORED, TOKEN_MASK, Encoder, token_stream
from subquad.data.sources import Source, Split, resolve_sources
from subquad.utils import UserError, cache_dir

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

MIN_CACHED_TOKENS = 2**16
WRITTEN_AT_ONCE = 16
"""Arrays of tokens that are kept in memory until they are written to the cache."""
SPREAD = 32
"""`spread_rows` chooses one of so many rows."""
IGNORE_INDEX = -100
"""Label of a token that is excluded from the loss."""


class MixtureSchedule:
    """Assigns each row of a mixture to a source: `schedule[i]` is `(source, row of that source)`.

    Among the first n rows, each source has its share of n to within one row, for any weights (deadlines of R. Tijdeman,
    The chairman assignment problem, Discrete Mathematics 32, 1980). The schedule has the sum of the weights as its
    period, with the weights as whole numbers (7 and 3 for 0.7 and 0.3), and is computed once, as far as it is needed.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(w * math.lcm(*(f.denominator for f in exact))) for w in exact]
        self.weights = [w // math.gcd(*whole) for w in whole]
        self.period = sum(self.weights)
        self._counts = [0] * len(weights)
        self._sources, self._rows = array("H"), array("q")

    def __getitem__(self, index: int) -> tuple[int, int]:
        if len(self.weights) == 1:
            return 0, index
        cycle, offset = divmod(index, self.period)
        while len(self._sources) <= offset:
            self._extend()
        source = self._sources[offset]
        return source, cycle * self.weights[source] + self._rows[offset]

    def max_count(self, source: int, rows: int) -> int:
        """The largest number of rows that a source can have among the first `rows`."""
        return -(-rows * self.weights[source] // self.period)

    def count(self, source: int, rows: int) -> int:
        """The number of rows that a source has among the first `rows`."""
        cycle, offset = divmod(rows, self.period)
        if len(self.weights) == 1:
            return rows
        if offset:
            self[offset - 1]  # computes the schedule so far
        return cycle * self.weights[source] + self._sources[:offset].count(source)

    def _extend(self) -> None:
        """Assigns one more row, in whole numbers: all quantities are multiplied by `period` and 2(n - 1)."""
        n, period = len(self.weights), self.period
        row, scale = len(self._sources) + 1, 2 * (n - 1)
        deficits = [scale * (w * row - period * count) for w, count in zip(self.weights, self._counts, strict=True)]
        # Of the sources that this row would not put ahead of their share, the one with the earliest deadline.
        eligible = [k for k in range(n) if deficits[k] >= period]
        source = min(eligible, key=lambda k: Fraction((scale - 1) * period - deficits[k], self.weights[k]))
        self._sources.append(source)
        self._rows.append(self._counts[source])
        self._counts[source] += 1


@dataclass(frozen=True)
class SourceRows:
    """The first `num_rows` rows of a source's tokens, a dataset of the cache.

    starts_with_eos: each document starts with the end-of-text token, which is a label for the document before it.
    prefix: tokens with which each document starts, and which are put in front of a row that starts within one.
    """

    dataset: "datasets.Dataset"
    num_rows: int
    starts_with_eos: bool = True
    weight: float = 1.0
    prefix: tuple[int, ...] = ()


class PackedDataset(Dataset):
    """Rows of `seq_len` tokens, each a dictionary of LongTensors `[seq_len]`:

    - `input_ids`;
    - `position_ids`, with document masking: 0 at the first token of the row and of each document, then counting up;
    - `labels`, if some tokens are excluded from the loss: `input_ids`, not shifted, with -100 at those tokens. Excluded
      are the tokens of other roles with `assistant_only_loss`, and with document masking the first token of a document,
      unless it is the end-of-text token, which ends the document before it.

    `len(dataset)` is one epoch. `dataset[i]` exists for any i >= 0: each epoch has another order. Each source of a
    mixture has its share of any first rows to within one row, is used completely before a row repeats, and has its own
    order. The order depends on the seed alone, so that a resumed run continues at row i exactly.
    """

    def __init__(
        self,
        sources: Sequence[SourceRows],
        seq_len: int,
        seed: int = 0,
        *,
        document_masking: bool = True,
        with_labels: bool = False,
        max_rows: int | None = None,
    ):
        self.sources, self.seq_len, self.seed = tuple(sources), seq_len, seed
        self.document_masking, self.with_labels = document_masking, with_labels
        num_rows = sum(source.num_rows for source in sources)
        self._num_rows = num_rows if max_rows is None else min(num_rows, max_rows)
        self.schedule = MixtureSchedule([source.weight for source in sources])
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < 0:
            raise IndexError(f"row {index}; expected 0 or more")
        source, row = self.schedule[index]
        epoch, offset = divmod(row, self.sources[source].num_rows)
        start = int(self._order(source, epoch)[offset]) * self.stride(source)
        return self.make_item(source, self._tokens[source].slice(start, self.seq_len).to_numpy())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def take(self, count: int, start: int = 0) -> Subset:
        """`count` rows from row `start` on, across epochs if necessary."""
        return Subset(self, range(start, start + count))

    def stride(self, source: int) -> int:
        """The tokens from the start of a row of a source to that of the next."""
        return self.seq_len - len(self.sources[source].prefix)

    def make_item(self, source: int, tokens: np.ndarray) -> dict[str, Tensor]:
        """The row that begins with `seq_len` tokens of a source, `uint32` with flags."""
        own = self.sources[source]
        if own.prefix and not tokens[0] & DOC_START:
            prefix = np.array(own.prefix, np.uint32)
            prefix[0] |= DOC_START
            tokens = np.concatenate([prefix, tokens[: self.seq_len - len(prefix)]])
        ids = (tokens & TOKEN_MASK).astype(np.int64)
        item = {"input_ids": ids}
        doc_starts = (tokens & DOC_START) != 0
        if self.document_masking:
            positions = np.arange(self.seq_len)
            item["position_ids"] = positions - np.maximum.accumulate(np.where(doc_starts, positions, 0))
        if self.with_labels:
            ignored = (tokens & LOSS_IGNORED) != 0
            if self.document_masking and not own.starts_with_eos:
                ignored |= doc_starts
            item["labels"] = np.where(ignored, IGNORE_INDEX, ids)
        return {name: torch.from_numpy(values) for name, values in item.items()}

    @functools.cached_property
    def _tokens(self) -> list["pyarrow.ChunkedArray"]:
        return [_flat_tokens(source.dataset) for source in self.sources]

    def _order(self, source: int, epoch: int) -> np.ndarray:
        if self._orders.get(source, (None,))[0] != epoch:
            order = np.random.default_rng([self.seed, epoch, source]).permutation(self.sources[source].num_rows)
            self._orders[source] = epoch, order
        return self._orders[source][1]

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the files themselves: a pickled map would be a copy of the whole file.
        return {**{k: v for k, v in self.__dict__.items() if k != "_tokens"}, "_orders": {}}


def next_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """The token that each position predicts, `[B, T]`; -100 at the end of a row and where `labels` exclude it."""
    return F.pad(batch.get("labels", batch["input_ids"])[:, 1:], (0, 1), value=IGNORE_INDEX)


def spread_rows(data: Data, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> Tensor:
    """Rows of training tokens, `[at most rows, length]`, drawn from the first `SPREAD` times as many: the beginning of
    a text, with its title and contents, is not typical. Raises UserError if there is not one row."""
    found = token_rows(data.model_copy(update={"seq_len": length}), tokenizer, "train", limit=SPREAD * rows * length)
    return torch.stack([found[i]["input_ids"] for i in range(min(rows, len(found)))])


def token_rows(
    data: Data, tokenizer: PreTrainedTokenizerBase, split: Split, *, limit: int | None = None, seed: int = 0
) -> PackedDataset:
    """The training or validation text of a recipe, packed into rows of `data.seq_len` tokens.

    Documents are concatenated and cut into rows without overlap; the remainder is dropped. How a document begins and
    ends is said in `Encoder`. Where the tokenizer puts a beginning-of-text token in front of texts, a row that starts
    within a document begins with it too; one that starts with a document has one token of the next row in its place.

    Args:
        limit: an epoch has at most this many tokens, rounded up to whole rows, from the beginning of the text, and only
            that much text is read and tokenized. Each source of a mixture gets its share of it.
        seed: of the order of the rows.

    Raises:
        UserError: a source cannot be read or has too little text for one row, or the tokenizer has no chat template for
            conversations.
    """
    seq_len, masking = data.seq_len, data.document_masking
    sources = resolve_sources(data, split)
    has_chat = any(source.chat for source in sources)
    if has_chat and not tokenizer.chat_template:
        raise UserError(
            "data.chat: got true for a teacher without a chat template, expected an instruct model as the teacher, or "
            "plain text as data"
        )
    max_rows = None if limit is None else max(1, -(-limit // seq_len))
    schedule = MixtureSchedule([source.weight for source in sources])
    encoder = Encoder(tokenizer, data.assistant_only_loss)
    eos_separated = encoder.before == [tokenizer.eos_token_id]
    rows = []
    for k, source in enumerate(sources):
        needed = None if max_rows is None else schedule.max_count(k, max_rows)
        dataset = _token_dataset(source, encoder, None if needed is None else needed * seq_len)
        tokens, prefix = _flat_tokens(dataset), tuple(encoder.prefix)
        count, begins = len(tokens), tokens[: len(prefix)].to_numpy() & TOKEN_MASK
        if tuple(begins) != prefix:  # a chat template without it
            prefix = ()
        if count < seq_len:
            kind = "training" if split == "train" else "validation"
            raise UserError(
                f"{source.label}: got {count} tokens of {kind} text, expected at least data.seq_len = {seq_len}"
            )
        num_rows = (count - len(prefix)) // (seq_len - len(prefix))
        num_rows = num_rows if needed is None else min(num_rows, needed)
        rows.append(SourceRows(dataset, num_rows, eos_separated and not source.chat, source.weight, prefix))
    with_labels = has_chat or (masking and not eos_separated)
    return PackedDataset(rows, seq_len, seed, document_masking=masking, with_labels=with_labels, max_rows=max_rows)


def _token_dataset(source: Source, encoder: Encoder, needed: int | None) -> "datasets.Dataset":
    """At least `needed` tokens of a source (None: all), or all if there are fewer, as a dataset of arrays, `uint32`.

    A missing or damaged dataset is written completely or not at all. If several processes need the same one, one writes
    it and the others wait.

    Raises:
        UserError: the cache cannot be written.
    """
    import datasets

    def rows() -> Iterator[dict[str, Any]]:
        yield {"tokens": np.empty(0, np.uint32), "checksum": 0}  # an empty text has a type, too
        for tokens in token_stream(encoder, read(source), limit, source.name):
            yield {"tokens": tokens, "checksum": zlib.crc32(tokens.data)}

    # Limits are powers of two, so that runs of similar length share a dataset.
    limit = math.inf if needed is None else max(MIN_CACHED_TOKENS, 1 << (needed - 1).bit_length())
    chat_key = [encoder.tokenizer.chat_template, encoder.assistant_only_loss] if source.chat else []
    key = json.dumps([__version__, encoder.fingerprint(), source.fingerprint(), limit, chat_key], sort_keys=True)
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    directory = cache_dir() / "tokens"
    entry = directory / "generator" / f"default-fingerprint={fingerprint}" / "0.0.0"
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # it counts arrays; `token_stream` has one that counts tokens
    try:
        dataset = datasets.Dataset.from_generator(
            rows, cache_dir=str(directory), fingerprint=fingerprint, writer_batch_size=WRITTEN_AT_ONCE
        )
        tokens, checksums = dataset.data.column("tokens"), dataset.data.column("checksum")
        if any(zlib.crc32(t.values.to_numpy()) != c.as_py() for t, c in zip(tokens, checksums, strict=True)):
            raise ValueError("wrong checksum")
        return dataset
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        problem = error.__cause__ or error  # of `rows`
        if entry.exists():
            logger.warning("token cache %s is damaged (%s); tokenizing %s again", entry, problem, source.name)
            shutil.rmtree(entry)
        elif isinstance(problem, OSError):
            reason = problem.strerror or problem
            raise UserError(
                f"token cache {directory}: cannot be written ({reason}); set SUBQUAD_CACHE to another directory"
            ) from None
        else:
            raise problem from None
    finally:
        if not hidden:
            datasets.enable_progress_bars()
    return _token_dataset(source, encoder, needed)


def _flat_tokens(dataset: "datasets.Dataset") -> "pyarrow.ChunkedArray":
    """All tokens of a dataset of the cache, mapped into memory."""
    import pyarrow

    return pyarrow.chunked_array([chunk.flatten() for chunk in dataset.data.column("tokens").chunks])
