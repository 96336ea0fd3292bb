"""The text of the running Python's own standard library: a corpus that every machine has.

Knows which files count and how they are split; knows nothing of tokenizers or models.
"""

import hashlib
import os
import sysconfig
from pathlib import Path

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VALID_SHARE = 1 / 20


def root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def files(split: str = "train") -> list[Path]:
    """Every `.py` file of the standard library outside its tests and site-packages, in a fixed order.

    The split is by file: a file is held out where the hash of its path inside the library says so, so that it stays
    on its side of the split from one Python version to the next. `split` is "train", "validation" or "all".
    """
    if split not in ("train", "validation", "all"):
        raise ValueError(f"split is {split!r}; expected 'train', 'validation' or 'all'")
    found = []
    for folder, folders, names in os.walk(root()):
        folders[:] = [name for name in folders if name not in EXCLUDED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(path for path in found if split == "all" or is_held_out(path) == (split == "validation"))


def is_held_out(path: Path) -> bool:
    name = path.relative_to(root()).as_posix()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < VALID_SHARE * 2**32


def documents(split: str = "train") -> list[str]:
    """The text of each file of `files(split)`; the few that are not UTF-8 are left out."""
    texts = []
    for path in files(split):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts
