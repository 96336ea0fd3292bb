"""Sources of text: resolves the name in a recipe to files or to a dataset on the Hugging Face hub. Reads no text."""

import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from subquad.config import Data, MixtureSource
from subquad.utils import UserError, nearest

STDLIB = "python-stdlib"
"""The `.py` files of the running Python's standard library, a source that every machine has."""
LIBRARY = Path(sysconfig.get_path("stdlib"))
"""Its directory."""
LIBRARY_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLE_SUFFIXES = (".jsonl", ".parquet")
"""Of files with one document per row."""
CODE_SUFFIXES = (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh")
SUFFIXES = (".txt", *TABLE_SUFFIXES, ".md", ".rst", ".tex", *CODE_SUFFIXES)
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
EXPECTED = f"{', '.join(SUFFIXES[:7])} and other source text, also compressed ({', '.join(COMPRESSED_SUFFIXES)})"

Split = Literal["train", "validation"]
SplitOrAll = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Source:
    """A source of documents: files in reading order, or without files a dataset of the hub."""

    name: str
    key: str = "data.source"
    """The recipe key with the name, for errors."""
    files: tuple[Path, ...] = ()
    part: SplitOrAll = "all"
    """What is read of the text."""
    weight: float = 1.0
    """In a mixture."""
    column: str = "text"
    """Of a table: the column with the documents."""
    chat: bool = False
    """Of a table: whether its documents are conversations."""
    split: str = "train"
    """Of a dataset of the hub, like the next two."""
    subset: str | None = None
    streaming: bool = True

    @property
    def label(self) -> str:
        return f"{self.key} {self.name!r}"

    @property
    def is_table(self) -> bool:
        return not self.files or any(suffix(path) in TABLE_SUFFIXES for path in self.files)

    def fingerprint(self) -> list[object]:
        """Identifies the text. Of a hub dataset only its name and what is read of it are compared, not its content."""
        is_stdlib = self.name == STDLIB  # its version is compared in place of the times of its files
        stats = [(str(path.resolve()), path.stat()) for path in self.files]
        files = [(path, stat.st_size, sys.version if is_stdlib else stat.st_mtime_ns) for path, stat in stats]
        return [self.name, self.part, self.column, self.chat, self.subset, self.split, files]


def resolve(name: str, key: str = "data.source", **settings: Any) -> Source:
    """The source with a name; UserError if there is none. `settings` are other fields of the `Source`."""
    source, path = Source(name, key, **settings), Path(name).expanduser()
    if name == STDLIB:
        files = [file for file in _files_below(LIBRARY, LIBRARY_EXCLUDED.__contains__) if file.suffix == ".py"]
        return replace(source, chat=False, files=_hash_order(files, LIBRARY))
    if path.is_dir():
        files = [file for file in _files_below(path, _is_hidden) if suffix(file) in SUFFIXES and file.is_file()]
        if not files:
            raise UserError(f"{source.label}: no text in this directory; expected files {EXPECTED}")
        return replace(source, files=_hash_order(files, path))
    if path.exists():
        if suffix(path) not in SUFFIXES:
            raise UserError(f"{source.label}: unknown file type; expected {EXPECTED}")
        return replace(source, files=(path,))
    if suffix(path) not in SUFFIXES and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        return source
    hint = f"; the directory {str(path.parent)!r} does not exist either"
    if path.parent.is_dir():
        hint = nearest_source(path.name, sorted(file.name for file in path.parent.iterdir()))
    raise UserError(f"{source.label}: no such file or directory{hint}")


def nearest_source(name: str, valid: Iterable[str] = (STDLIB,)) -> str:
    """The end of an error about an unknown name of a source."""
    close = nearest(name, valid)
    return close if "did you mean" in close else f"; expected '{STDLIB}', a file, a directory or a hub id"


def resolve_sources(data: Data, split: Split) -> list[Source]:
    """The sources of a recipe's training or validation text.

    With `data.validation`, sources are used whole. Only the standard library always keeps its split, because the nano
    teacher was trained on its training files.

    Raises:
        UserError: a source does not exist, or `data.chat` is true and no source is a table.
    """
    key = "source" if split == "train" or data.validation is None else "validation"
    names = getattr(data, key)
    mixture = {names: MixtureSource()} if isinstance(names, str) else names
    sources = []
    for name, entry in mixture.items():
        chat = entry.chat
        if chat is None:
            chat = data.chat if entry.column is None else entry.column == "messages"
        settings = {
            "part": split if data.validation is None or name == STDLIB else "all",
            "weight": entry.weight,
            "column": entry.column or ("messages" if entry.chat and not data.chat else data.column),
            "chat": chat,
            "split": entry.split or data.split,
            "subset": entry.subset or data.subset,
            "streaming": data.streaming,
        }
        sources.append(resolve(name, f"data.{key}", **settings))
    if split == "train" and data.chat and not any(source.is_table for source in sources):
        raise UserError(
            f"data.chat: got true for {', '.join(map(repr, mixture))}, expected {' or '.join(TABLE_SUFFIXES)} files or "
            f"a hub dataset with conversations in the column {data.column!r}"
        )
    return sources


def suffix(path: Path) -> str:
    """The suffix of a file's content, without that of its compression."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED_SUFFIXES else path).suffix.lower()


def _files_below(directory: Path, excluded: Callable[[str], bool]) -> Iterator[Path]:
    """The files in a directory and its subdirectories, without those of an excluded name."""
    for parent, subdirectories, names in os.walk(directory):
        subdirectories[:] = [name for name in subdirectories if not excluded(name)]
        yield from (Path(parent, name) for name in names if not excluded(name))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__pycache__"))


def _hash_order(files: Iterable[Path], root: Path) -> tuple[Path, ...]:
    """A fixed order by a hash of the names: in alphabetical order, the first files would all be of one kind."""
    return tuple(sorted(files, key=lambda p: hashlib.sha256(os.fsencode(p.relative_to(root).as_posix())).digest()))
