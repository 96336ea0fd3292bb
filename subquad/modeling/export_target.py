"""What a student must be made of so that it can be exported to an architecture that other software runs.

All targets have Llama's layers and a mixer that Subquad has: Qwen3.5 the gated delta rule, Granite 4 Mamba-2, Kimi
Linear KDA. `subquad.export` converts the weights; docs/serving.md describes the targets. Imports no torch, so that
recipes are checked at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subquad.mixers import AttentionSpec
from subquad.mixers.options import ATTENTION, KEPT_ATTENTION
from subquad.registry import EXPORT_TARGETS
from subquad.utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subquad.modeling.attention.discovery import AttentionInfo

NORM_EPS = 1e-8
"""Epsilon of all norms of a student for export, if its configuration has `rms_norm_eps`: targets have one epsilon for
layer norms and mixer norms. Llama's 1e-5 exceeds the mean square of the first mixer's output (SmolLM2: 2.8 nats at
initialization); layer norms are insensitive to it (KL of the teacher's logits with 1e-8: 2e-7)."""
MIXER_OPTIONS = {
    "qk_activation": "silu",
    "expand_k": 1.0,
    "v_activation": "silu",
    "rotary": False,
    "qk_norm": False,
    "output_norm": True,
    "output_gate": "swish",
    "biases": False,
    "state_heads": "query",
    "state_dtype": "float32",
}
"""Mixer options that every target requires."""


@dataclass(frozen=True)
class ExportTarget:
    """An architecture that students can be exported to: which mixer and which attention its layers have.

    Its `subquad.export.converter.Converter` is in `subquad.registry.EXPORT_TARGETS`.
    """

    key: str
    """Value of `export_target`, and name of the format in `subquad export`."""
    title: str
    """Name in messages."""
    mixer: str | None
    """None: only attention."""
    mixer_options: dict[str, Any]
    """Required options of the mixer, except `norm_eps`; the short convolutions may have any width."""
    has_qk_norm: bool = False
    """Whether its attention has a norm of queries and keys."""
    has_windows: bool = False
    """Whether its attention can have a window."""
    other_attention: str | None = None
    """How its attention differs from any teacher's, if layers cannot keep the teacher's."""
    scales_queries: bool = True
    """Whether its mixer scales queries by 1 / sqrt(head_dim), as Subquad's does."""
    biases: tuple[str, ...] = ()
    """Projections of the mixer that may have a bias."""

    @property
    def supported_layers(self) -> str:
        """The end of an error message."""
        if self.mixer is None:
            return "supported layers: those that keep the teacher's attention, with or without a window"
        made = f"supported layers: {self.mixer} made by linearize(..., export_target='{self.key}')"
        return made if self.other_attention else f"{made}, and layers that keep the teacher's full attention"

    def mixer_norm_eps(self, eps: float, spec: AttentionSpec) -> float:
        """The epsilon of a student's mixer norm, if the target's norms have `eps`: without scaled queries the norm's
        input in the target is sqrt(head_dim) times as large."""
        return eps if self.scales_queries else eps / spec.head_dim


QWEN3_5 = ExportTarget("qwen3_5", "Qwen3.5", "gated_deltanet", MIXER_OPTIONS, has_qk_norm=True)
GRANITE_OPTIONS = {**MIXER_OPTIONS, "discretization": "zoh"}
GRANITE_HYBRID = ExportTarget(
    "granite_hybrid", "Granite 4", "mamba2", GRANITE_OPTIONS, scales_queries=False, biases=("a_proj",)
)
KIMI_OPTIONS = {**MIXER_OPTIONS, "output_gate": "sigmoid", "low_rank_gate": True}
MLA = "is not multi-head latent attention, which norms what keys and values are computed from"
KIMI_LINEAR = ExportTarget("kimi_linear", "Kimi Linear", "kda", KIMI_OPTIONS, other_attention=MLA)
MINISTRAL = ExportTarget("ministral", "Ministral", None, {}, has_windows=True)
TARGETS = {target.key: target for target in (QWEN3_5, GRANITE_HYBRID, KIMI_LINEAR, MINISTRAL)}


BESIDE_ATTENTION = "its mixer remembers what has left the window of attention"


class ExportError(UserError):
    """A model has a part that an export target does not have; `reason` names the first one."""

    def __init__(self, reason: str, target: ExportTarget | None = None, model: str = "this model"):
        where, expected = ("", "") if target is None else (f" to {target.title}", f"; {target.supported_layers}")
        super().__init__(f"{model} cannot be exported{where}: {reason}{expected}")
        self.reason = reason


def find_target(key: str) -> ExportTarget:
    """The target of that name; an unknown name is a UserError with the nearest one."""
    return TARGETS[key] if key in TARGETS else EXPORT_TARGETS.find(key).target


def check_mixers(names: Iterable[str], target: ExportTarget) -> None:
    """Raises UserError if one of `names` is neither the target's mixer nor an attention that it has."""
    for name in names:
        differs = f": it {target.other_attention}" if name == ATTENTION and target.other_attention else ""
        if differs or name not in (target.mixer, ATTENTION):
            raise UserError(f"{name} cannot be exported to {target.title}{differs}; {target.supported_layers}")


def restrict_to_target(
    base: "PreTrainedModel", layer_specs: list[dict[str, Any]], attention_layers: Sequence["AttentionInfo"], target: str
) -> list[dict[str, Any]]:
    """The layer specs with the options that `target` requires; sets the epsilon of all norms of `base`, a copy of the
    teacher, and `rms_norm_eps` in its configuration.

    Raises:
        UserError: unknown target, or a mixer or option that it does not have.
        ExportError: a teacher with a part that the target does not have.
    """
    from subquad.modeling.decoder_weights import read_decoder

    found = find_target(target)
    check_mixers((spec["mixer"] for spec in layer_specs), found)
    try:
        eps = read_decoder(base, [info.path for info in attention_layers]).eps
        if hasattr(base.config, "rms_norm_eps"):
            eps = min(eps, NORM_EPS)
        pairs = zip(layer_specs, attention_layers, strict=True)
        restricted = [restrict_layer(spec, f"layer {info.index}", info.spec, eps, found) for spec, info in pairs]
    except ExportError as error:
        raise ExportError(error.reason, found, "this teacher") from None
    if getattr(base.config, "rms_norm_eps", eps) != eps:
        base.config.rms_norm_eps = eps  # type: ignore[assignment]
        for module in base.modules():
            for name in ("variance_epsilon", "eps"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, eps)
    return restricted


def restrict_layer(
    layer_spec: dict[str, Any], name: str, spec: AttentionSpec, eps: float, target: ExportTarget
) -> dict[str, Any]:
    if has_memory(layer_spec):
        raise ExportError(f"{name}: {BESIDE_ATTENTION}")
    if layer_spec["mixer"] != target.mixer:
        if problem := unsupported_attention(layer_spec, spec, target):
            raise ExportError(f"{name}: {problem}")
        return {**layer_spec, "qk_norm": eps} if target.has_qk_norm and spec.qk_norm is None else layer_spec
    required = {**target.mixer_options, "norm_eps": target.mixer_norm_eps(eps, spec)}
    for option, value in required.items():
        if layer_spec.get(option, value) != value:
            raise UserError(
                f"{name}: {option}: got {layer_spec[option]!r}, expected {value!r}, which export to {target.title} "
                "requires; leave out the option or export_target"
            )
    return {**layer_spec, **required}


def has_memory(layer_spec: dict[str, Any]) -> bool:
    """Whether a layer has a mixer beside attention to a window."""
    return layer_spec["mixer"] not in KEPT_ATTENTION and "window" in layer_spec


def unsupported_attention(layer_spec: dict[str, Any], spec: AttentionSpec, target: ExportTarget) -> str | None:
    """What the target's attention does not have, of an attention with these specs; None if it has all."""
    has_qk_norm = spec.qk_norm is not None or layer_spec.get("qk_norm") is not None
    problems = {
        str(target.other_attention): target.other_attention is not None,
        "has a sliding window": (layer_spec.get("window") or spec.window) is not None and not target.has_windows,
        f"sees the first {layer_spec.get('sinks')} tokens (sinks) beside its window": bool(layer_spec.get("sinks")),
        "has a memory of what has left the window": any(layer_spec.get(name) for name in ("memory", "merge")),
        "has projections with biases": spec.qkv_bias or spec.output_bias,
        "has a norm of queries and keys": has_qk_norm and not target.has_qk_norm,
        f"has a norm of queries and keys {spec.qk_norm!r}, expected 'rms-head'": spec.qk_norm not in (None, "rms-head"),
        f"has a rotary embedding {spec.rotary!r}, expected 'half'": spec.rotary != "half",
        f"has values of {spec.value_dim} channels per head and keys of {spec.head_dim}, expected the same": (
            spec.value_dim != spec.head_dim
        ),
    }
    return next((f"its attention {problem}" for problem, is_found in problems.items() if is_found), None)
