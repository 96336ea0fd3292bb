"""Finds the attention of every layer of a causal language model; no architecture is known by name.

One forward pass of random tokens is traced (`tracing.py`). It yields the queries, keys and values that reach attention
and the outputs of all linear projections of the layer's input. On the first token, where a rotary embedding does
nothing, each channel of q, k and v is matched by value to a channel of these outputs, directly or through a norm. This
works for separate and fused projections, any order of heads, biases, grouped-query heads, norms of queries and keys,
partial rotary embeddings and any head size. The output projection is the one whose input is the output of attention.
Where something has no match, a `UserError` says what.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from subquad.mixers import AttentionSpec
from subquad.mixers.rotary import STYLES, apply_rotary
from subquad.modeling.attention.norms import QKNorm, fit_norm
from subquad.modeling.attention.tracing import (
    TRACE_BATCH,
    TRACE_LENGTH,
    AttentionCall,
    is_shape_mismatch,
    same_values,
    trace_attention,
)
from subquad.utils import UserError, eval_mode

TOLERANCE = 2e-2
"""Largest distance between equal channels, relative to their root mean square. Rounding in bfloat16 stays below it;
different channels, on `TRACE_BATCH` independent sequences, are far above it."""


@dataclass(frozen=True)
class ProjectionSlice:
    """The origin of q, k or v: rows of one projection's weight in head order, followed by a norm or not."""

    projection: str
    """Name of the projection in the attention module."""
    rows: Tensor
    """`[heads * head_dim]`, row indices."""
    norm: str | None = None
    """Name of the norm in the attention module."""


@dataclass(frozen=True)
class AttentionInfo:
    """The attention of one layer: where it is, its shape, and where its projections are."""

    index: int
    path: str
    """Path of `module` in the model."""
    module: nn.Module
    spec: AttentionSpec
    slices: dict[str, ProjectionSlice]
    """Of "q", "k" and "v"."""
    output_projection: str
    """Name of the output projection in the attention module."""
    norms: dict[str, QKNorm] = field(default_factory=dict)
    """Of "q" and "k", if both have a norm that a mixer can keep; else empty."""

    def expanded_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """`projection_weights`, with each head of k and v repeated for all query heads of its group."""
        weight, bias = self.projection_weights(name)
        if name in ("k", "v"):
            weight = self._repeat_per_query_head(weight)
            bias = None if bias is None else self._repeat_per_query_head(bias)
        return weight, bias

    def projection_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight `[out, in]` and bias `[out]` of "q", "k", "v" or "o"."""
        if name == "o":
            return _weight_and_bias(self.module.get_submodule(self.output_projection))
        source = self.slices[name]
        weight, bias = _weight_and_bias(self.module.get_submodule(source.projection))
        return weight[source.rows], None if bias is None else bias[source.rows]

    def norm_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias `[num_heads, head_dim]` of the norm of "q" or "k"."""
        norm = self.norms[name]
        groups = self.spec.num_heads // len(norm.weight)
        bias = None if norm.bias is None else norm.bias.repeat_interleave(groups, 0)
        return norm.weight.repeat_interleave(groups, 0), bias

    def _repeat_per_query_head(self, rows: Tensor) -> Tensor:
        groups = self.spec.num_heads // self.spec.num_kv_heads
        return rows.unflatten(0, (self.spec.num_kv_heads, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    bias = None if module.bias is None else module.bias.detach()  # type: ignore[union-attr, operator]
    return (weight.T if isinstance(module, Conv1D) else weight), bias  # type: ignore[return-value]


def discover_attention(model: PreTrainedModel) -> list[AttentionInfo]:
    """The attention of every layer of `model`, in order.

    Raises:
        UserError: not a causal language model, or attention that cannot be read or replaced; with the reason.
    """
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} has no language modeling head; expected a causal language model")
    if getattr(model, "_is_stateful", False):
        raise UserError(f"{name} cannot be linearized: its layers are recurrent already")
    with eval_mode(model):
        calls = trace_attention(model, random_tokens(model))
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(calls))
    if not calls:
        raise UserError(
            f"{name} cannot be linearized: no attention found; expected layers that call transformers' attention "
            "interface or compute softmax(q k^T) v with torch functions"
        )
    if len(calls) != layers or len({id(call.module) for call in calls}) != layers:
        raise UserError(
            f"{name} cannot be linearized: got {len(calls)} attention calls in {layers} layers, expected one per layer"
        )
    check_no_kv_sharing(name, calls)
    paths = {id(module): path for path, module in model.named_modules()}
    return [read_attention(i, paths[id(call.module)], call, model.config) for i, call in enumerate(calls)]


def check_no_kv_sharing(name: str, calls: list[AttentionCall]) -> None:
    """Raises UserError if a layer attends to the keys of an earlier layer (Gemma 3n): it has no key and value
    projections to copy."""
    for index, call in enumerate(calls):
        shared = next((i for i in range(index) if same_values(calls[i].key, call.key)), None)
        if shared is not None:
            raise UserError(
                f"{name} cannot be linearized: layer {index} has no keys and values of its own; it uses those of layer "
                f"{shared}"
            )


def random_tokens(model: PreTrainedModel) -> Tensor:
    """Token ids `[TRACE_BATCH, TRACE_LENGTH]`, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment, union-attr]
    return torch.randint(vocabulary, (TRACE_BATCH, TRACE_LENGTH), generator=generator).to(model.device)


def read_attention(index: int, path: str, call: AttentionCall, config: Any) -> AttentionInfo:
    """The attention of one traced call; UserError if a mixer cannot replace it."""
    name = f"layer {index} ({type(call.module).__name__})"
    check_causal(call, name)
    slices = {}
    for part, values in (("q", call.query), ("k", call.key), ("v", call.value)):
        found = find_projection(call, values)
        if found is None:
            raise UserError(
                f"{name} cannot be linearized: its {part} is not made of channels of a projection of the layer's "
                f"input; it has {', '.join(n for n in call.submodule_io if '.' not in n)}"
            )
        slices[part] = found
    output = find_output_projection(call, name)
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    if kv_heads == heads:  # some models repeat keys and values before the attention function
        kv_heads = collapse_repeated_kv(slices, heads)
    projections = {part: call.module.get_submodule(found.projection) for part, found in slices.items()}
    norms = find_qk_norms(call, slices)
    spec = AttentionSpec(
        hidden_size=call.hidden_states.shape[-1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=call.query.shape[-1],
        value_dim=call.value.shape[-1],
        qkv_bias=any(_weight_and_bias(projection)[1] is not None for projection in projections.values()),
        output_bias=_weight_and_bias(call.module.get_submodule(output))[1] is not None,
        initializer_range=getattr(config, "initializer_range", None) or 0.02,
        rotary=find_rotary_style(call, slices["q"]),
        window=call.window,
        qk_norm=norms["q"].kind if norms else None,
        qk_norm_eps=norms["q"].eps if norms else 1e-6,
        num_outputs=len(call.module_output) if isinstance(call.module_output, tuple) else 0,
    )
    return AttentionInfo(index, path, call.module, spec, slices, output, norms)


def check_causal(call: AttentionCall, name: str) -> None:
    """Raises UserError unless attention is causal, unchunked, and computed from q, k and a mask alone."""
    if getattr(call.module, "is_causal", True) is False:
        raise UserError(f"{name} uses bidirectional attention; only causal attention is supported")
    if call.is_chunked:
        raise UserError(f"{name} cannot be linearized: it uses chunked attention; expected full or sliding attention")
    if adds_to_scores(call):
        raise UserError(
            f"{name} cannot be linearized: more than a mask is added to its scores (such as ALiBi or a gate)"
        )


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
    output = next((n for n in linear_submodules(call) if same_values(call.submodule_io[n][0], call.attn_output)), None)
    if output is None:
        raise UserError(
            f"{name} cannot be linearized: no projection takes the output of attention unchanged (there may be a gate "
            "or a norm before it)"
        )
    returned = call.module_output[0] if isinstance(call.module_output, tuple) else call.module_output
    if not isinstance(returned, Tensor) or not same_values(returned, call.submodule_io[output][1]):
        raise UserError(
            f"{name} cannot be linearized: it does not return the output of its projection {output} unchanged; a mixer "
            "would omit the rest (such as a residual connection)"
        )
    return output


def find_qk_norms(call: AttentionCall, slices: dict[str, ProjectionSlice]) -> dict[str, QKNorm]:
    """The norms of queries and keys; empty unless both have one, of the same kind."""
    found = {}
    for part, values in (("q", call.query), ("k", call.key)):
        name = slices[part].norm
        if name is not None:
            norm = fit_norm(call.module.get_submodule(name), *call.submodule_io[name], values.shape[1])
            if norm is not None:
                found[part] = norm
    return found if len(found) == 2 and found["q"].kind == found["k"].kind else {}


def collapse_repeated_kv(slices: dict[str, ProjectionSlice], heads: int) -> int:
    """The number of distinct key and value heads; removes the repetitions from `slices`."""
    rows = {part: slices[part].rows.view(heads, -1) for part in ("k", "v")}
    for kv_heads in (n for n in range(1, heads) if heads % n == 0):
        groups = heads // kv_heads
        distinct = {part: r[::groups] for part, r in rows.items()}
        if all(torch.equal(r.repeat_interleave(groups, 0), rows[part]) for part, r in distinct.items()):
            slices.update({part: replace(slices[part], rows=r.flatten()) for part, r in distinct.items()})
            return kv_heads
    return heads


def linear_submodules(call: AttentionCall) -> list[str]:
    return [name for name in call.submodule_io if isinstance(call.module.get_submodule(name), nn.Linear | Conv1D)]


def find_projection(call: AttentionCall, values: Tensor) -> ProjectionSlice | None:
    """Finds the channels of `values: [B, H, T, D]` in the output of a projection of the layer's input, on the first
    token: directly, or in the output of a norm whose input is found there. None if they are in no projection."""
    x = call.hidden_states
    linear = linear_submodules(call)
    projected = {
        name: first_token_channels(output)
        for name, (module_input, output) in call.submodule_io.items()
        if name in linear and same_values(module_input, x) and has_token_axis(output)
    }
    # Some models scale queries before the attention function; some rotary embeddings for long context scale q and k.
    factors = [1.0, values.shape[-1] ** -0.5]
    if call.position_embeddings is not None:
        factors.append(float(call.position_embeddings[0].flatten()[0]))

    def match_projections(wanted: Tensor) -> ProjectionSlice | None:
        for name, channels in projected.items():
            rows = match_channels(wanted, channels, factors)
            if rows is not None:
                return ProjectionSlice(name, rows)
        return None

    wanted = first_token_channels(values.transpose(1, 2))
    direct = match_projections(wanted)
    if direct is not None:
        return direct
    for name, (module_input, output) in call.submodule_io.items():
        if name in linear or module_input.shape != output.shape or not has_token_axis(output):
            continue
        rows = match_channels(wanted, first_token_channels(output), factors)
        before_norm = None if rows is None else match_projections(first_token_channels(module_input)[rows])
        if before_norm is not None:
            return replace(before_norm, norm=name)
    return None


def has_token_axis(x: Tensor) -> bool:
    """Whether `x` is `[B, T, ...]` or `[B, H, T, D]`; experts, for example, flatten the tokens of a batch."""
    return x.dim() > 2 and len(x) == TRACE_BATCH and TRACE_LENGTH in x.shape[1 : x.dim() - 1]


def first_token_channels(x: Tensor) -> Tensor:
    """The first token of `[B, T, ...]` or `[B, H, T, D]`, as `[channels, B]` in head order, in float64."""
    if x.dim() == 4 and x.shape[1] != TRACE_LENGTH and x.shape[2] == TRACE_LENGTH:
        x = x.transpose(1, 2)
    return x[:, 0].reshape(x.shape[0], -1).T.double()


def match_channels(wanted: Tensor, channels: Tensor, factors: list[float]) -> Tensor | None:
    """The indices of the rows of `channels: [m, B]` that equal the rows of `wanted: [n, B]` up to one of `factors`;
    None if a row has no match."""
    rms = wanted.square().mean().sqrt().clamp_min(1e-30)
    for factor in factors:
        first = torch.cdist(wanted[:8], channels * factor).amin(dim=1)
        if bool((first > TOLERANCE * rms).any()):  # most candidates are excluded by a few channels
            continue
        nearest = [torch.cdist(part, channels * factor).min(dim=1) for part in wanted.split(1024)]
        if not all(bool((n.values < TOLERANCE * rms).all()) for n in nearest):
            continue
        rows = torch.cat([n.indices for n in nearest])
        # Clipped channels (OLMo) can be equal on a few tokens. Contiguous rows are preferred if they match as well.
        order = torch.arange(len(rows), device=rows.device)
        contiguous = order + (rows - order).mode().values
        if bool((contiguous >= 0).all()) and bool((contiguous < len(channels)).all()):
            errors = (wanted - channels[contiguous] * factor).square().sum(-1).sqrt()
            if bool((errors < TOLERANCE * rms).all()):
                return contiguous
        return rows
    return None


def find_rotary_style(call: AttentionCall, query: ProjectionSlice) -> str | None:
    """The rotary embedding of the queries, one of `subquad.mixers.rotary.STYLES`; None if there is none, or another."""
    if call.position_embeddings is None:
        return None
    projected = call.submodule_io[query.norm or query.projection][1]
    if projected.dim() == 4 and projected.shape[1] != TRACE_LENGTH:
        projected = projected.transpose(1, 2)
    flat = projected.flatten(2)
    unrotated = (flat if query.norm else flat[..., query.rows]).unflatten(-1, (call.query.shape[1], -1))
    rotated = call.query.transpose(1, 2)
    rms = rotated.float().square().mean().sqrt()
    for style in STYLES:
        try:
            candidate = apply_rotary(unrotated, *call.position_embeddings, style)
        except RuntimeError as error:
            if not is_shape_mismatch(error):
                raise
            continue
        if (candidate.float() - rotated.float()).square().mean().sqrt() < TOLERANCE * rms:
            return style
    return None
