"""Token mixers, one file each, and their registry.

The control `softmax` has no file here: it is the teacher's own attention, which `subquad.modeling` keeps. Names that
need torch are imported at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from subquad.mixers.options import ATTENTION, OPTIONS, SOFTMAX, MixerOptions
from subquad.mixers.options import mixer_names as names
from subquad.mixers.spec import AttentionSpec

if TYPE_CHECKING:
    from subquad.mixers.base import Mixer, State
    from subquad.mixers.registry import REGISTRY, create, get

__all__ = [
    "ATTENTION",
    "OPTIONS",
    "REGISTRY",
    "SOFTMAX",
    "AttentionSpec",
    "Mixer",
    "MixerOptions",
    "State",
    "create",
    "get",
    "names",
]

LAZY = {"Mixer": "base", "State": "base", "REGISTRY": "registry", "create": "registry", "get": "registry"}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"subquad.mixers.{LAZY[name]}"), name)
