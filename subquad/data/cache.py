"""The token cache: one file of tokens for each text, tokenizer and length, written whole or not at all."""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from subquad.utils import UserError, cache_dir

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<8sQI44x")
"""Magic, number of tokens, CRC-32 of the tokens; 64 bytes, then the tokens as little-endian uint32 with their flags."""
MAGIC = b"SUBQTOK2"
"""The last character is the version of the format."""


def cached(key: Any, name: str, produce: Callable[[], Iterator[np.ndarray]]) -> tuple[Path, int]:
    """The cache file for `key` and its number of tokens; written from `produce()` where there is none, or a damaged
    one. Of several processes that ask for the same at once, one writes and the others wait for it.

    name: of the source, for messages.

    Raises:
        UserError: the cache cannot be written; whatever `produce` raises.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_dir() / "tokens" / f"{digest}.tokens"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (count := _read_if_valid(path, None)) is not None:
            return path, count
        with _file_lock(path, name):
            if path.exists() and (count := _read_if_valid(path, name)) is not None:
                return path, count
            return path, _write(path, produce())
    except OSError as error:
        raise UserError(
            f"the token cache {path.parent} cannot be written ({error.strerror}); "
            f"set SUBQUAD_CACHE to another directory"
        ) from None


def _read_if_valid(path: Path, name: str | None) -> int | None:
    """The number of tokens in a cache file; None if it is damaged, said aloud where the source has a name."""
    try:
        return _validate(path)
    except ValueError as damage:
        if name is not None:
            logger.warning("the token cache %s is damaged (%s); tokenising %s anew", path, damage, name)
        return None


def _validate(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise ValueError(f"{size} bytes")
        magic, count, checksum = HEADER.unpack(head)
        if magic != MAGIC:
            raise ValueError("an older format" if magic[:-1] == MAGIC[:-1] else "another format")
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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(HEADER.size))
            count = checksum = 0
            for batch in batches:
                raw = batch.astype("<u4").tobytes()
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


@contextlib.contextmanager
def _file_lock(path: Path, name: str) -> Iterator[None]:
    """Only one process at a time works on a cache file, where the file system can lock; it also removes what a killed
    one left behind."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # not on Windows; there two would do the same work, and the last to end would win
        yield
        return
    lock = path.with_suffix(".lock")
    with lock.open("wb") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that is tokenising %s", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems cannot
            locked = False
        if locked:
            for left in path.parent.glob(f"{path.stem}-*.partial"):
                left.unlink(missing_ok=True)
        try:
            yield
        finally:
            # Whoever waits holds the same file, and whoever comes later finds the cache.
            lock.unlink(missing_ok=True)
