"""The token mixers, one file each, and the registry that knows them by name.

`softmax` is the control: the teacher's own attention, kept by `subquad.modeling` as it stands; it has no file here.
"""

from typing import Any

from subquad.mixers.base import AttentionSpec, Mixer, Options, State
from subquad.mixers.deltanet import DeltaNet
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.mixers.gla import GLA
from subquad.mixers.hgrn2 import HGRN2
from subquad.mixers.kda import KDA
from subquad.mixers.linear_attention import LinearAttention
from subquad.mixers.mamba2 import Mamba2
from subquad.mixers.metala import MetaLA
from subquad.mixers.retnet import RetNet
from subquad.mixers.xlstm import XLSTM
from subquad.utils import UserError, nearest

SOFTMAX = "softmax"
REGISTRY: dict[str, type[Mixer]] = {
    cls.name: cls for cls in (LinearAttention, RetNet, Mamba2, GLA, MetaLA, DeltaNet, GatedDeltaNet, XLSTM, KDA, HGRN2)
}

__all__ = ["REGISTRY", "SOFTMAX", "AttentionSpec", "Mixer", "Options", "State", "create", "get", "names"]


def names() -> list[str]:
    """Every name that a layer plan may hold: the mixers and the control."""
    return [*REGISTRY, SOFTMAX]


def get(name: str) -> type[Mixer]:
    """The class of a mixer; UserError with the nearest name where there is none."""
    if name not in REGISTRY:
        raise UserError(f"unknown mixer {name!r}{nearest(name, names())}")
    return REGISTRY[name]


def create(name: str, spec: AttentionSpec, **options: Any) -> Mixer:
    return get(name)(spec, **options)
