"""Finds the attention of every layer of a causal language model; no architecture is known by name.

One forward pass of random tokens is traced (`tracing.py`). It yields the queries, keys and values that reach attention
and the outputs of all linear projections of the layer's input. On the first token, where a rotary embedding does
nothing, each channel of q, k and v is matched by value to a channel of these outputs, directly or through a norm. This
works for separate and fused projections, any order of heads, biases, grouped-query heads, norms of queries and keys,
partial rotary embeddings and any head size. The output projection is the one whose input is the output of attention.
Where something has no match, a `UserError` says what.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from subquad.mixers import AttentionSpec
from subquad.mixers.norms import qk_norm
from subquad.mixers.rotary import STYLES, apply_rotary
from subquad.modeling.attention.activations import ModuleAndProjection
from subquad.modeling.attention.local import calls_interface
from subquad.modeling.attention.tracing import (
    TRACE_BATCH,
    TRACE_LENGTH,
    AttentionCall,
    cannot_linearize,
    is_shape_mismatch,
    random_tokens,
    same_values,
    trace_attention,
)
from subquad.utils import UserError, eval_mode

TOLERANCE = 2e-2
"""Largest distance between equal channels, relative to their root mean square. Rounding in bfloat16 stays below it;
different channels, on `TRACE_BATCH` independent sequences, are far above it."""
NORM_KINDS = ("rms-head", "rms-all", "layer-head", "layer-all")
"""RMS or layer norm, over each head or over all heads (see `subquad.mixers.norms.qk_norm`)."""


class QKNorm(NamedTuple):
    """A norm of queries or keys: one of `NORM_KINDS`, its epsilon, its weight and bias `[query heads, head_dim]`; an
    RMS norm has no bias."""

    kind: str
    eps: float
    weight: Tensor
    bias: Tensor | None


class ProjectionSlice(NamedTuple):
    """The origin of q, k or v: rows `[heads * head_dim]` of the weight of the submodule `projection` in head order,
    followed by the submodule `norm` or not."""

    projection: str
    rows: Tensor
    norm: str | None = None


@dataclass(frozen=True)
class AttentionInfo:
    """The attention of one layer: where it is, its shape, and where its projections are.

    path: of `module` in the model. slices: of "q", "k" and "v". output_projection: name of this submodule.
    norms: of "q" and "k", if both have a norm that a mixer can keep; else empty.
    """

    index: int
    path: str
    module: nn.Module
    spec: AttentionSpec
    slices: dict[str, ProjectionSlice]
    output_projection: str
    norms: dict[str, QKNorm] = field(default_factory=dict)

    def projection_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight `[out, in]` and bias `[out]` of "q", "k", "v" or "o"."""
        if name == "o":
            return _weight_and_bias(self.module.get_submodule(self.output_projection))
        source = self.slices[name]
        weight, bias = _weight_and_bias(self.module.get_submodule(source.projection))
        return weight[source.rows], None if bias is None else bias[source.rows]

    def values(self, x: Tensor) -> Tensor:
        """The values `[B, T, num_kv_heads, value_dim]` for inputs of the attention, `[B, T, hidden]`."""
        v = nn.functional.linear(x, *self.projection_weights("v")).unflatten(-1, (self.spec.num_kv_heads, -1))
        norm = self.slices["v"].norm
        return v if norm is None else self.module.get_submodule(norm)(v)

    def expanded_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """`projection_weights`, with each head of k and v repeated for all query heads of its group."""
        weight, bias = self.projection_weights(name)
        heads = self.spec.num_kv_heads if name in ("k", "v") else self.spec.num_heads
        groups = self.spec.num_heads // heads

        def expand(rows: Tensor) -> Tensor:
            return rows if groups == 1 else rows.unflatten(0, (heads, -1)).repeat_interleave(groups, 0).flatten(0, 1)

        return expand(weight), None if bias is None else expand(bias)


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    bias = None if module.bias is None else module.bias.detach()  # type: ignore[union-attr, operator]
    return (weight.T if isinstance(module, Conv1D) else weight), bias  # type: ignore[return-value]


def attention_modules(attention_layers: Sequence[AttentionInfo]) -> list[ModuleAndProjection]:
    """The attention modules with their output projections, as `capture_activations` takes them."""
    return [(info.module, info.module.get_submodule(info.output_projection)) for info in attention_layers]


def discover_attention(model: PreTrainedModel) -> list[AttentionInfo]:
    """The attention of every layer of `model`, in order.

    Raises:
        UserError: not a causal language model, or attention that cannot be read or replaced; with the reason.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} has no language modeling head; expected a causal language model")
    if getattr(model, "_is_stateful", False) or model.config.model_type == "subquad":
        raise cannot_linearize(name, "its layers are recurrent already")
    with eval_mode(model):
        calls = trace_attention(model, random_tokens(model))
    if not calls:
        expected = "transformers' attention interface or compute softmax(q k^T) v with torch functions"
        raise cannot_linearize(name, f"no attention found; expected layers that call {expected}")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(calls))
    if len(calls) != layers or len({id(call.module) for call in calls}) != layers:
        raise cannot_linearize(name, f"got {len(calls)} attention calls in {layers} layers, expected one per layer")
    for index, call in enumerate(calls):  # in Gemma 3n, layers attend to the keys of an earlier layer
        shared = next((i for i in range(index) if same_values(calls[i].key, call.key)), None)
        if shared is not None:
            reason = f"layer {index} has no keys and values of its own; it uses those of layer {shared}"
            raise cannot_linearize(name, reason)
    paths = {module: path for path, module in model.named_modules()}
    return [read_attention(i, paths[call.module], call, model.config) for i, call in enumerate(calls)]


def read_attention(index: int, path: str, call: AttentionCall, config: Any) -> AttentionInfo:
    """The attention of one traced call; UserError if a mixer cannot replace it."""
    name = f"layer {index} ({type(call.module).__name__})"
    if getattr(call.module, "is_causal", True) is False:
        raise UserError(f"{name} uses bidirectional attention; only causal attention is supported")
    if call.is_chunked:
        raise cannot_linearize(name, "it uses chunked attention; expected full or sliding attention")
    if adds_to_scores(call):
        raise cannot_linearize(name, "more than a mask is added to its scores (such as ALiBi or a gate)")
    slices = {}
    for part, values in (("q", call.query), ("k", call.key), ("v", call.value)):
        if (found := find_projection(call, values)) is None:
            parts = ", ".join(n for n in call.submodules if "." not in n)
            reason = f"its {part} is not made of channels of a projection of the layer's input; it has {parts}"
            raise cannot_linearize(name, reason)
        slices[part] = found
    output = find_output_projection(call, name)
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    if kv_heads == heads:  # some models repeat keys and values before the attention function
        kv_heads = collapse_repeated_kv(slices, heads)
    has_bias = {n: _weight_and_bias(call.module.get_submodule(n))[1] is not None for n in linear_submodules(call)}
    norms = find_qk_norms(call, slices)
    spec = AttentionSpec(
        hidden_size=call.forward.hidden_states.shape[-1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=call.query.shape[-1],
        value_dim=call.value.shape[-1],
        qkv_bias=any(has_bias[found.projection] for found in slices.values()),
        output_bias=has_bias[output],
        initializer_range=getattr(config, "initializer_range", None) or 0.02,
        rotary=(rotary := find_rotary_style(call, slices["q"])),
        rotary_channels=find_rotary_channels(call) if rotary else 0,
        window=call.window,
        qk_norm=norms["q"].kind if norms else None,
        qk_norm_eps=norms["q"].eps if norms else 1e-6,
        num_outputs=len(call.forward.result) if isinstance(call.forward.result, tuple) else 0,
    )
    return AttentionInfo(index, path, call.module, spec, slices, output, norms)


def adds_to_scores(call: AttentionCall) -> bool:
    """Whether the scores are anything but (scaled) q k^T under a causal mask of the last `window` tokens."""
    distance = (torch.arange(TRACE_LENGTH).unsqueeze(-1) - torch.arange(TRACE_LENGTH)).to(call.query.device)
    visible = (distance >= 0) & (distance < (call.window or TRACE_LENGTH))
    if call.probabilities is not None:
        scores = (call.query @ call.key.transpose(-1, -2)).float().masked_fill(~visible, -torch.inf)
        plain = ((scores * scale).softmax(-1) for scale in (1.0, call.query.shape[-1] ** -0.5))
        return not any(torch.allclose(call.probabilities.float(), p, atol=TOLERANCE / TRACE_LENGTH) for p in plain)
    if call.mask is None:
        return False
    mask = call.mask[..., :TRACE_LENGTH]
    if mask.dtype == torch.bool:
        return not bool((mask == visible).all())
    return not (bool((mask[..., visible] == 0).all()) and bool((mask[..., ~visible] < -1e3).all()))


def find_output_projection(call: AttentionCall, name: str) -> str:
    """The linear submodule whose input is the output of attention; UserError if the module does not return its output
    unchanged."""
    inputs = {output: call.submodules[output].hidden_states for output in linear_submodules(call)}
    output = next((n for n, x in inputs.items() if same_values(x, call.attn_output)), None)
    if output is None:
        reason = "no projection takes the output of attention unchanged (there may be a gate or a norm before it)"
        raise cannot_linearize(name, reason)
    if not same_values(call.forward.output, call.submodules[output].output):
        reason = f"it does not return the output of its projection {output} unchanged"
        raise cannot_linearize(name, f"{reason}; a mixer would omit the rest (such as a residual connection)")
    return output


def find_qk_norms(call: AttentionCall, slices: dict[str, ProjectionSlice]) -> dict[str, QKNorm]:
    """The norms of queries and keys; empty unless both have one, of the same kind."""
    found = {}
    for part, values in (("q", call.query), ("k", call.key)):
        name = slices[part].norm
        if name is not None:
            x, y = (split_heads(t, values.shape[1]) for t in call.submodules[name].tensors)
            norm = fit_norm(call.module.get_submodule(name), x, y)
            if norm is not None:
                groups = call.query.shape[1] // values.shape[1]
                bias = None if norm.bias is None else norm.bias.repeat_interleave(groups, 0)
                found[part] = norm._replace(weight=norm.weight.repeat_interleave(groups, 0), bias=bias)
    return found if len(found) == 2 and found["q"].kind == found["k"].kind else {}


def fit_norm(module: nn.Module, norm_input: Tensor, norm_output: Tensor) -> QKNorm | None:
    """The kind of a norm with this input and output, `[B, T, H, K]`, and its weights by least squares over the tokens;
    None if it is none of `NORM_KINDS`."""
    x, y = norm_input.double(), norm_output.double()
    if x.shape != y.shape:
        return None
    eps, tokens = norm_epsilon(module), (0, 1)
    best, least = None, math.inf
    for kind in NORM_KINDS:
        has_bias, n = kind.startswith("layer"), qk_norm(x, kind, eps)
        centered = n - n.mean(tokens) if has_bias else n
        weight = (centered * y).sum(tokens) / centered.square().sum(tokens)
        bias = y.mean(tokens) - weight * n.mean(tokens) if has_bias else None
        error = float((qk_norm(x, kind, eps, weight, bias) - y).square().mean() / y.square().mean())
        if error < 1e-2 * least:  # a kind with more parameters must fit much better
            best, least = QKNorm(kind, eps, weight, bias), error
    return best if least < 1e-4 else None


def norm_epsilon(norm: nn.Module) -> float:
    """The epsilon of a norm of `transformers` or torch; 1e-6 if it has no such attribute."""
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    return 1e-6 if eps is None else float(eps)


def collapse_repeated_kv(slices: dict[str, ProjectionSlice], heads: int) -> int:
    """The number of distinct key and value heads; removes the repetitions from `slices`."""
    rows = {part: slices[part].rows.view(heads, -1) for part in ("k", "v")}
    for kv_heads in (n for n in range(1, heads) if heads % n == 0):
        groups = heads // kv_heads
        distinct = {part: r[::groups] for part, r in rows.items()}
        if all(torch.equal(r.repeat_interleave(groups, 0), rows[part]) for part, r in distinct.items()):
            slices.update({part: slices[part]._replace(rows=r.flatten()) for part, r in distinct.items()})
            return kv_heads
    return heads


def linear_submodules(call: AttentionCall) -> list[str]:
    return [name for name in call.submodules if isinstance(call.module.get_submodule(name), nn.Linear | Conv1D)]


def find_projection(call: AttentionCall, values: Tensor) -> ProjectionSlice | None:
    """Finds the channels of `values: [B, H, T, D]` in the output of a projection of the layer's input, on the first
    token: directly, or in the output of a norm whose input is found there. None if they are in no projection."""
    submodules = {name: found.tensors for name, found in call.submodules.items() if has_token_axis(found.output)}
    linear = linear_submodules(call)
    projected = {
        name: first_token_channels(output)
        for name, (x, output) in submodules.items()
        if name in linear and same_values(x, call.forward.hidden_states)
    }
    # Some models scale queries before the attention function; some rotary embeddings for long context scale q and k.
    factors = [1.0, values.shape[-1] ** -0.5]
    if call.forward.position_embeddings is not None:
        factors.append(float(call.forward.position_embeddings[0].flatten()[0]))

    def match_projections(wanted: Tensor) -> ProjectionSlice | None:
        matches = ((name, match_channels(wanted, channels, factors)) for name, channels in projected.items())
        return next((ProjectionSlice(name, rows) for name, rows in matches if rows is not None), None)

    wanted = first_token_channels(values.transpose(1, 2))
    if direct := match_projections(wanted):
        return direct
    for name, (x, output) in submodules.items():
        if name in linear or x.shape != output.shape:
            continue
        rows = match_channels(wanted, first_token_channels(output), factors)
        before_norm = None if rows is None else match_projections(first_token_channels(x)[rows])
        if before_norm is not None:
            return before_norm._replace(norm=name)
    return None


def has_token_axis(x: Tensor) -> bool:
    """Whether `x` is `[B, T, ...]` or `[B, H, T, D]`; experts, for example, flatten the tokens of a batch."""
    return x.dim() > 2 and len(x) == TRACE_BATCH and TRACE_LENGTH in x.shape[1 : x.dim() - 1]


def tokens_first(x: Tensor) -> Tensor:
    """`[B, T, ...]`, given that or `[B, H, T, D]`."""
    return x.transpose(1, 2) if x.dim() == 4 and x.shape[1] != TRACE_LENGTH else x


def first_token_channels(x: Tensor) -> Tensor:
    """The first token of `[B, T, ...]` or `[B, H, T, D]`, as `[channels, B]` in head order, in float64."""
    return tokens_first(x)[:, 0].reshape(x.shape[0], -1).T.double()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`x` as `[B, T, H, K]`; given that, `[B, H, T, K]` or `[B, T, H * K]`."""
    return x.unflatten(-1, (heads, -1)) if x.dim() == 3 and x.shape[-1] % heads == 0 else tokens_first(x)


def match_channels(wanted: Tensor, channels: Tensor, factors: list[float]) -> Tensor | None:
    """The indices of the rows of `channels: [m, B]` that equal the rows of `wanted: [n, B]` up to one of `factors`;
    None if a row has no match."""
    limit = TOLERANCE * wanted.square().mean().sqrt().clamp_min(1e-30)
    for factor in factors:
        scaled = channels * factor
        if bool((torch.cdist(wanted[:8], scaled).amin(dim=1) > limit).any()):
            continue  # most candidates are excluded by a few channels
        nearest = [torch.cdist(part, scaled).min(dim=1) for part in wanted.split(1024)]
        if not all(bool((part.values < limit).all()) for part in nearest):
            continue
        rows = torch.cat([part.indices for part in nearest])
        # Clipped channels (OLMo) can be equal on a few tokens. Contiguous rows are preferred if they match as well.
        order = torch.arange(len(rows), device=rows.device)
        contiguous = order + (rows - order).mode().values
        if bool(((contiguous >= 0) & (contiguous < len(channels))).all()):
            errors = (wanted - scaled[contiguous]).square().sum(-1).sqrt()
            if bool((errors < limit).all()):
                return contiguous
        return rows
    return None


def find_rotary_channels(call: AttentionCall) -> int:
    """See `AttentionSpec.rotary_channels`."""
    found = call.forward.position_embeddings
    return found[0].shape[-1] if found is not None and calls_interface(call.module) else 0


def find_rotary_style(call: AttentionCall, query: ProjectionSlice) -> str | None:
    """The rotary embedding of the queries, one of `subquad.mixers.rotary.STYLES`; None if there is none, or another."""
    if call.forward.position_embeddings is None:
        return None
    flat = tokens_first(call.submodules[query.norm or query.projection].output).flatten(2)
    unrotated = (flat if query.norm else flat[..., query.rows]).unflatten(-1, (call.query.shape[1], -1))
    rotated = call.query.transpose(1, 2)
    rms = rotated.float().square().mean().sqrt()
    for style in STYLES:
        try:
            candidate = apply_rotary(unrotated, *call.forward.position_embeddings, style)
        except RuntimeError as error:
            if not is_shape_mismatch(error):
                raise
            continue
        if (candidate.float() - rotated.float()).square().mean().sqrt() < TOLERANCE * rms:
            return style
    return None
