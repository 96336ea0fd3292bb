"""Documents of sources, split into training and validation text."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from subquad.config import Data
from subquad.data import stdlib
from subquad.data.chat import Conversation
from subquad.data.readers import PASSAGE_CHARACTERS, Document, read
from subquad.data.sources import Source, SplitOrAll, resolve, resolve_sources
from subquad.utils import UserError

MAX_DOCS_FOR_CHARACTER_SPLIT = 200
"""With at most this many documents, a share of them is too coarse or empty, and the text is split by characters."""
VALIDATION_FRACTION = 1 / 20


def check_data(data: Data) -> None:
    """Checks a recipe's data before any model is loaded, by reading the first document of each local source.

    Raises:
        UserError: a source does not exist, is empty, or is not text.
    """
    for source, _, _ in [*resolve_sources(data, "train"), *resolve_sources(data, "validation")]:
        if source.kind != "hub" and next(split_documents(source, "all"), None) is None:
            raise UserError(f"{source.label}: got no text, expected at least one document")


def documents(
    source: str, split: SplitOrAll = "train", *, column: str = "text", chat: bool = False
) -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    - `python-stdlib`: one document per file; see `subquad.data.stdlib`.
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
    return split_documents(resolve(source, column=column, chat=chat), split)


def split_documents(source: Source, split: SplitOrAll) -> Iterator[Document]:
    """The documents of a split of a source; see `documents`."""
    if source.kind == "stdlib":
        # Split by file name, so that a file stays in its split across Python versions.
        for path in source.files:
            if split == "all" or stdlib.is_validation(path) == (split == "validation"):
                try:
                    yield path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue  # a few library files are in another encoding on purpose
    elif split == "all":
        yield from _nonempty(source)
    else:
        yield from _split(source, split)


def _nonempty(source: Source) -> Iterator[Document]:
    return (d for d in read(source) if len(d) and not (isinstance(d, str) and d.isspace()))


def _split(source: Source, split: SplitOrAll) -> Iterator[Document]:
    lengths = [len(document) for document in itertools.islice(_nonempty(source), MAX_DOCS_FOR_CHARACTER_SPLIT + 1)]
    if len(lengths) <= MAX_DOCS_FOR_CHARACTER_SPLIT:
        yield from _split_by_characters(_nonempty(source), sum(lengths), split)
        return
    for document in _nonempty(source):
        text = document.text() if isinstance(document, Conversation) else document
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        is_validation = int.from_bytes(digest[:4], "big") < VALIDATION_FRACTION * 2**32
        if is_validation == (split == "validation"):
            yield document


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
