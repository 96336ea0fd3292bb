"""The source files of the running Python's standard library, a text source that every machine has."""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VALIDATION_FRACTION = 1 / 20


def root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def files(split: str = "train") -> list[Path]:
    """The `.py` files of a split ("train", "validation" or "all"), without tests and site-packages, in a fixed order.

    A file's split depends on the hash of its path inside the library, so that it is the same across Python versions.
    """
    paths = [path for path in files_below(root(), EXCLUDED.__contains__) if path.suffix == ".py"]
    return sorted(path for path in paths if is_in_split(path.relative_to(root()).as_posix(), split))


def is_in_split(key: str, split: str) -> bool:
    """Whether the document with a key, its path or its text, is in a split: by hash, one in 20 is in "validation"."""
    if split == "all":
        return True
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    is_validation = int.from_bytes(digest[:4], "big") < VALIDATION_FRACTION * 2**32
    return is_validation == (split == "validation")


def documents(split: str = "train") -> list[str]:
    """The text of each file of `files(split)` that is UTF-8."""
    return list(read(files(split)))


def read(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few library files are in another encoding on purpose


def files_below(directory: Path, excluded: Callable[[str], bool]) -> Iterator[Path]:
    """The files in a directory and its subdirectories, without those of an excluded name."""
    for parent, subdirectories, names in os.walk(directory):
        subdirectories[:] = [name for name in subdirectories if not excluded(name)]
        yield from (Path(parent, name) for name in names if not excluded(name))
