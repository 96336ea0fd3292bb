"""Documents to rows of tokens: tokenised once into a cache on disk, cut to the context, in an order drawn from a seed.

Knows nothing of models.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from subquad.config import Corpus
from subquad.data.corpora import Split, _documents, part_of
from subquad.errors import UserError
from subquad.paths import cache_dir

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<8sQI44x")
"""Magic, number of tokens, CRC-32 of the tokens; 64 bytes, then the tokens as little-endian int32."""
MAGIC = b"SUBQTOK1"
SMALLEST_LIMIT = 2**16
BATCH_CHARACTERS = 2**20


class TokenRows(Dataset):
    """Rows of `context` tokens. `len(rows)` is one epoch; `rows[i]` is `{"input_ids": LongTensor[context]}` for any
    i >= 0: past its end, an epoch goes over into the next, in another order. The order is a function of the seed alone,
    so that a run continues at row i as if it had never stopped."""

    def __init__(self, path: Path, context: int, rows: int, seed: int = 0):
        self.path, self.context, self.seed = path, context, seed
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < 0:
            raise IndexError(f"row {index}; expected 0 or more")
        epoch, place = divmod(index, self._rows)
        row = self._tokens[self._order(epoch)[place]]
        return {"input_ids": torch.from_numpy(row.astype(np.int64))}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def take(self, count: int, start: int = 0) -> "RowRange":
        """The `count` rows from row `start` on, over as many epochs as that takes."""
        return RowRange(self, start, count)

    @functools.cached_property
    def _tokens(self) -> np.ndarray:
        shape = (self._rows, self.context)
        return np.memmap(self.path, dtype="<i4", mode="r", offset=HEADER.size, shape=shape)

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_permuted", (None,))[0] != epoch:
            self._permuted = epoch, np.random.default_rng([self.seed, epoch]).permutation(self._rows)
        return self._permuted[1]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself: a pickled map would be a copy of all of it.
        return {k: v for k, v in self.__dict__.items() if k not in ("_tokens", "_permuted")}


class RowRange(Dataset):
    """`count` rows of `TokenRows` from row `start` on."""

    def __init__(self, rows: TokenRows, start: int, count: int):
        self.rows, self.start, self.count = rows, start, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        return self.rows[self.start + index]


def token_rows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, split: Split, *, limit: int | None = None, seed: int = 0
) -> TokenRows:
    """The training or held-out text of a recipe as rows of `corpus.context` tokens.

    Documents stand one after the other, each behind the tokenizer's end-of-text token (where it has none, its
    beginning-of-text token, else nothing), and are cut into rows without overlap; what is left at the end is dropped.

    Args:
        limit: an epoch has at most this many tokens, rounded up to whole rows, from the beginning of the text; no more
            of a large corpus is read and tokenised than that takes.
        seed: of the order of the rows.

    Raises:
        UserError: a corpus that cannot be read, or has too little text for one row.
    """
    context = corpus.context
    most = None if limit is None else max(1, -(-limit // context))
    path, count = _cached_tokens(corpus, tokenizer, split, None if most is None else most * context)
    rows = count // context
    if rows == 0:
        name = corpus.valid if split == "valid" and corpus.valid is not None else corpus.source
        kind = "training" if split == "train" else "held-out"
        raise UserError(
            f"corpus {name!r} has {count} tokens of {kind} text, too few for one row; "
            f"expected at least corpus.context = {context}"
        )
    return TokenRows(path, context, rows if most is None else min(rows, most), seed)


# ---------------------------------------------------------------------- the cache


def _cached_tokens(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, split: Split, needed: int | None
) -> tuple[Path, int]:
    """The cache file with at least `needed` tokens (all of them where None, fewer where there are no more)."""
    source, part = part_of(corpus, split)
    # In powers of two, so that runs of similar length share one file.
    limit = None if needed is None else max(SMALLEST_LIMIT, 1 << (needed - 1).bit_length())
    key = json.dumps([_identity(tokenizer), source.fingerprint(), part, limit], sort_keys=True)
    path = cache_dir() / "tokens" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.tokens"
    if path.exists():
        try:
            return path, _verified(path)
        except ValueError as damage:
            logger.warning("the token cache %s is damaged (%s); tokenising %s anew", path, damage, source.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path, _write(path, _token_batches(tokenizer, _documents(source, part), limit, source.name))
    except OSError as error:
        raise UserError(
            f"the token cache {path.parent} cannot be written ({error.strerror}); "
            f"set SUBQUAD_CACHE to another directory"
        ) from None


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What has to be the same for a text to give the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), _separator(tokenizer)]
    definition = json.loads(backend.to_str())
    # Left behind by earlier calls; the calls here set neither.
    definition.pop("truncation", None)
    definition.pop("padding", None)
    return [definition, _separator(tokenizer)]


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if isinstance(token, int):
            return [token]
    return []


def _verified(path: Path) -> int:
    """The number of tokens in a cache file; ValueError says how it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise ValueError(f"{size} bytes")
        magic, count, checksum = HEADER.unpack(head)
        if magic != MAGIC:
            raise ValueError("another format")
        if size != HEADER.size + 4 * count:
            raise ValueError(f"{size} bytes, expected {HEADER.size + 4 * count}")
        found = 0
        while block := file.read(2**24):
            found = zlib.crc32(block, found)
    if found != checksum:
        raise ValueError("its checksum is wrong")
    return count


def _write(path: Path, batches: Iterator[np.ndarray]) -> int:
    """Writes a cache file whole or not at all; returns its number of tokens."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem[:8]}-", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(HEADER.size))
            count = checksum = 0
            for batch in batches:
                raw = batch.astype("<i4").tobytes()
                file.write(raw)
                count, checksum = count + len(batch), zlib.crc32(raw, checksum)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, count, checksum))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return count


def _token_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[str], limit: int | None, name: str
) -> Iterator[np.ndarray]:
    """The tokens of whole documents, until there are `limit` of them."""
    separator = _separator(tokenizer)
    count = 0
    with tqdm(desc=f"tokenising {name}", unit=" tokens", unit_scale=True, delay=3, file=sys.stderr) as progress:
        while limit is None or count < limit:
            # A token is seldom shorter than two characters: so a batch hardly ever goes past the limit.
            characters = BATCH_CHARACTERS if limit is None else min(BATCH_CHARACTERS, 2 * (limit - count))
            batch = _take_characters(texts, characters)
            if not batch:
                return
            rows = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            tokens = np.fromiter(itertools.chain.from_iterable((*separator, *row) for row in rows), dtype=np.int32)
            count += len(tokens)
            progress.update(len(tokens))
            yield tokens


def _take_characters(texts: Iterator[str], characters: int) -> list[str]:
    """The next documents, until they have so many characters."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return batch
