"""The source files of the running Python's standard library, a text source that every machine has."""

import hashlib
import os
import sysconfig
from pathlib import Path

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VALIDATION_FRACTION = 1 / 20


def root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def files(split: str = "train") -> list[Path]:
    """The `.py` files of a split ("train", "validation" or "all"), without tests and site-packages, in a fixed order.

    A file's split depends on the hash of its path inside the library, so that it is the same across Python versions.
    """
    if split not in ("train", "validation", "all"):
        raise ValueError(f"split: got {split!r}, expected 'train', 'validation' or 'all'")
    paths: list[Path] = []
    for directory, subdirectories, names in os.walk(root()):
        subdirectories[:] = [name for name in subdirectories if name not in EXCLUDED]
        paths += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(path for path in paths if split == "all" or is_validation(path) == (split == "validation"))


def is_validation(path: Path) -> bool:
    name = path.relative_to(root()).as_posix()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < VALIDATION_FRACTION * 2**32


def documents(split: str = "train") -> list[str]:
    """The text of each file of `files(split)` that is UTF-8."""
    texts = []
    for path in files(split):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts
