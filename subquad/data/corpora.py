"""Sources to documents, split into training and held-out text. Knows nothing of tokens."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from subquad.config import Data
from subquad.data import stdlib
from subquad.data.chat import Conversation
from subquad.data.readers import PASSAGE_CHARACTERS, Document, read
from subquad.data.sources import Source, SplitOrAll, parts_of, resolve
from subquad.utils import UserError

MIN_DOCS_FOR_HASH_SPLIT = 200
"""With no more documents than this, a share of them is too coarse or even empty: held out is the end of the text."""
VALID_SHARE = 1 / 20


def check_data(data: Data) -> None:
    """Finds what is wrong with a recipe's corpus before anything heavy is loaded: reads the first local documents.

    Raises:
        UserError: no such source, nothing in it, or not text.
    """
    for source, _, _ in [*parts_of(data, "train"), *parts_of(data, "validation")]:
        if source.kind != "hub" and next(part_documents(source, "all"), None) is None:
            raise UserError(f"corpus {source.name!r} is empty; expected text")


def documents(
    source: str, split: SplitOrAll = "train", *, column: str = "text", chat: bool = False
) -> Iterator[Document]:
    """The documents of a source, the same ones in the same order every time.

    - `python-stdlib`: a document a file; see `subquad.data.stdlib`.
    - `.txt` (also `.gz`, `.xz`, `.zst`): what stands between lines `<|endoftext|>`; where there is no such line,
      passages of about 20,000 characters that end at a blank line. Line ends become `\\n`.
    - `.jsonl`, `.parquet` (likewise): the value of `column` of each row; a `Conversation` where `chat`.
    - `.md`, `.py` and other source text: a document a file.
    - a directory: all such files below it, hidden ones left out, in a fixed order drawn from their names, so that a
      part of it is a fair sample of the whole.
    - otherwise the id of a data set on the Hugging Face hub, streamed: `column` of its split "train".

    "train" and "validation" never share text: each document is held out by the hash of its text, one in 20; of
    at most 200 documents the last twentieth of the text, by characters. "all" is both.

    Raises:
        UserError: no such source, at once; while reading, what is not text, with file and place.
    """
    if split not in ("train", "validation", "all"):
        raise ValueError(f"split is {split!r}; expected 'train', 'validation' or 'all'")
    return part_documents(resolve(source, column=column, chat=chat), split)


def part_documents(source: Source, part: SplitOrAll) -> Iterator[Document]:
    """The documents of a part of a source; see `documents`."""
    if source.kind == "stdlib":
        # Its own split: by file name, so that a file stays on its side from one Python version to the next.
        for path in source.files:
            if part == "all" or stdlib.is_held_out(path) == (part == "validation"):
                try:
                    yield path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue  # a few files of the library are in another encoding, on purpose
    elif part == "all":
        yield from _all(source)
    else:
        yield from _split(source, part)


def _all(source: Source) -> Iterator[Document]:
    return (d for d in read(source) if len(d) and not (isinstance(d, str) and d.isspace()))


def _split(source: Source, part: SplitOrAll) -> Iterator[Document]:
    lengths = [len(document) for document in itertools.islice(_all(source), MIN_DOCS_FOR_HASH_SPLIT + 1)]
    if len(lengths) <= MIN_DOCS_FOR_HASH_SPLIT:
        yield from _before_or_after(_all(source), sum(lengths), part)
        return
    for document in _all(source):
        text = document.text() if isinstance(document, Conversation) else document
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        held_out = int.from_bytes(digest[:4], "big") < VALID_SHARE * 2**32
        if held_out == (part == "validation"):
            yield document


def _before_or_after(documents: Iterable[Document], total: int, part: SplitOrAll) -> Iterator[Document]:
    """The text before its last twentieth, or that; cut at the end of a line where one is near, or before the
    conversation in which it begins."""
    cut = min(int(total * (1 - VALID_SHARE)), total - 1)
    start = 0
    for document in documents:
        if isinstance(document, Conversation):
            if (start + len(document) > cut and start > 0) == (part == "validation"):
                yield document
        elif piece := _cut(document, cut - start, start == 0)[part == "validation"]:
            yield piece
        start += len(document)


def _cut(text: str, at: int, first: bool) -> tuple[str, str]:
    at = min(max(at, 0), len(text))
    if 0 < at < len(text):
        near = max(0, at - PASSAGE_CHARACTERS // 10)
        line_end = text.rfind("\n", near, at) + 1
        if line_end or (near == 0 and not first):
            at = line_end
    return text[:at], text[at:]
