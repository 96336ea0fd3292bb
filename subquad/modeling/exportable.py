"""What a student may be made of so that it can leave as a model that others run; `subquad.export` takes it there.

Qwen3.5 is the one target: its linear attention is the gated delta rule, its attention has a norm of queries and keys,
and its layers are those of Llama. What it computes is in docs/serving.md.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel

from subquad.errors import UserError, nearest
from subquad.mixers import HeadLayout
from subquad.modeling.body import read_body
from subquad.modeling.families import AttentionSite
from subquad.modeling.plan import ATTENTION

EPSILON = 1e-8
"""Of all norms of a student that is to leave, where its configuration has a word for it: Qwen3.5 has one epsilon for
all. The 1e-5 of a Llama, harmless to the norms of its layers, would swallow what comes out of a first layer's mixer
(SmolLM2: 2.8 nats at the start); they in turn do not feel 1e-8 (KL 2e-7 from the teacher's own logits)."""
TARGETS = ("qwen3_5",)
MIXER = "gated_deltanet"
QWEN3_5_MIXER = {
    "qk_activation": "silu",
    "v_activation": "silu",
    "rotary": False,
    "qk_norm": False,
    "output_norm": True,
    "output_gate": "swish",
    "biases": False,
}
"""Options of `gated_deltanet` with which it is a layer of Qwen3.5; `norm_eps` is the model's, and the convolution may
have any width."""
WHAT_CAN_GO = (
    "what can go: layers of gated_deltanet as linearize(..., export='qwen3_5') makes them, and layers that keep the "
    "teacher's whole attention"
)


def restrict(
    plan: list[dict[str, Any]], sites: Sequence[AttentionSite], teacher: PreTrainedModel, target: str
) -> tuple[list[dict[str, Any]], float]:
    """The plan with every entry in the form that `target` computes, and the epsilon for all norms of the student (see
    `set_epsilon`).

    Raises:
        UserError: an unknown target; a teacher, a mixer or an option that cannot go there, with the reason.
    """
    if target not in TARGETS:
        raise UserError(f"export: unknown {target!r}{nearest(target, TARGETS)}")
    check_mixers(entry["mixer"] for entry in plan)
    eps = read_body(teacher, [site.path for site in sites]).eps
    if hasattr(teacher.config, "rms_norm_eps"):
        eps = min(eps, EPSILON)
    restricted = [
        restrict_mixer(entry, f"layer {site.index}", eps)
        if entry["mixer"] == MIXER
        else restrict_attention(entry, site.layout, f"layer {site.index}", eps)
        for entry, site in zip(plan, sites, strict=True)
    ]
    return restricted, eps


def set_epsilon(base: PreTrainedModel, eps: float) -> None:
    """Gives every norm of `base` the epsilon `eps`, and writes it into its configuration."""
    if getattr(base.config, "rms_norm_eps", eps) == eps:
        return
    base.config.rms_norm_eps = eps  # type: ignore[assignment]
    for module in base.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, eps)


def check_mixers(names: Iterable[str]) -> None:
    """UserError where a plan names a mixer that Qwen3.5 does not have."""
    for name in names:
        if name not in (MIXER, ATTENTION):
            raise UserError(f"{name} cannot be exported to Qwen3.5; {WHAT_CAN_GO}")


def restrict_mixer(entry: dict[str, Any], where: str, eps: float) -> dict[str, Any]:
    wanted = {**QWEN3_5_MIXER, "norm_eps": eps}
    for name, value in wanted.items():
        if entry.get(name, value) != value:
            raise UserError(
                f"{where}: {name}: got {entry[name]!r}, but a layer of Qwen3.5 has {value!r}; leave it out, or leave "
                "out export"
            )
    return {**entry, **wanted}


def restrict_attention(entry: dict[str, Any], layout: HeadLayout, where: str, eps: float) -> dict[str, Any]:
    wrong = attention_misfit(entry, layout)
    if wrong is not None:
        raise UserError(f"{where}: its attention cannot be exported to Qwen3.5: {wrong}; {WHAT_CAN_GO}")
    return entry if layout.qk_norm is not None else {**entry, "qk_norm": eps}


def attention_misfit(entry: dict[str, Any], layout: HeadLayout) -> str | None:
    """Why Qwen3.5 has no attention like this, as far as a plan and a layout tell; None where it has."""
    if entry.get("window") is not None or layout.window is not None:
        return "it sees a window of the last tokens only"
    if layout.qkv_bias or layout.output_bias:
        return "its projections have biases"
    if layout.qk_norm not in (None, "rms-head"):
        return f"its norm of queries and keys is {layout.qk_norm}, not one over each head"
    if layout.rotary != "half":
        return "it turns queries and keys by position in another way, or not at all"
    if layout.value_dim != layout.head_dim:
        return f"its values have {layout.value_dim} channels a head, its keys {layout.head_dim}"
    return None
