"""Token mixers, one file each. The registry of mixers is `subquad.registry.MIXERS`.

The control `softmax` has no file here: it is the teacher's own attention, which `subquad.modeling` keeps. `Mixer`,
which needs torch, is imported at first use.
"""

from typing import TYPE_CHECKING, Any

from subquad.mixers.options import (
    ATTENTION,
    KEPT_ATTENTION,
    OPTIONS,
    SOFTMAX,
    AttentionSpec,
    MixerOptions,
    create,
    create_memory,
    find_options,
    get,
    memory_mistakes,
    memory_options,
    names,
)
from subquad.registry import MIXERS

if TYPE_CHECKING:
    from subquad.mixers.base import Mixer

__all__ = [
    "ATTENTION",
    "KEPT_ATTENTION",
    "MIXERS",
    "OPTIONS",
    "SOFTMAX",
    "AttentionSpec",
    "Mixer",
    "MixerOptions",
    "create",
    "create_memory",
    "find_options",
    "get",
    "memory_mistakes",
    "memory_options",
    "names",
]


def __getattr__(name: str) -> Any:
    if name != "Mixer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from subquad.mixers.base import Mixer

    return Mixer
