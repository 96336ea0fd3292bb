"""All mixers by name."""

from typing import Any

from subquad.mixers.base import Mixer
from subquad.mixers.deltanet import DeltaNet
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.mixers.gla import GLA
from subquad.mixers.hgrn2 import HGRN2
from subquad.mixers.kda import KDA
from subquad.mixers.linear_attention import LinearAttention
from subquad.mixers.mamba2 import Mamba2
from subquad.mixers.metala import MetaLA
from subquad.mixers.options import find_options
from subquad.mixers.retnet import RetNet
from subquad.mixers.spec import AttentionSpec
from subquad.mixers.xlstm import XLSTM

REGISTRY: dict[str, type[Mixer]] = {
    cls.name: cls for cls in (LinearAttention, RetNet, Mamba2, GLA, MetaLA, DeltaNet, GatedDeltaNet, XLSTM, KDA, HGRN2)
}


def get(name: str) -> type[Mixer]:
    """The class of a mixer. An unknown name is a UserError with the nearest name."""
    find_options(name)
    return REGISTRY[name]


def create(name: str, spec: AttentionSpec, **options: Any) -> Mixer:
    """A mixer at its initialization, drawn from torch's global random generator."""
    return get(name)(spec, **options)
