"""The token cache: one file per text, tokenizer and length, written completely or not at all."""

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
"""64 bytes: magic, number of tokens, CRC-32 of the tokens. The tokens follow as little-endian uint32 with flags."""
MAGIC = b"SUBQTOK2"
"""The last character is the format's version."""


def cached_token_file(key: Any, name: str, produce: Callable[[], Iterator[np.ndarray]]) -> tuple[Path, int]:
    """The cache file for `key` and its number of tokens.

    A missing or damaged file is written from `produce()`. If several processes need the same file, one writes it and
    the others wait. `name` is the source's name, for messages.

    Raises:
        UserError: the cache cannot be written.
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
            f"token cache {path.parent}: cannot be written ({error.strerror}); set SUBQUAD_CACHE to another directory"
        ) from None


def _read_if_valid(path: Path, name: str | None) -> int | None:
    """The number of tokens in a cache file; None if it is damaged, with a warning if `name` is given."""
    try:
        return _validate(path)
    except ValueError as damage:
        if name is not None:
            logger.warning("token cache %s is damaged (%s); tokenizing %s again", path, damage, name)
        return None


def _validate(path: Path) -> int:
    """The number of tokens in a cache file; ValueError says how the file is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise ValueError(f"{size} bytes")
        magic, count, checksum = HEADER.unpack(head)
        if magic != MAGIC:
            raise ValueError("an older format" if magic[:-1] == MAGIC[:-1] else "not a token cache")
        if size != HEADER.size + 4 * count:
            raise ValueError(f"{size} bytes, expected {HEADER.size + 4 * count}")
        actual = 0
        while chunk := file.read(2**24):
            actual = zlib.crc32(chunk, actual)
    if actual != checksum:
        raise ValueError("wrong checksum")
    return count


def _write(path: Path, batches: Iterator[np.ndarray]) -> int:
    """Writes a cache file completely or not at all; returns its number of tokens."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".partial")
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
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return count


@contextlib.contextmanager
def _file_lock(path: Path, name: str) -> Iterator[None]:
    """Lets one process at a time work on a cache file, if the file system supports locks; removes the partial files of
    killed processes."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ImportError:  # Windows has no fcntl: two processes would do the same work, and the last one would win.
        yield
        return
    lock = path.with_suffix(".lock")
    while True:
        with lock.open("wb") as file:
            locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that is tokenizing %s", name)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # some network file systems have no locks
                locked = False
            if locked:
                if not _is_open_at(file.fileno(), lock):
                    continue  # the process before this one removed the file: others lock a new one
                for partial in path.parent.glob(f"{path.stem}-*.partial"):
                    partial.unlink(missing_ok=True)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_open_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
