"""Where Subquad keeps what it fetches or computes once; knows nothing of what that is."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$SUBQUAD_CACHE`, else `subquad` in the user's cache directory."""
    chosen = os.environ.get("SUBQUAD_CACHE")
    return Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "subquad")).expanduser()
