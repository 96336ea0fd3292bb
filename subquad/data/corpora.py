"""Documents of sources, split into training and validation text: from text, JSON lines and parquet files, compressed or
not, and from the hub.

Any problem with a file is a `UserError` with the file's name and the position in it.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from subquad.config import Data
from subquad.data.chat import Conversation, replace_surrogates
from subquad.data.sources import (
    LIBRARY,
    STDLIB,
    Source,
    SplitOrAll,
    nearest_source,
    resolve,
    resolve_sources,
    suffix,
)
from subquad.hub import hub_access, is_dataset_cached
from subquad.utils import UserError, as_user_error, nearest_path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    import datasets

Document = str | Conversation
Row = tuple[str, Any]
"""A row of a table: its file and number for errors, and what is in it, by column."""
Shard = tuple[Path, int, int | None]
"""A file, or a part of one: the lines that begin from one byte to another, or row groups."""

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".zst": zstd.open}

DOC_SEPARATOR = "<|endoftext|>"
MAX_EXPANSION, MIN_EXPANDED_BYTES = 100, 2**26
"""A compressed file may expand to so many times its size, plus these bytes. Text expands to three to six times."""
PASSAGE_CHARACTERS = 20_000
"""In a text file without separators, a passage ends at the first blank line after this many characters."""
ROWS_AT_ONCE = 1024
"""Of a .parquet file."""
SHARD_BYTES = 2**26
"""Larger .jsonl and .parquet files are streamed in parts: of this size, or of one row group each."""
ADDED_TOKENS = 2
"""A tokenizer adds at most so many to a document: one that begins and one that ends a text."""
VALIDATION_FRACTION = 1 / 20
MAX_DOCS_FOR_CHARACTER_SPLIT = 200
"""With at most this many documents, a share of them is too coarse or empty, and the text is split by characters."""


def check_data(data: Data) -> None:
    """Checks a recipe's data before any model is loaded, by reading the beginning of each local source.

    Raises:
        UserError: a source does not exist, is not text, is empty, or has fewer bytes than a row has tokens.
    """
    for source in [*resolve_sources(data, "train"), *resolve_sources(data, "validation")]:
        if source.files:
            _check_length(replace(source, part="all"), data.seq_len)


def _check_length(source: Source, seq_len: int) -> None:
    """Raises UserError where the text cannot fill a row: a token is a byte at least, and a document adds a few. The
    text of a chat template is not known here, so conversations need one document only."""
    tokens = 0
    for document in read(source):
        tokens += len(document.encode()) + ADDED_TOKENS if isinstance(document, str) else seq_len
        if tokens >= seq_len:
            return
    if tokens == 0:
        raise UserError(f"{source.label}: got no text, expected at least one document")
    raise UserError(f"{source.label}: got at most {tokens} tokens, expected at least data.seq_len = {seq_len}")


def documents(
    source: str, split: SplitOrAll = "train", *, column: str = "text", chat: bool = False
) -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    - `python-stdlib`: one document per `.py` file of the running Python's library in UTF-8, without tests.
    - `.txt` (also `.gz`, `.xz`, `.zst`): documents are separated by lines `<|endoftext|>`; without such lines, the text
      is cut at blank lines into passages of about 20,000 characters. Line ends become `\\n`.
    - `.jsonl`, `.parquet` (also compressed): `column` of each row; a `Conversation` if `chat`.
    - `.md`, `.py` and other source text: one document per file.
    - a directory: all such files below it except hidden ones, ordered by a hash of their names, so that any first part
      is a fair sample of the whole.
    - otherwise the id of a dataset on the Hugging Face hub, streamed: `column` of its split "train".

    The splits "train" and "validation" share no text. One document in 20 is in the validation split, by the hash of its
    text; of at most 200 documents, the last twentieth of the text by characters. "all" is both.

    Raises:
        UserError: the source does not exist (at the call), or is not text (while reading, with file and position).
    """
    if split not in ("train", "validation", "all"):
        raise ValueError(f"split: got {split!r}, expected 'train', 'validation' or 'all'")
    return read(resolve(source, part=split, column=column, chat=chat))


def read(source: Source) -> Iterator[Document]:
    """The documents of a part of a source; see `documents`."""
    if source.name == STDLIB:
        # Split by file name, so that a file stays in its split across Python versions.
        for path in source.files:
            if _is_in_split(path.relative_to(LIBRARY).as_posix(), source.part):
                with contextlib.suppress(UnicodeDecodeError):  # a few are in another encoding on purpose
                    yield path.read_text(encoding="utf-8")
    elif lengths := _lengths_if_few(source):
        yield from _split_by_characters(_all_documents(source), sum(lengths), source.part)
    else:
        yield from _in_split(_all_documents(source), source.part)


def _lengths_if_few(source: Source) -> list[int]:
    """The characters of each document of a source that is split by characters; of others none."""
    if source.part == "all":
        return []
    lengths = [len(document) for document in itertools.islice(_all_documents(source), MAX_DOCS_FOR_CHARACTER_SPLIT + 1)]
    return lengths if len(lengths) <= MAX_DOCS_FOR_CHARACTER_SPLIT else []


def shards(source: Source) -> list[Shard | None]:
    """What of a source can be read on its own: files and parts of files; None is the source as a whole, where the
    split depends on more than the text of a document. A dataset of the hub has none: it has shards of its own."""
    if source.name == STDLIB or _lengths_if_few(source):
        return [None]
    found: list[Shard | None] = []
    for path in source.files:
        bounds: list[int | None] = [0, None]
        size, kind = path.stat().st_size, path.suffix.lower()
        if kind == ".jsonl" and size > SHARD_BYTES:
            bounds = [*range(0, size, SHARD_BYTES), None]
        elif kind == ".parquet" and size > SHARD_BYTES:
            from pyarrow import parquet

            with _open(path, lambda: "in its metadata") as file:
                bounds = [*range(max(1, parquet.ParquetFile(file).num_row_groups)), None]
        found += [(path, start or 0, stop) for start, stop in itertools.pairwise(bounds)]
    return found


def shard_documents(shards: Iterable[Shard | None], source: Source) -> Iterator[dict[str, Document]]:
    """The documents of some shards of a source that are in its part, each in a row of `datasets` (`unwrap`)."""
    for shard in shards:
        documents = read(source) if shard is None else _in_split(_documents_of(*shard, source), source.part)
        yield from ({"document": document} for document in documents)


def unwrap(rows: Iterable[dict[str, Document]]) -> Iterator[Document]:
    """The documents in rows of `shard_documents`."""
    return (row["document"] for row in rows)


def hub_dataset(source: Source) -> "datasets.Dataset | datasets.IterableDataset":
    """A dataset of the hub, read as it is iterated, or with `streaming: false` downloaded."""
    from datasets import load_dataset

    unknown = f"{source.label}: no such file or directory{nearest_path(source.name)}"
    with hub_access(is_dataset_cached(source.name), unknown), _hub_errors(source):
        return load_dataset(source.name, source.subset, split=source.split, streaming=source.streaming)


def hub_documents(rows: Iterable[Any], source: Source) -> Iterator[Document]:
    """The documents in rows of a dataset of the hub that are in the source's part."""
    with _hub_errors(source):
        yield from _in_split(_cells(((source.label, row) for row in rows), source), source.part)


def _in_split(documents: Iterable[Document], split: SplitOrAll) -> Iterator[Document]:
    """The documents with text that the hash of their text puts into a split."""
    for document in _nonempty(documents):
        if _is_in_split(document.text() if isinstance(document, Conversation) else document, split):
            yield document


def _is_in_split(key: str, split: SplitOrAll) -> bool:
    """Whether the document with a key, its path or its text, is in a split: by hash, one in 20 is in "validation"."""
    if split == "all":
        return True
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    is_validation = int.from_bytes(digest[:4], "big") < VALIDATION_FRACTION * 2**32
    return is_validation == (split == "validation")


def _split_by_characters(documents: Iterable[Document], total: int, split: SplitOrAll) -> Iterator[Document]:
    """The text before its last twentieth, or the last twentieth. The cut is at a nearby end of a line, or before the
    conversation that contains it."""
    cut = min(int(total * (1 - VALIDATION_FRACTION)), total - 1)
    start = 0
    for document in documents:
        if isinstance(document, Conversation):
            if (start + len(document) > cut and start > 0) == (split == "validation"):
                yield document
        elif piece := _split_text(document, cut - start, start == 0)[split == "validation"]:
            yield piece
        start += len(document)


def _split_text(text: str, position: int, is_first: bool) -> tuple[str, str]:
    position = min(max(position, 0), len(text))
    if 0 < position < len(text):
        window_start = max(0, position - PASSAGE_CHARACTERS // 10)
        line_end = text.rfind("\n", window_start, position) + 1
        if line_end or (window_start == 0 and not is_first):
            position = line_end
    return text[:position], text[position:]


# ---------------------------------------------------------------------- readers


def _all_documents(source: Source) -> Iterator[Document]:
    """All documents of a source, without empty ones."""
    files = [_documents_of(path, 0, None, source) for path in source.files] or [_cells(_hub_rows(source), source)]
    return _nonempty(itertools.chain.from_iterable(files))


def _nonempty(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        if len(document) and not (isinstance(document, str) and document.isspace()):
            yield document


def _documents_of(path: Path, start: int, stop: int | None, source: Source) -> Iterator[Document]:
    """The documents of a file, or of a part of it; see `Shard`."""
    kind = suffix(path)
    if kind == ".jsonl":
        yield from _cells(_json_rows(path, start, stop, source.column), source)
    elif kind == ".parquet":
        yield from _cells(_parquet_rows(path, start, stop, source.column), source)
    elif kind == ".txt":
        yield from _passages(path)
    else:
        yield "".join(text_lines(path))


def _passages(path: Path) -> Iterator[str]:
    separated = any(line.strip() == DOC_SEPARATOR for line in text_lines(path))
    passage: list[str] = []
    size = 0
    for line in text_lines(path):
        stripped = line.strip()
        # Text without blank lines is cut at the end of a line, so that it need not fit into memory.
        ends = (size >= PASSAGE_CHARACTERS and not stripped) or size >= 10 * PASSAGE_CHARACTERS
        if separated:
            ends = stripped == DOC_SEPARATOR
        if not (separated and ends):
            passage.append(line)
            size += len(line)
        if ends:
            yield "".join(passage).strip("\n")
            passage, size = [], 0
    yield "".join(passage).strip("\n")


def text_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Each line of a UTF-8 file, ended by `\\n`, that begins at byte `start` or later and before byte `stop`."""
    offset = start
    with _open(path, lambda: f"after byte {offset} of its content") as file:
        if start:
            file.seek(start - 1)
            offset += len(file.readline()) - 1
        for raw in file:
            if stop is not None and offset >= stop:
                return
            if b"\0" in raw:
                raise UserError(f"{path}: got a zero byte at byte {offset + raw.index(0)}, expected text")
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise UserError(f"{path}: got 0x{raw[error.start]:02x} at byte {at}, expected UTF-8") from None
            if offset == 0:
                line = line.removeprefix("\ufeff")  # a byte order mark
            offset += len(raw)
            yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _json_rows(path: Path, start: int, stop: int | None, column: str) -> Iterator[Row]:
    where = f"{path}: after byte {start}, line " if start else f"{path}:"
    for number, line in enumerate(text_lines(path, start, stop), start=1):
        if line.strip():
            try:
                yield f"{where}{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where}{number}: not JSON ({error}); expected an object with the key {column!r}"
                ) from None


def _parquet_rows(path: Path, start: int, stop: int | None, column: str) -> Iterator[Row]:
    from pyarrow import parquet

    number = 0
    with _open(path, lambda: f"after row {number}") as file:
        table = parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            yield str(path), dict.fromkeys(table.schema_arrow.names)
        number = sum(table.metadata.row_group(i).num_rows for i in range(start))
        groups = range(start, table.num_row_groups if stop is None else stop)
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[column]):
            for cell in batch.column(0):
                number += 1
                try:
                    yield f"{path}: row {number}", {column: cell.as_py()}
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}: row {number}: invalid at byte {error.start}, expected UTF-8") from None


def _hub_rows(source: Source) -> Iterator[Row]:
    with _hub_errors(source):
        for number, row in enumerate(hub_dataset(source), start=1):
            yield f"{source.label}: row {number}", row


def _hub_errors(source: Source) -> contextlib.AbstractContextManager[None]:
    hint = nearest_path(source.name) or nearest_source(source.name)
    return as_user_error(f"{source.label}: no such file{hint}; and not readable from the hub")


def _cells(rows: Iterable[Row], source: Source) -> Iterator[Document]:
    """The documents in a column of a table."""
    for location, row in rows:
        if not isinstance(row, dict) or source.column not in row:
            got = f"the keys {list(row)}" if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{location}: got {got}, expected an object with the key {source.column!r}")
        value = row[source.column]
        if source.chat:
            yield Conversation.from_messages(value, location)
        elif isinstance(value, str):
            yield replace_surrogates(value)
        else:
            raise UserError(f"{location}: {source.column}: got {type(value).__name__}, expected text")


class _BoundedReader(io.RawIOBase):
    """Reads a compressed file; UserError once it has expanded to more than text does."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path, self.size = file, path, 0
        self.limit = MAX_EXPANSION * path.stat().st_size + MIN_EXPANDED_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.size += len(data)
        if self.size > self.limit:
            raise UserError(f"{self.path}: expands to more than {self.limit:,} bytes, expected text, which does not")
        return len(data)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        super().close()


@contextlib.contextmanager
def _open(path: Path, position: Callable[[], str]) -> Iterator[IO[bytes]]:
    """Opens a file, uncompressed. A UserError names the position of damage that is found while reading."""
    opener = OPENERS.get(path.suffix.lower())
    try:
        with (
            path.open("rb")
            if opener is None
            else io.BufferedReader(_BoundedReader(opener(path, "rb"), path), 2**20) as file
        ):
            yield file
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decompression and pyarrow raise errors of many classes
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        raise UserError(f"{path}: damaged {path.suffix} file, {position()} ({error})") from None
