"""Sources of text: resolves the name in a recipe to files or to a dataset on the Hugging Face hub. Reads no text."""

import hashlib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from subquad.config import Data, MixtureSource
from subquad.data import stdlib
from subquad.utils import UserError, nearest, needs_extra

STDLIB = "python-stdlib"
TABLE_SUFFIXES = (".jsonl", ".parquet")
"""Suffixes of files with one document per row."""
MULTI_DOC_SUFFIXES = (".txt", *TABLE_SUFFIXES)
CODE_SUFFIXES = (".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh")
SINGLE_DOC_SUFFIXES = (".md", ".rst", ".tex", *CODE_SUFFIXES)
"""Suffixes of files with one document each."""
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")

Split = Literal["train", "validation"]
SplitOrAll = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Source:
    """A source of documents: the standard library, files in reading order, or a dataset of the hub."""

    name: str
    kind: Literal["stdlib", "files", "hub"]
    files: tuple[Path, ...] = ()
    column: str = "text"
    """The column of a table that holds the documents."""
    chat: bool = False
    """Whether the documents of a table are conversations."""
    split: str = "train"
    """Split of a hub dataset, like the two below."""
    subset: str | None = None
    streaming: bool = True
    key: str = "data.source"
    """The recipe key that names the source, for errors."""

    @property
    def label(self) -> str:
        return f"{self.key} {self.name!r}"

    @property
    def is_table(self) -> bool:
        return self.kind == "hub" or any(suffix(path) in TABLE_SUFFIXES for path in self.files)

    def fingerprint(self) -> list[object]:
        """Identifies the text. Of a hub dataset only name, column, subset and split are compared, not its content."""
        if self.kind == "stdlib":
            return [self.name, sys.version, *((str(p), p.stat().st_size) for p in self.files)]
        table_key = [self.column, self.chat] if self.is_table else []
        hub_key = [self.subset, self.split] if self.kind == "hub" else []
        files = ((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files)
        return [self.name, *table_key, *hub_key, *files]


def resolve(name: str, key: str = "data.source", **settings: Any) -> Source:
    """The source with a name; UserError if there is none.

    key: the recipe key that holds the name, for errors.
    settings: `column`, `chat`, `split`, `subset` and `streaming` of the `Source`.
    """
    label = f"{key} {name!r}"
    if name == STDLIB:
        return Source(name, "stdlib", _hash_order(stdlib.files("all"), stdlib.root()), key=key)
    path = Path(name).expanduser()
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise UserError(f"{label}: no text in this directory; expected files {_suffixes()}")
        return Source(name, "files", files, key=key, **settings)
    if path.exists():
        if suffix(path) not in MULTI_DOC_SUFFIXES + SINGLE_DOC_SUFFIXES:
            raise UserError(f"{label}: unknown file type; expected {_suffixes()}")
        return Source(name, "files", (path,), key=key, **settings)
    if (
        suffix(path) in MULTI_DOC_SUFFIXES + SINGLE_DOC_SUFFIXES
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        or name.startswith(".")
    ):
        raise UserError(f"{label}: no such file or directory{_nearest_file(path)}")
    close = nearest(name, [STDLIB])
    hint = close if "did you mean" in close else f"; expected '{STDLIB}', a file, a directory or a hub id."
    with needs_extra(f"{label}: no such file or directory{hint} A dataset of the hub", "data"):
        from datasets import load_dataset  # noqa: F401 (a directory of that name has none)
    return Source(name, "hub", key=key, **settings)


def resolve_sources(data: Data, split: Split) -> list[tuple[Source, SplitOrAll, float]]:
    """The sources of a recipe's training or validation text, the split of each that is used, and their weights.

    With `data.validation`, sources are used whole. Only the standard library always keeps its split, because the nano
    teacher was trained on its training files.

    Raises:
        UserError: a source does not exist, or `data.chat` is true and no source is a table.
    """
    key = "source" if split == "train" or data.validation is None else "validation"
    names = getattr(data, key)
    mixture = {names: MixtureSource()} if isinstance(names, str) else names
    sources: list[tuple[Source, SplitOrAll, float]] = []
    for name, entry in mixture.items():
        source = resolve(name, f"data.{key}", **_source_settings(data, entry))
        use_all = data.validation is not None and source.kind != "stdlib"
        sources.append((source, "all" if use_all else split, entry.weight))
    if split == "train" and data.chat and not any(source.is_table for source, _, _ in sources):
        raise UserError(
            f"data.chat: got true for {', '.join(map(repr, mixture))}, expected {' or '.join(TABLE_SUFFIXES)} files or "
            f"a hub dataset with conversations in the column {data.column!r}"
        )
    return sources


def _source_settings(data: Data, entry: MixtureSource) -> dict[str, Any]:
    """The settings of a source of a mixture; those that it does not set are the data's."""
    chat = entry.chat
    if chat is None:
        chat = data.chat if entry.column is None else entry.column == "messages"
    column = entry.column or ("messages" if entry.chat and not data.chat else data.column)
    return {
        "column": column,
        "chat": chat,
        "split": entry.split or data.split,
        "subset": entry.subset or data.subset,
        "streaming": data.streaming,
    }


def suffix(path: Path) -> str:
    """The suffix of a file's content, without that of its compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED_SUFFIXES else path.suffix.lower()


def _suffixes() -> str:
    names = ", ".join(MULTI_DOC_SUFFIXES + SINGLE_DOC_SUFFIXES[:4])
    return f"{names} and other source text, also compressed ({', '.join(COMPRESSED_SUFFIXES)})"


def _nearest_file(path: Path) -> str:
    """The end of an error: the nearest name in the directory of a missing file."""
    if not path.parent.is_dir():
        return f"; the directory {str(path.parent)!r} does not exist either"
    close = nearest(path.name, sorted(p.name for p in path.parent.iterdir()))
    return close if "did you mean" in close else f"; expected '{STDLIB}', a file, a directory or a hub id"


def _files_below(root: Path) -> tuple[Path, ...]:
    paths: list[Path] = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith((".", "__pycache__"))]
        paths += [Path(directory, name) for name in names if not name.startswith(".")]
    text = [path for path in paths if suffix(path) in MULTI_DOC_SUFFIXES + SINGLE_DOC_SUFFIXES and path.is_file()]
    return _hash_order(text, root)


def _hash_order(files: Iterable[Path], root: Path) -> tuple[Path, ...]:
    """A fixed order by a hash of the names: in alphabetical order, the first files would all be of one kind."""
    return tuple(sorted(files, key=lambda p: hashlib.sha256(os.fsencode(p.relative_to(root).as_posix())).digest()))
