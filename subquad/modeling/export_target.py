"""What a student may be made of so that it can leave as a model that others run; `subquad.export` takes it there.

Two targets are built of Llama's layers and have a mixer of ours: Qwen3.5 the gated delta rule, and attention with a
norm of queries and keys; Bamba Mamba-2, and Llama's own attention. What they compute is in docs/serving.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from subquad.mixers import ATTENTION, AttentionSpec
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.decoder_weights import read_decoder
from subquad.utils import UserError, nearest

NORM_EPS = 1e-8
"""Of all norms of a student that is to leave, where its configuration has a word for it: its hosts have one epsilon for
all. The 1e-5 of a Llama, harmless to the norms of its layers, would swallow what comes out of a first layer's mixer
(SmolLM2: 2.8 nats at the start); they in turn do not feel 1e-8 (KL 2e-7 from the teacher's own logits)."""
MIXER_OPTIONS = {
    "qk_activation": "silu",
    "v_activation": "silu",
    "rotary": False,
    "qk_norm": False,
    "output_norm": True,
    "output_gate": "swish",
    "biases": False,
}
"""Options of a mixer with which it is a layer of a target."""


@dataclass(frozen=True)
class ExportTarget:
    """A model that others run, in what decides whether a student can become one."""

    title: str
    key: str
    """How `export` and `--format` call it."""
    mixer: str
    mixer_options: dict[str, Any]
    """Of the mixer; `norm_eps` is the model's, and the convolution may have any width."""
    has_qk_norm: bool
    """Whether its attention has a norm of queries and keys."""
    biased_projections: tuple[str, ...] = ()
    """Projections of the mixer that may have a bias."""

    @property
    def supported_layers(self) -> str:
        return (
            f"supported layers: {self.mixer} made by linearize(..., export_target='{self.key}'), and layers that keep "
            "the teacher's full attention"
        )

    def norm_eps(self, eps: float, layout: AttentionSpec) -> float:
        """The mixer's, where the model's is `eps`. Bamba does not scale queries by 1 / sqrt(K), so that its norm is
        given numbers sqrt(K) as large."""
        return eps / layout.head_dim if self.mixer == "mamba2" else eps


TARGETS = {
    target.key: target
    for target in (
        ExportTarget("Qwen3.5", "qwen3_5", "gated_deltanet", MIXER_OPTIONS, has_qk_norm=True),
        ExportTarget("Bamba", "bamba", "mamba2", {**MIXER_OPTIONS, "discretization": "zoh"}, False, ("a_proj",)),
    )
}


def restrict_to_target(
    layer_specs: list[dict[str, Any]], attention_layers: Sequence[AttentionInfo], teacher: PreTrainedModel, target: str
) -> tuple[list[dict[str, Any]], float]:
    """The plan with every entry in the form that `target` computes, and the epsilon for all norms of the student (see
    `set_epsilon`).

    Raises:
        UserError: an unknown target; a teacher, a mixer or an option that cannot go there, with the reason.
    """
    host = find_target(target)
    check_mixers((entry["mixer"] for entry in layer_specs), host)
    eps = read_decoder(teacher, [site.path for site in attention_layers]).eps
    if hasattr(teacher.config, "rms_norm_eps"):
        eps = min(eps, NORM_EPS)
    restricted = [
        restrict_mixer(entry, f"layer {site.index}", site.spec, eps, host)
        if entry["mixer"] == host.mixer
        else restrict_attention(entry, site.spec, f"layer {site.index}", eps, host)
        for entry, site in zip(layer_specs, attention_layers, strict=True)
    ]
    return restricted, eps


def find_target(key: str) -> ExportTarget:
    """UserError where there is none."""
    if key not in TARGETS:
        raise UserError(f"export: unknown {key!r}{nearest(key, TARGETS)}")
    return TARGETS[key]


def set_norm_eps(base: PreTrainedModel, eps: float) -> None:
    """Gives every norm of `base` the epsilon `eps`, and writes it into its configuration."""
    if getattr(base.config, "rms_norm_eps", eps) == eps:
        return
    base.config.rms_norm_eps = eps  # type: ignore[assignment]
    for module in base.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, eps)


def check_mixers(names: Iterable[str], target: ExportTarget) -> None:
    """UserError where a plan names a mixer that the target does not have."""
    for name in names:
        if name not in (target.mixer, ATTENTION):
            raise UserError(f"{name} cannot be exported to {target.title}; {target.supported_layers}")


def restrict_mixer(
    entry: dict[str, Any], where: str, layout: AttentionSpec, eps: float, target: ExportTarget
) -> dict[str, Any]:
    wanted = {**target.mixer_options, "norm_eps": target.norm_eps(eps, layout)}
    for name, value in wanted.items():
        if entry.get(name, value) != value:
            raise UserError(
                f"{where}: {name}: got {entry[name]!r}, but a layer of {target.title} has {value!r}; leave it out, or "
                "leave out export"
            )
    return {**entry, **wanted}


def restrict_attention(
    entry: dict[str, Any], layout: AttentionSpec, where: str, eps: float, target: ExportTarget
) -> dict[str, Any]:
    wrong = unsupported_attention(entry, layout, target)
    if wrong is not None:
        raise UserError(
            f"{where}: its attention cannot be exported to {target.title}: {wrong}; {target.supported_layers}"
        )
    return entry if not target.has_qk_norm or layout.qk_norm is not None else {**entry, "qk_norm": eps}


def unsupported_attention(entry: dict[str, Any], layout: AttentionSpec, target: ExportTarget) -> str | None:
    """Why the target has no attention like this, as far as a plan and a layout tell; None where it has."""
    if entry.get("window") is not None or layout.window is not None:
        return "it sees a window of the last tokens only"
    if layout.qkv_bias or layout.output_bias:
        return "its projections have biases"
    if not target.has_qk_norm and (layout.qk_norm is not None or entry.get("qk_norm") is not None):
        return "it has a norm of queries and keys"
    if layout.qk_norm not in (None, "rms-head"):
        return f"its norm of queries and keys is {layout.qk_norm}, not one over each head"
    if layout.rotary != "half":
        return "it turns queries and keys by position in another way, or not at all"
    if layout.value_dim != layout.head_dim:
        return f"its values have {layout.value_dim} channels a head, its keys {layout.head_dim}"
    return None
