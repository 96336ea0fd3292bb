"""Sources of text: from the name in a recipe to documents, split into training and held-out text.

A source is `python-stdlib`, a file, a directory or a data set on the Hugging Face hub. Knows nothing of tokens.
"""

import gzip
import hashlib
import importlib.util
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from subquad.config import Corpus
from subquad.data import stdlib
from subquad.errors import UserError, nearest

STDLIB = "python-stdlib"
SEPARATOR = b"<|endoftext|>"
PROSE = (".txt", ".jsonl")
WHOLE = (".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh")
"""Suffixes of files that are one document each; `.txt` and `.jsonl` hold many."""
OPENERS: dict[str, Callable[..., IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
PASSAGE = 20_000
"""Characters from which on a passage of a text file without separators ends at its next blank line."""
FEW = 200
"""With no more documents than this, a share of them is too coarse or even empty: held out is the end of the text."""
VALID_SHARE = 1 / 20

Split = Literal["train", "valid"]
Part = Literal["train", "valid", "all"]


@dataclass(frozen=True)
class Source:
    """Where documents come from: `kind` is "stdlib", "files" or "hub"; `files` in the order in which they are read."""

    name: str
    kind: str
    files: tuple[Path, ...] = ()

    def fingerprint(self) -> list[object]:
        """What has to be the same for the text to be the same; of a hub data set only the name."""
        if self.kind == "stdlib":
            return [self.name, sys.version, *((str(p), p.stat().st_size) for p in self.files)]
        return [self.name, *((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files)]


def check_corpus(corpus: Corpus) -> None:
    """Finds what is wrong with a recipe's corpus before anything heavy is loaded: reads the first local document.

    Raises:
        UserError: no such source, nothing in it, or not text.
    """
    for name in (corpus.source, corpus.valid):
        source = None if name is None else resolve(name)
        if source is not None and source.kind != "hub" and next(_documents(source, "all"), None) is None:
            raise UserError(f"corpus {name!r} is empty; expected text")


def part_of(corpus: Corpus, split: Split) -> tuple[Source, Part]:
    """Which source, and which part of it, is the training or the held-out text of a recipe.

    With a held-out source of its own, all of the other is for training; only the standard library keeps its split,
    because the nano teacher knows the training side by heart.
    """
    source = resolve(corpus.source if split == "train" or corpus.valid is None else corpus.valid)
    whole = corpus.valid is not None and source.kind != "stdlib"
    return source, "all" if whole else split


def documents(source: str, split: Part = "train") -> Iterator[str]:
    """The documents of a source, the same ones in the same order every time.

    - `python-stdlib`: a document a file; see `subquad.data.stdlib`.
    - `.txt` (also `.gz`, `.xz`): what stands between lines `<|endoftext|>`; where there is no such line, passages of
      about 20,000 characters that end at a blank line. Line ends become `\\n`.
    - `.jsonl` (likewise): the value of `text` of each line.
    - `.md`, `.py` and other source text: a document a file.
    - a directory: all such files below it, hidden ones left out, in a fixed order drawn from their names, so that a
      part of it is a fair sample of the whole.
    - otherwise the id of a data set on the Hugging Face hub, streamed: the column `text` of its split "train".

    "train" and "valid" never share text: held out is each document by the hash of its text, one in 20; of at most 200
    documents the last twentieth of the text, by characters. "all" is both.

    Raises:
        UserError: no such source, at once; while reading, what is not text, with file and byte.
    """
    if split not in ("train", "valid", "all"):
        raise ValueError(f"split is {split!r}; expected 'train', 'valid' or 'all'")
    return _documents(resolve(source), split)


def resolve(name: str) -> Source:
    """Which source a name means; UserError where there is none. Reads no text."""
    if name == STDLIB:
        return Source(name, "stdlib", _in_scattered_order(stdlib.files("all"), stdlib.root()))
    path = Path(name).expanduser()
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise UserError(f"corpus {name!r}: no text in this directory; expected files {_suffixes()}")
        return Source(name, "files", files)
    if path.exists():
        if _suffix(path) not in PROSE + WHOLE:
            raise UserError(f"corpus {name!r}: unknown kind of file; expected {_suffixes()}")
        return Source(name, "files", (path,))
    if _suffix(path) in PROSE + WHOLE or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"corpus {name!r}: no such file or directory{_beside(path)}")
    library = importlib.util.find_spec("datasets")
    if library is None or library.origin is None:  # a folder of that name has no origin
        close = nearest(name, [STDLIB])
        hint = close if "did you mean" in close else f"; expected '{STDLIB}', a file, a directory or a hub id"
        raise UserError(
            f"corpus {name!r}: no such file or directory, and a data set of the hub needs `pip install datasets`{hint}"
        )
    return Source(name, "hub")


def _suffixes() -> str:
    return f"{', '.join(PROSE + WHOLE[:4])} and other source text, also with {' or '.join(OPENERS)} behind"


def _suffix(path: Path) -> str:
    """The suffix that says what a file holds, past that of its compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in OPENERS else path.suffix.lower()


def _beside(path: Path) -> str:
    """The nearest name in the directory where a file was expected."""
    if not path.parent.is_dir():
        return f"; there is no directory {str(path.parent)!r} either"
    close = nearest(path.name, sorted(p.name for p in path.parent.iterdir()))
    return close if "did you mean" in close else f"; expected '{STDLIB}', a file, a directory or a hub id"


def _files_below(root: Path) -> tuple[Path, ...]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    text = [path for path in found if _suffix(path) in PROSE + WHOLE and path.is_file()]
    return _in_scattered_order(text, root)


def _in_scattered_order(files: Iterable[Path], root: Path) -> tuple[Path, ...]:
    """A fixed order without rhyme: by their names, the first files would all be of one kind."""
    return tuple(sorted(files, key=lambda p: hashlib.sha256(os.fsencode(p.relative_to(root).as_posix())).digest()))


def _documents(source: Source, part: Part) -> Iterator[str]:
    if source.kind == "stdlib":
        # Its own split: by file name, so that a file stays on its side from one Python version to the next.
        for path in source.files:
            if part == "all" or stdlib.is_held_out(path) == (part == "valid"):
                try:
                    yield path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue  # a few files of the library are in another encoding, on purpose
    elif part == "all":
        yield from _all(source)
    else:
        yield from _split(source, part)


def _all(source: Source) -> Iterator[str]:
    texts = _hub_texts(source.name) if source.kind == "hub" else itertools.chain.from_iterable(map(_read, source.files))
    return (text for text in texts if text and not text.isspace())


def _split(source: Source, part: Part) -> Iterator[str]:
    lengths = [len(text) for text in itertools.islice(_all(source), FEW + 1)]
    if len(lengths) <= FEW:
        yield from _before_or_after(_all(source), sum(lengths), part)
        return
    for text in _all(source):
        held_out = (
            int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big")
            < VALID_SHARE * 2**32
        )
        if held_out == (part == "valid"):
            yield text


def _before_or_after(texts: Iterable[str], total: int, part: Part) -> Iterator[str]:
    """The text before its last twentieth, or that; cut at the end of a line where one is near."""
    cut = min(int(total * (1 - VALID_SHARE)), total - 1)
    start = 0
    for text in texts:
        at = min(max(cut - start, 0), len(text))
        if 0 < at < len(text):
            near = max(0, at - PASSAGE // 10)
            line_end = text.rfind("\n", near, at) + 1
            if line_end or (near == 0 and start > 0):
                at = line_end
        piece = text[:at] if part == "train" else text[at:]
        if piece:
            yield piece
        start += len(text)


# ---------------------------------------------------------------------- files


def _read(path: Path) -> Iterator[str]:
    kind = _suffix(path)
    if kind == ".jsonl":
        yield from _json_texts(path)
    elif kind == ".txt":
        yield from _passages(path)
    else:
        yield "".join(_lines(path))


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
            ends = (size >= PASSAGE and not stripped) or size >= 10 * PASSAGE
        if not (separated and ends):
            passage.append(line)
            size += len(line)
        if ends:
            yield "".join(passage).strip("\n")
            passage, size = [], 0
    yield "".join(passage).strip("\n")


def _json_texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); expected an object with the key 'text'") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}:{number}: no text under the key 'text'; found {keys or 'nothing'}")
        # JSON can escape half a character; no tokenizer takes it.
        yield record["text"].encode("utf-8", "replace").decode()


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
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            for line in file:
                yield line, offset
                offset += len(line)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged {path.suffix} file, behind byte {offset} of its content ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


# ---------------------------------------------------------------------- the hub


def _hub_texts(name: str) -> Iterator[str]:
    import datasets  # type: ignore[import-not-found]

    try:
        for record in datasets.load_dataset(name, split="train", streaming=True):
            if not isinstance(record.get("text"), str):
                raise UserError(f"corpus {name!r}: no text in its column 'text'; found {', '.join(record)}")
            yield record["text"]
    except UserError:
        raise
    except Exception as error:  # the library passes on whatever network and formats raise
        raise UserError(f"corpus {name!r}: not a local file, and the hub gave no such data set ({error})") from None
