"""Readers: documents from text, JSON lines and parquet files, compressed or not, and from the hub.

Any problem with a file is a `UserError` with the file's name and the position in it.
"""

import contextlib
import gzip
import io
import json
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from subquad.data.chat import Conversation, replace_surrogates
from subquad.data.sources import Source, suffix
from subquad.utils import UserError, needs_extra

DOC_SEPARATOR = b"<|endoftext|>"
PASSAGE_CHARACTERS = 20_000
"""In a text file without separators, a passage ends at the first blank line after this many characters."""
CHUNK_BYTES = 2**20
TABLE_BATCH_ROWS = 1024
"""Rows of a parquet file read at once."""

Document = str | Conversation


def read(source: Source) -> Iterator[Document]:
    """All documents of a source's files or dataset, including empty ones."""
    if source.kind == "hub":
        yield from _hub_rows(source)
        return
    for path in source.files:
        kind = suffix(path)
        if kind == ".jsonl":
            yield from _json_rows(path, source)
        elif kind == ".parquet":
            yield from _parquet_rows(path, source)
        elif kind == ".txt":
            yield from _passages(path)
        else:
            yield "".join(_lines(path))


# ---------------------------------------------------------------------- text


def _passages(path: Path) -> Iterator[str]:
    separated = any(raw.strip() == DOC_SEPARATOR for raw, _ in _raw_lines(path))
    separator = DOC_SEPARATOR.decode()
    passage: list[str] = []
    size = 0
    for line in _lines(path):
        stripped = line.strip()
        if separated:
            ends = stripped == separator
        else:
            # Text without blank lines is cut at the end of a line, so that it need not fit into memory.
            ends = (size >= PASSAGE_CHARACTERS and not stripped) or size >= 10 * PASSAGE_CHARACTERS
        if not (separated and ends):
            passage.append(line)
            size += len(line)
        if ends:
            yield "".join(passage).strip("\n")
            passage, size = [], 0
    yield "".join(passage).strip("\n")


def _lines(path: Path) -> Iterator[str]:
    """Each line of a UTF-8 file, ended by `\\n`."""
    for raw, offset in _raw_lines(path):
        if b"\0" in raw:
            raise UserError(f"{path}: got a zero byte at byte {offset + raw.index(0)}, expected text")
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: got 0x{raw[error.start]:02x} at byte {offset + error.start}, expected UTF-8"
            ) from None
        if offset == 0:
            line = line.removeprefix("\ufeff")  # a byte order mark
        yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _raw_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    offset = 0
    with _open_uncompressed(path) as file, _damage_as_user_error(path, lambda: f"after byte {offset} of its content"):
        for line in file:
            yield line, offset
            offset += len(line)


# ---------------------------------------------------------------------- rows of tables


def _json_rows(path: Path, source: Source) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        location = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{location}: not JSON ({error}); expected an object with the key {source.column!r}"
            ) from None
        if not isinstance(record, dict) or source.column not in record:
            got = f"the keys {list(record)}" if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{location}: got {got}, expected an object with the key {source.column!r}")
        yield _document(record[source.column], source, location)


def _document(value: Any, source: Source, location: str) -> Document:
    """The document in a table's cell."""
    if source.chat:
        return Conversation.from_messages(value, location)
    if not isinstance(value, str):
        raise UserError(f"{location}: {source.column}: got {type(value).__name__}, expected text")
    return replace_surrogates(value)


def _parquet_rows(path: Path, source: Source) -> Iterator[Document]:
    with needs_extra(str(path), "data"):
        from pyarrow.parquet import ParquetFile
    number = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_damage_as_user_error(path, lambda: f"after row {number}"))
        file = stack.enter_context(_open_uncompressed(path))
        if path.suffix.lower() != ".parquet":  # parquet needs random access
            uncompressed = stack.enter_context(tempfile.TemporaryFile())
            while chunk := file.read(CHUNK_BYTES):
                uncompressed.write(chunk)
            file = uncompressed
        table = ParquetFile(file)
        names = table.schema_arrow.names
        if source.column not in names:
            raise UserError(f"{path}: got the columns {names}, expected the column {source.column!r}")
        for batch in table.iter_batches(TABLE_BATCH_ROWS, columns=[source.column]):
            for cell in batch.column(0):
                number += 1
                try:
                    value = cell.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}: row {number}: invalid at byte {error.start}, expected UTF-8") from None
                yield _document(value, source, f"{path}: row {number}")


def _hub_rows(source: Source) -> Iterator[Document]:
    with needs_extra(source.label, "data"):
        from datasets import load_dataset
    try:
        rows = load_dataset(source.name, source.subset, split=source.split, streaming=source.streaming)
        for number, record in enumerate(rows, start=1):
            if source.column not in record:
                raise UserError(
                    f"{source.label}: got the columns {list(record)}, expected the column {source.column!r}"
                )
            yield _document(record[source.column], source, f"{source.label}: row {number}")
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many classes, of networks and formats
        raise UserError(f"{source.label}: no such file, and not readable from the hub ({error})") from None


# ---------------------------------------------------------------------- compression


def _open_uncompressed(path: Path) -> IO[bytes]:
    """Opens a file for reading, uncompressed."""
    compression = path.suffix.lower()
    try:
        if compression == ".gz":
            return gzip.open(path)  # type: ignore[return-value]
        if compression == ".xz":
            return lzma.open(path)
        if compression == ".zst":
            return io.BufferedReader(_Zstandard(path), CHUNK_BYTES)
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def _damage_as_user_error(path: Path, position: Callable[[], str]) -> Iterator[None]:
    """Turns errors of decompression and parquet into a UserError with the position."""
    try:
        yield
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged {path.suffix} file, {position()} ({error})") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        raise UserError(f"{path}: damaged {path.suffix} file, {position()} ({error})") from None


class _Zstandard(io.RawIOBase):
    """The content of a .zst file of one or more frames. Raises EOFError if the file ends inside a frame, which the
    package's own reader takes for the end of the file."""

    def __init__(self, path: Path):
        try:
            from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

            self._new, self._error = zstd.ZstdDecompressor, zstd.ZstdError
        except ModuleNotFoundError:
            with needs_extra(str(path), "data"):
                import zstandard
            self._new, self._error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._file = path.open("rb")
        self._frame: Any = None
        self._buffered = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._buffered:
            if self._frame is not None and self._frame.eof:
                data = self._frame.unused_data or self._file.read(CHUNK_BYTES)
                self._frame = None
            else:
                data = self._file.read(CHUNK_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("unexpected end of file")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._buffered = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(error) from None
        size = min(len(buffer), len(self._buffered))
        buffer[:size], self._buffered = self._buffered[:size], self._buffered[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
