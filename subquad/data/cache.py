"""The token cache: a dataset on disk for each text, tokenizer and length, written completely or not at all."""

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from subquad.utils import UserError, cache_dir

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

logger = logging.getLogger(__name__)

WRITTEN_AT_ONCE = 16
"""Arrays of tokens that are kept in memory until they are written."""


def cached_tokens(key: Any, name: str, produce: Callable[[], Iterator[np.ndarray]]) -> "Dataset":
    """The dataset for `key`, with the arrays of `produce()`, `uint32`, as its rows.

    A missing or damaged dataset is written from `produce()`. If several processes need the same one, one writes it and
    the others wait. `name` is the source's name, for messages.

    Raises:
        UserError: the cache cannot be written.
    """
    import datasets

    def rows() -> Iterator[dict[str, Any]]:
        yield {"tokens": np.empty(0, np.uint32), "checksum": 0}  # an empty text has a type, too
        for tokens in produce():
            yield {"tokens": tokens, "checksum": zlib.crc32(tokens.data)}

    directory = cache_dir() / "tokens"
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    entry = directory / "generator" / f"default-fingerprint={fingerprint}" / "0.0.0"
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # it counts arrays; `token_stream` has one that counts tokens
    try:
        dataset: Dataset = datasets.Dataset.from_generator(
            rows, cache_dir=str(directory), fingerprint=fingerprint, writer_batch_size=WRITTEN_AT_ONCE
        )
        tokens, checksums = dataset.data.column("tokens"), dataset.data.column("checksum")
        if any(zlib.crc32(t.values.to_numpy()) != c.as_py() for t, c in zip(tokens, checksums, strict=True)):
            raise ValueError("wrong checksum")
        return dataset
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        problem = error.__cause__ or error  # of `produce`
        if entry.exists():
            logger.warning("token cache %s is damaged (%s); tokenizing %s again", entry, problem, name)
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
    return cached_tokens(key, name, produce)


def flat_tokens(dataset: "Dataset") -> "pyarrow.ChunkedArray":
    """All tokens of a dataset of the cache, mapped into memory."""
    import pyarrow

    return pyarrow.chunked_array([chunk.flatten() for chunk in dataset.data.column("tokens").chunks])
