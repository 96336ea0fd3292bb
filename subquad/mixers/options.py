"""What a mixer is made from: the attention that it replaces, and its options with defaults, sources and validation.

Imports no torch: the command line and recipes check options before any model is loaded.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    get_args,
    get_origin,
    get_type_hints,
)

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
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
QKActivation = Literal["silu", "elu1", "relu", "hedgehog", "ones", "none"]
POSITIVE = ("elu1", "relu", "hedgehog", "ones")
"""Activations of queries and keys that are not negative."""
OutputGate = Literal["swish", "sigmoid", "none"]
StateHeads = Literal["query", "key_value"]
StateDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer of the teacher, as saved in a student's configuration.

    `num_heads` query heads share `num_kv_heads` key and value heads; queries and keys have `head_dim` channels, values
    `value_dim`.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    initializer_range: float = 0.02
    rotary: str | None = "half"
    """Layout of the rotary embedding, one of `mixers.rotary.STYLES`; None: no rotary embedding, or an unknown one."""
    rotary_channels: int = 0
    """Channels of cos and sin of the rotary embedding; 0 also where the attention module calls no attention function of
    `transformers`, so that a window's first tokens keep their distance (`modeling.attention.sinks`)."""
    window: int | None = None
    """Tokens that a query sees, itself included; None: all tokens up to itself."""
    qk_norm: str | None = None
    """Norm of queries and keys before the rotary embedding: "rms-head" or "layer-head", over the channels of each head;
    "rms-all" or "layer-all", over all channels. None: no norm, or an unsupported one."""
    qk_norm_eps: float = 1e-6
    num_outputs: int = 2
    """Length of the tuple that the attention module returns; 0 if it returns a tensor."""


class Rule(NamedTuple):
    """What an option must be, besides its type; in its annotation."""

    expected: str
    valid: Callable[[Any], bool]


FRACTION = Rule("a number between 0 and 1", lambda x: 0 < x < 1)


@dataclass(frozen=True)
class MixerOptions:
    """Options of every mixer; subclasses add options and change defaults. Saved in the student's configuration."""

    source: ClassVar[str] = ""
    """One line: the mixer's paper and what distinguishes the mixer."""
    sums_keys: ClassVar[bool] = True
    """Whether the state is a (decayed) sum of k v^T, which a sum of k normalizes."""

    qk_activation: QKActivation = "silu"
    """Feature map of queries and keys: silu, elu1 (elu + 1), relu, hedgehog (learned, twice as wide), none, or with
    a window ones: a constant, so that the state is one row, a sum of values."""
    short_conv: Annotated[int, Rule("0 (no convolution) or a width of at least 2", lambda w: w == 0 or w >= 2)] = 0
    """Width of the causal depthwise convolution on q, k and v; 0: no convolution. Initialized to the identity."""
    rotary: bool = False
    """Keep the teacher's rotary embedding of queries and keys."""
    qk_norm: bool = False
    """Keep the teacher's norm of queries and keys, with its weights. Applied before the rotary embedding."""
    output_norm: bool = True
    """RMS norm of each head's output, with a weight per channel."""
    output_gate: OutputGate = "swish"
    """Gate on the output, computed from x: swish, sigmoid or none."""
    state_heads: StateHeads = "query"
    """One state, with its decay and write strength, for each query head (query), or for each key/value head of the
    teacher, read by all query heads of its group (key_value)."""
    expand_k: Annotated[float, Rule("a positive, finite number", lambda x: 0 < x < math.inf)] = 1.0
    """Width of the feature map relative to the head: other than 1, a learned map of queries and keys gives `expand_k`
    times as many channels, and so many rows to each state."""
    state_dtype: StateDtype = "float32"
    """Dtype of the states in the cache, between calls; the op computes in float32."""

    def __post_init__(self) -> None:
        # Of each option, the annotation in the class that introduces it: one that changes a default may say less.
        annotations: dict[str, Any] = {}
        for base in type(self).__mro__:
            annotations |= get_type_hints(base, include_extras=True)
        for field in fields(self):
            _check(field.name, getattr(self, field.name), annotations[field.name])

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


def _check(name: str, value: object, annotation: Any) -> None:
    kind, *rules = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if get_origin(kind) is Literal:
        if value not in (choices := get_args(kind)):
            raise UserError(f"{name}: got {value!r}{nearest(value, choices)}")
        return
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name}: got {value!r}, expected {TYPE_NAMES[kind]}")
    for rule in rules:
        if not rule.valid(value):
            raise UserError(f"{name}: got {value}, expected {rule.expected}")


@dataclass(frozen=True)
class DecayOptions(MixerOptions):
    """Options of mixers with a learned decay."""

    half_life: Annotated[float, Rule("a positive, finite number of tokens", lambda x: 0 < x < math.inf)] = 64.0
    """Initial half-life of the state in tokens."""
    longest_half_life: Annotated[float, Rule("0 or a finite number of tokens", lambda x: 0 <= x < math.inf)] = 0.0
    """Above 0: the states of a layer start with half-lives spaced geometrically from half_life to so many tokens."""


@dataclass(frozen=True)
class ExportOptions(DecayOptions):
    """Options that make a mixer equal to a layer of a published architecture (docs/serving.md). Off by default;
    `linearize(..., export_target=...)` sets them."""

    v_activation: Literal["silu", "none"] = "none"
    """Activation of values after their convolution: silu or none."""
    biases: bool = True
    """False: no biases in the q, k, v and o projections, nor in the gates."""
    norm_eps: Annotated[float, FRACTION] = 1e-8
    """Epsilon of the output norm."""


@dataclass(frozen=True)
class LinearAttentionOptions(MixerOptions):
    source: ClassVar[str] = "Linear attention (arXiv 2006.16236): a feature map replaces the softmax kernel."
    output_gate: OutputGate = "none"
    normalizer: bool = False
    """Divide by phi(q) . sum of phi(k), which requires a positive phi (elu1, relu, hedgehog). Without effect before an
    output norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalizer and self.qk_activation not in POSITIVE:
            raise UserError(
                f"normalizer: got true with qk_activation {self.qk_activation!r}, expected one of "
                f"{', '.join(POSITIVE)}: the normalizer must be positive"
            )


@dataclass(frozen=True)
class RetNetOptions(MixerOptions):
    source: ClassVar[str] = "RetNet's retention (arXiv 2307.08621): a fixed decay per head."
    rotary: bool = True


@dataclass(frozen=True)
class Mamba2Options(ExportOptions):
    source: ClassVar[str] = "Mamba-2 (arXiv 2405.21060) in MOHAWK's discrete form (arXiv 2408.10189): a decay per head."
    short_conv: int = 4
    discretization: Literal["unit", "zoh"] = "unit"
    """unit: MOHAWK's discrete form; zoh: Mamba-2's, with a step size."""


@dataclass(frozen=True)
class GLAOptions(DecayOptions):
    source: ClassVar[str] = "Gated linear attention (arXiv 2312.06635): a decay per channel from a low-rank projection."
    decay_rank: Annotated[int, Rule("at least 1", lambda rank: rank >= 1)] = 16
    """Rank of the decay's projection."""


@dataclass(frozen=True)
class MetaLAOptions(GLAOptions):
    source: ClassVar[str] = "MetaLA (arXiv 2411.10741): a decay per channel and no key projection, k = 1 - decay."
    half_life: float = 256.0
    """Longest initial half-life of a head's channels, in tokens; the shortest is one token."""


@dataclass(frozen=True)
class DeltaNetOptions(MixerOptions):
    source: ClassVar[str] = "DeltaNet (arXiv 2406.06484): the delta rule, without decay."
    sums_keys: ClassVar[bool] = False
    short_conv: int = 4
    output_gate: OutputGate = "none"
    beta_init: Annotated[float, FRACTION] = 0.05
    """Initial beta."""


@dataclass(frozen=True)
class GatedDeltaNetOptions(DeltaNetOptions, ExportOptions):
    source: ClassVar[str] = "Gated DeltaNet (arXiv 2412.06464): the delta rule with Mamba-2's decay per head."
    output_gate: OutputGate = "swish"
    half_life: float = 32.0
    beta_init: float = 0.1


@dataclass(frozen=True)
class XLSTMOptions(DecayOptions):
    source: ClassVar[str] = "xLSTM's mLSTM (arXiv 2405.04517): a decay per head, exponential input gate, normalizer."
    sums_keys: ClassVar[bool] = False
    output_gate: OutputGate = "sigmoid"
    input_gate_bias: Annotated[float, Rule("a finite number", math.isfinite)] = 0.0
    """Initial bias of the input gate, before exp. The larger, the rarer the normalizer is at its lower bound
    of 1."""


@dataclass(frozen=True)
class KDAOptions(DeltaNetOptions, ExportOptions):
    source: ClassVar[str] = "Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay per channel."
    output_gate: OutputGate = "sigmoid"
    half_life: float = 32.0
    beta_init: float = 0.1
    low_rank_gate: bool = False
    """The projection of the output gate has the rank of a head's size, as in Kimi Linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_rank_gate and self.output_gate != "sigmoid":
            raise UserError(f"low_rank_gate: got true with output_gate {self.output_gate!r}, expected 'sigmoid'")


@dataclass(frozen=True)
class HGRN2Options(DecayOptions):
    source: ClassVar[str] = "HGRN2 (arXiv 2404.07904): a decay per channel and no key projection, k = 1 - decay."
    output_gate: OutputGate = "none"
    half_life: float = 256.0
    """Longest initial half-life of a head's channels, in tokens; the shortest is one token."""
    lower_bound: Annotated[float, Rule("a number from 0 to below 0.5", lambda x: 0 <= x < 0.5)] = 0.0
    """Lower bound of a channel's decay factor."""


MEMORY_DEFAULTS: dict[str, Any] = {"short_conv": 0, "output_gate": "none"}
"""What a mixer beside attention to a window does not have."""
NOT_OF_A_MEMORY = (*MEMORY_DEFAULTS, "rotary", "qk_norm", "low_rank_gate", *ExportOptions.__annotations__)
"""Options that such a mixer does not take."""
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


def create_memory(name: str, spec: AttentionSpec, **options: Any) -> "Mixer":
    """As `create`, for a layer that keeps attention to a window: without projections."""
    return get(name)(spec, memory_only=True, **MEMORY_DEFAULTS, **options)


def memory_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of a mixer beside attention to a window, with their values."""
    found = asdict(find_options(name).from_dict({**MEMORY_DEFAULTS, **options}))
    return {option: value for option, value in found.items() if option not in NOT_OF_A_MEMORY}


def memory_mistakes(name: str, options: dict[str, Any]) -> dict[str, str]:
    """As `MixerOptions.mistakes`, of a mixer beside attention to a window."""
    mistakes = {
        option: f"{option}: a mixer with a window has none: it reads the queries, keys and values of attention"
        for option in NOT_OF_A_MEMORY
        if option in options
    }
    rest = {option: value for option, value in options.items() if option not in mistakes}
    return mistakes | find_options(name).mistakes(rest)
