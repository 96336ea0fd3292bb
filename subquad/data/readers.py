"""Files and data sets to documents: text, JSON lines, parquet, compressed or not, and the hub.

Whatever is wrong with a file is a `UserError` that names it and the place inside it.
"""

import contextlib
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from subquad.data.chat import Conversation
from subquad.data.sources import Source, suffix
from subquad.utils import UserError

SEPARATOR = b"<|endoftext|>"
PASSAGE_CHARACTERS = 20_000
"""Characters from which on a passage of a text file without separators ends at its next blank line."""
BLOCK = 2**20
ROWS = 1024
"""Rows of a parquet file in memory at a time."""

Document = str | Conversation


def read(source: Source) -> Iterator[Document]:
    """Every document of a source's files or data set, empty ones too."""
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


def require(module: str, package: str, why: str) -> Any:
    """An optional package, or a UserError that says how to get it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a folder of that name has no origin
        raise UserError(f'{why} needs the package {package}: `pip install "subquad[data]"`')
    return importlib.import_module(module)


# ---------------------------------------------------------------------- text


def _passages(path: Path) -> Iterator[str]:
    separated = any(raw.strip() == SEPARATOR for raw, _ in _raw_lines(path))
    separator = SEPARATOR.decode()
    passage: list[str] = []
    size = 0
    for line in _lines(path):
        stripped = line.strip()
        if separated:
            ends = stripped == separator
        else:
            # Text without any blank line is cut at a line's end at last, so that it need not fit into memory.
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
            raise UserError(f"{path}: not text: a zero byte at byte {offset + raw.index(0)}")
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); convert it to UTF-8"
            ) from None
        if offset == 0:
            line = line.removeprefix("\ufeff")  # a byte order mark
        yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _raw_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    offset = 0
    with _opened(path) as file, _damage_named(path, lambda: f"behind byte {offset} of its content"):
        for line in file:
            yield line, offset
            offset += len(line)


# ---------------------------------------------------------------------- rows of tables


def _json_rows(path: Path, source: Source) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); expected an object with the key {source.column!r}") from None
        if not isinstance(record, dict) or source.column not in record:
            keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
            what = "conversation" if source.chat else "text"
            raise UserError(f"{where}: no {what} under the key {source.column!r}; found {keys or 'nothing'}")
        yield _document(record[source.column], source, where)


def _document(value: Any, source: Source, where: str) -> Document:
    """The document in a cell of a table."""
    if source.chat:
        return Conversation.create(value, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: no text under the key {source.column!r}; found {type(value).__name__}")
    # JSON can escape half a character; no tokenizer takes it.
    return value.encode("utf-8", "replace").decode()


def _parquet_rows(path: Path, source: Source) -> Iterator[Document]:
    parquet = require("pyarrow.parquet", "pyarrow", f"corpus {str(path)!r}")
    number = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_damage_named(path, lambda: f"behind row {number}"))
        file = stack.enter_context(_opened(path))
        if path.suffix.lower() != ".parquet":  # parquet is read from its end
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            while block := file.read(BLOCK):
                unpacked.write(block)
            file = unpacked
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if source.column not in names:
            raise UserError(f"{path}: no column {source.column!r}; found {', '.join(map(repr, names)) or 'none'}")
        for batch in table.iter_batches(ROWS, columns=[source.column]):
            for cell in batch.column(0):
                number += 1
                try:
                    value = cell.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}: row {number}: not UTF-8 at its byte {error.start}") from None
                yield _document(value, source, f"{path}: row {number}")


def _hub_rows(source: Source) -> Iterator[Document]:
    datasets = require("datasets", "datasets", f"corpus {source.name!r}")
    try:
        rows = datasets.load_dataset(source.name, source.subset, split=source.split, streaming=source.streaming)
        for number, record in enumerate(rows, start=1):
            if source.column not in record:
                raise UserError(f"corpus {source.name!r}: no column {source.column!r}; found {', '.join(record)}")
            yield _document(record[source.column], source, f"corpus {source.name!r}: row {number}")
    except UserError:
        raise
    except Exception as error:  # the library passes on whatever network and formats raise
        raise UserError(
            f"corpus {source.name!r}: not a local file, and the hub gave no such data set ({error})"
        ) from None


# ---------------------------------------------------------------------- compression


def _opened(path: Path) -> IO[bytes]:
    """A file's content, uncompressed."""
    packed = path.suffix.lower()
    try:
        if packed == ".gz":
            return gzip.open(path)  # type: ignore[return-value]
        if packed == ".xz":
            return lzma.open(path)
        if packed == ".zst":
            return io.BufferedReader(_Zstandard(path), BLOCK)
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


@contextlib.contextmanager
def _damage_named(path: Path, place: Any) -> Iterator[None]:
    """Turns what decompression and parquet raise at damage into a UserError that says where."""
    try:
        yield
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged {path.suffix} file, {place()} ({error})") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        raise UserError(f"{path}: damaged {path.suffix} file, {place()} ({error})") from None


class _Zstandard(io.RawIOBase):
    """The content of a .zst file of one frame or many. EOFError where it ends inside a frame: the package's own reader
    takes that for the end of the file."""

    def __init__(self, path: Path):
        if importlib.util.find_spec("compression") is not None:  # Python 3.14
            zstd = importlib.import_module("compression.zstd")
            self._new, self._error = zstd.ZstdDecompressor, zstd.ZstdError
        else:
            zstandard = require("zstandard", "zstandard", f"corpus {str(path)!r}")
            self._new, self._error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._file = path.open("rb")
        self._frame: Any = None
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if self._frame is not None and self._frame.eof:
                data = self._frame.unused_data or self._file.read(BLOCK)
                self._frame = None
            else:
                data = self._file.read(BLOCK)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends too early")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._left = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(error) from None
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
