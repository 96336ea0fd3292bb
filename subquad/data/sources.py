"""Sources of text: from the name in a recipe to the files or the data set it means. Reads no text.

A source is `python-stdlib`, a file, a directory or a data set on the Hugging Face hub.
"""

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from subquad.config import Data, MixtureSource
from subquad.data import stdlib
from subquad.utils import UserError, nearest

STDLIB = "python-stdlib"
TABLES = (".jsonl", ".parquet")
"""Suffixes of files in which a document is a row and its text stands in a column."""
PROSE = (".txt", *TABLES)
WHOLE = (".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh")
"""Suffixes of files that are one document each; those in PROSE hold many."""
PACKED = (".gz", ".xz", ".zst")

Split = Literal["train", "validation"]
SplitOrAll = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Source:
    """Where documents come from: `kind` is "stdlib", "files" or "hub"; `files` in the order in which they are read.

    `column` and `chat` say what a row of a table holds; the rest is for the hub.
    """

    name: str
    kind: str
    files: tuple[Path, ...] = ()
    column: str = "text"
    chat: bool = False
    split: str = "train"
    subset: str | None = None
    streaming: bool = True

    @property
    def has_rows(self) -> bool:
        return self.kind == "hub" or any(suffix(path) in TABLES for path in self.files)

    def fingerprint(self) -> list[object]:
        """What has to be the same for the text to be the same; of a hub data set only its name, subset and split."""
        if self.kind == "stdlib":
            return [self.name, sys.version, *((str(p), p.stat().st_size) for p in self.files)]
        of_rows = [self.column, self.chat] if self.has_rows else []
        of_hub = [self.subset, self.split] if self.kind == "hub" else []
        files = ((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files)
        return [self.name, *of_rows, *of_hub, *files]


def resolve(name: str, **settings: Any) -> Source:
    """Which source a name means; UserError where there is none.

    settings: `column`, `chat`, `split`, `subset`, `streaming`, as in `Source`.
    """
    if name == STDLIB:
        return Source(name, "stdlib", _in_scattered_order(stdlib.files("all"), stdlib.root()))
    path = Path(name).expanduser()
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise UserError(f"corpus {name!r}: no text in this directory; expected files {_suffixes()}")
        return Source(name, "files", files, **settings)
    if path.exists():
        if suffix(path) not in PROSE + WHOLE:
            raise UserError(f"corpus {name!r}: unknown kind of file; expected {_suffixes()}")
        return Source(name, "files", (path,), **settings)
    if suffix(path) in PROSE + WHOLE or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"corpus {name!r}: no such file or directory{_beside(path)}")
    library = importlib.util.find_spec("datasets")
    if library is None or library.origin is None:  # a folder of that name has no origin
        close = nearest(name, [STDLIB])
        hint = close if "did you mean" in close else f"; expected '{STDLIB}', a file, a directory or a hub id"
        raise UserError(
            f"corpus {name!r}: no such file or directory, and a data set of the hub needs "
            f'`pip install "subquad[data]"`{hint}'
        )
    return Source(name, "hub", **settings)


def parts_of(data: Data, split: Split) -> list[tuple[Source, SplitOrAll, float]]:
    """The sources of a recipe's training or held-out text, which part of each that is, and their weights.

    With a held-out source of its own, all of the others is for training; only the standard library keeps its split,
    because the nano teacher knows the training side by heart.

    Raises:
        UserError: no such source, or conversations expected where no source has rows.
    """
    chosen = data.source if split == "train" or data.validation is None else data.validation
    mixture = {chosen: MixtureSource()} if isinstance(chosen, str) else chosen
    parts: list[tuple[Source, SplitOrAll, float]] = []
    for name, share in mixture.items():
        source = resolve(name, **_settings(data, share))
        whole = data.validation is not None and source.kind != "stdlib"
        parts.append((source, "all" if whole else split, share.weight))
    if split == "train" and data.chat and not any(source.has_rows for source, _, _ in parts):
        raise UserError(
            f"corpus {', '.join(map(repr, mixture))} holds no conversations; expected {' or '.join(TABLES)} or a data "
            f"set of the hub with the column {data.column!r}"
        )
    return parts


def _settings(data: Data, share: MixtureSource) -> dict[str, Any]:
    """What a share of a mixture leaves open is as in the corpus."""
    chat = share.chat
    if chat is None:
        chat = data.chat if share.column is None else share.column == "messages"
    column = share.column or ("messages" if share.chat and not data.chat else data.column)
    return {
        "column": column,
        "chat": chat,
        "split": share.split or data.split,
        "subset": share.subset or data.subset,
        "streaming": data.streaming,
    }


def suffix(path: Path) -> str:
    """The suffix that says what a file holds, past that of its compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def _suffixes() -> str:
    return f"{', '.join(PROSE + WHOLE[:4])} and other source text, also with {', '.join(PACKED)} behind"


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
    text = [path for path in found if suffix(path) in PROSE + WHOLE and path.is_file()]
    return _in_scattered_order(text, root)


def _in_scattered_order(files: Iterable[Path], root: Path) -> tuple[Path, ...]:
    """A fixed order without rhyme: by their names, the first files would all be of one kind."""
    return tuple(sorted(files, key=lambda p: hashlib.sha256(os.fsencode(p.relative_to(root).as_posix())).digest()))
