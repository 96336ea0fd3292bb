"""The options of every mixer, with defaults, sources and validation.

Imports no torch: the command line and recipes check options before any model is loaded.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from subquad.mixers.spec import AttentionSpec
from subquad.registry import MIXERS
from subquad.utils import UserError, nearest

if TYPE_CHECKING:
    from subquad.mixers.base import Mixer

SOFTMAX = "softmax"
"""The control: the teacher's own attention; with copy_qkv false its projections are random."""
ATTENTION = "attention"
"""The layer type that keeps the teacher's attention, with an optional window."""
KEPT_ATTENTION = (SOFTMAX, ATTENTION)
"""The layer types that are no mixer of this package or another."""
QK_ACTIVATIONS = ("silu", "elu1", "relu", "none")
OUTPUT_GATES = ("swish", "sigmoid", "none")
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True)
class MixerOptions:
    """Options of every mixer; subclasses add options and change defaults. Saved in the student's configuration."""

    source: ClassVar[str] = ""
    """One line: the mixer's paper and what distinguishes the mixer."""

    qk_activation: str = "silu"
    """Feature map of queries and keys: silu, elu1 (elu + 1), relu or none."""
    short_conv: int = 0
    """Width of the causal depthwise convolution on q, k and v; 0: no convolution. Initialized to the identity."""
    rotary: bool = False
    """Keep the teacher's rotary embedding of queries and keys."""
    qk_norm: bool = False
    """Keep the teacher's norm of queries and keys, with its weights. Applied before the rotary embedding."""
    output_norm: bool = True
    """RMS norm of each head's output, with a weight per channel."""
    output_gate: str = "swish"
    """Gate on the output, computed from x: swish, sigmoid or none."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, expected = getattr(self, field.name), type(field.default)
            accepted = (int, float) if expected is float else expected
            if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
                raise UserError(f"{field.name}: got {value!r}, expected {TYPE_NAMES[expected]}")
        self.check_choice("qk_activation", QK_ACTIVATIONS)
        self.check_choice("output_gate", OUTPUT_GATES)
        if self.short_conv < 0 or self.short_conv == 1:
            raise UserError(f"short_conv: got {self.short_conv}, expected 0 (no convolution) or a width of at least 2")

    def check_choice(self, name: str, choices: Iterable[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise UserError(f"{name}: got {value!r}{nearest(value, choices)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Options from a mapping. Raises UserError with a line for each unknown name or invalid value."""
        if mistakes := cls.mistakes(values):
            raise UserError(*mistakes.values())
        return cls(**values)

    @classmethod
    def mistakes(cls, values: dict[str, Any]) -> dict[str, str]:
        """A message for each name of `values` that is unknown or has an invalid value."""
        known = [field.name for field in fields(cls)]
        mistakes = {
            name: f"unknown mixer option {name!r}{nearest(name, known)}" for name in values if name not in known
        }
        valid = {name: value for name, value in values.items() if name in known}
        while True:
            try:
                cls(**valid)
            except UserError as error:
                name = str(error).partition(":")[0]
                if not any(other in str(error) for other in mistakes):  # a default in place of a wrong value
                    mistakes[name] = str(error)
                if valid.pop(name, None) is None:
                    return mistakes
            else:
                return mistakes


@dataclass(frozen=True)
class DecayOptions(MixerOptions):
    """Options of mixers with a learned decay."""

    half_life: float = 64.0
    """Initial half-life of the state in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.half_life < math.inf:
            raise UserError(f"half_life: got {self.half_life}, expected a positive, finite number of tokens")


@dataclass(frozen=True)
class ExportOptions(DecayOptions):
    """Options that make a mixer equal to a layer of a published architecture (docs/serving.md). Off by default;
    `linearize(..., export_target=...)` sets them."""

    v_activation: str = "none"
    """Activation of values after their convolution: silu or none."""
    biases: bool = True
    """False: no biases in the q, k, v and o projections, nor in the gates."""
    norm_eps: float = 1e-8
    """Epsilon of the output norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("v_activation", ("silu", "none"))
        if not 0 < self.norm_eps < 1:
            raise UserError(f"norm_eps: got {self.norm_eps}, expected a number between 0 and 1")


@dataclass(frozen=True)
class LinearAttentionOptions(MixerOptions):
    source: ClassVar[str] = "Linear attention (arXiv 2006.16236): a feature map replaces the softmax kernel."
    output_gate: str = "none"
    normalizer: bool = False
    """Divide by phi(q) . sum of phi(k), which requires a positive phi (elu1, relu). Without effect before an output
    norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalizer and self.qk_activation not in ("elu1", "relu"):
            raise UserError(
                f"normalizer: got true with qk_activation {self.qk_activation!r}, expected qk_activation elu1 or relu: "
                "the normalizer must be positive"
            )


@dataclass(frozen=True)
class RetNetOptions(MixerOptions):
    source: ClassVar[str] = "RetNet's retention (arXiv 2307.08621): a fixed decay per head."
    rotary: bool = True


@dataclass(frozen=True)
class Mamba2Options(ExportOptions):
    source: ClassVar[str] = "Mamba-2 (arXiv 2405.21060) in MOHAWK's discrete form (arXiv 2408.10189): a decay per head."
    short_conv: int = 4
    discretization: str = "unit"
    """unit: MOHAWK's discrete form; zoh: Mamba-2's, with a step size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("discretization", ("unit", "zoh"))


@dataclass(frozen=True)
class GLAOptions(DecayOptions):
    source: ClassVar[str] = "Gated linear attention (arXiv 2312.06635): a decay per channel from a low-rank projection."
    decay_rank: int = 16
    """Rank of the decay's projection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_rank < 1:
            raise UserError(f"decay_rank: got {self.decay_rank}, expected at least 1")


@dataclass(frozen=True)
class MetaLAOptions(GLAOptions):
    source: ClassVar[str] = "MetaLA (arXiv 2411.10741): a decay per channel and no key projection, k = 1 - decay."
    half_life: float = 256.0
    """Longest initial half-life of a head's channels, in tokens; the shortest is one token."""


@dataclass(frozen=True)
class DeltaNetOptions(MixerOptions):
    source: ClassVar[str] = "DeltaNet (arXiv 2406.06484): the delta rule, without decay."
    short_conv: int = 4
    output_gate: str = "none"
    beta_init: float = 0.05
    """Initial beta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_init < 1:
            raise UserError(f"beta_init: got {self.beta_init}, expected a number between 0 and 1")


@dataclass(frozen=True)
class GatedDeltaNetOptions(DeltaNetOptions, ExportOptions):
    source: ClassVar[str] = "Gated DeltaNet (arXiv 2412.06464): the delta rule with Mamba-2's decay per head."
    output_gate: str = "swish"
    half_life: float = 32.0
    beta_init: float = 0.1


@dataclass(frozen=True)
class XLSTMOptions(DecayOptions):
    source: ClassVar[str] = "xLSTM's mLSTM (arXiv 2405.04517): a decay per head, exponential input gate, normalizer."
    output_gate: str = "sigmoid"


@dataclass(frozen=True)
class KDAOptions(DeltaNetOptions, DecayOptions):
    source: ClassVar[str] = "Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay per channel."
    output_gate: str = "sigmoid"
    half_life: float = 32.0
    beta_init: float = 0.1


@dataclass(frozen=True)
class HGRN2Options(DecayOptions):
    source: ClassVar[str] = "HGRN2 (arXiv 2404.07904): a decay per channel and no key projection, k = 1 - decay."
    output_gate: str = "none"
    half_life: float = 256.0
    """Longest initial half-life of a head's channels, in tokens; the shortest is one token."""
    lower_bound: float = 0.0
    """Lower bound of a channel's decay factor, from 0 to below 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lower_bound < 0.5:
            raise UserError(f"lower_bound: got {self.lower_bound}, expected a number from 0 to below 0.5")


OPTIONS: dict[str, type[MixerOptions]] = {
    "linear_attention": LinearAttentionOptions,
    "retnet": RetNetOptions,
    "mamba2": Mamba2Options,
    "gla": GLAOptions,
    "metala": MetaLAOptions,
    "deltanet": DeltaNetOptions,
    "gated_deltanet": GatedDeltaNetOptions,
    "xlstm": XLSTMOptions,
    "kda": KDAOptions,
    "hgrn2": HGRN2Options,
}
"""Options of each built-in mixer, in display order."""


def names() -> list[str]:
    """Names of all mixers and of the control."""
    return [*MIXERS, SOFTMAX]


def find_options(name: str) -> type[MixerOptions]:
    """The options class of a mixer. An unknown name is a UserError with the nearest name."""
    return OPTIONS[name] if name in OPTIONS else get(name).Options


def get(name: str) -> "type[Mixer]":
    """The class of a mixer. An unknown name is a UserError with the nearest name."""
    return MIXERS.find(name, SOFTMAX)


def create(name: str, spec: AttentionSpec, **options: Any) -> "Mixer":
    """A mixer at its initialization, drawn from torch's global random generator."""
    return get(name)(spec, **options)
