"""Token mixers, one file each. The registry of mixers is `subquad.registry.MIXERS`.

The control `softmax` has no file here: it is the teacher's own attention, which `subquad.modeling` keeps. Names that
need torch are imported at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from subquad.mixers.options import (
    ATTENTION,
    KEPT_ATTENTION,
    OPTIONS,
    SOFTMAX,
    MixerOptions,
    create,
    find_options,
    get,
    names,
)
from subquad.mixers.spec import AttentionSpec
from subquad.registry import MIXERS

if TYPE_CHECKING:
    from subquad.mixers.base import Mixer, State

__all__ = [
    "ATTENTION",
    "KEPT_ATTENTION",
    "MIXERS",
    "OPTIONS",
    "SOFTMAX",
    "AttentionSpec",
    "Mixer",
    "MixerOptions",
    "State",
    "create",
    "find_options",
    "get",
    "names",
]


def __getattr__(name: str) -> Any:
    if name not in ("Mixer", "State"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("subquad.mixers.base"), name)
