"""Reads a decoder's attention by watching it work, and knows no model family by name.

`watch.py` sees queries, keys and values, and what goes into and out of the parts. The values themselves tell which
output channel of which projection is which channel of which head: whether q, k and v are three projections or one,
interleaved or not, with biases, norms, partial rotary or a head size of its own. What cannot be told so is refused with
what was missing.
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
from subquad.modeling.attention.tracing import TRACE_BATCH, TRACE_LENGTH, AttentionCall, same_values, trace_attention
from subquad.utils import UserError

TOLERANCE = 2e-2
"""Distance, over the size of the values, below which channels are the same: rounding in bfloat16 stays below it, and
another channel, on five independent rows, does not come near."""


@dataclass(frozen=True)
class ProjectionSlice:
    """Where the channels of q, k or v come from: rows of one projection, in head order, perhaps through a norm."""

    projection: str
    rows: Tensor
    norm: str | None = None


@dataclass(frozen=True)
class AttentionInfo:
    """One layer's attention: `module` stands at `path` in the model; `layout` is what a mixer must know of it."""

    index: int
    path: str
    module: nn.Module
    spec: AttentionSpec
    slices: dict[str, ProjectionSlice]
    output_projection: str
    """Name of the output projection inside the module."""
    norms: dict[str, QKNorm] = field(default_factory=dict)
    """Those of q and k, where a mixer can keep them."""

    def expanded_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight `[out, in]` and bias of "q", "k", "v" or "o"; k and v with a grouped head repeated for each of its
        query heads, in the order of the query heads."""
        weight, bias = self.projection_weights(name)
        if name in ("k", "v"):
            weight = self._repeat_per_query_head(weight)
            bias = None if bias is None else self._repeat_per_query_head(bias)
        return weight, bias

    def projection_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The same, a grouped head of k or v once."""
        if name == "o":
            return _weight_and_bias(self.module.get_submodule(self.output_projection))
        source = self.slices[name]
        weight, bias = _weight_and_bias(self.module.get_submodule(source.projection))
        return weight[source.rows], None if bias is None else bias[source.rows]

    def norm_weights(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias `[num_heads, head_dim]` of the norm of "q" or "k"."""
        _, _, weight, bias = self.norms[name]
        groups = self.spec.num_heads // len(weight)
        return weight.repeat_interleave(groups, 0), None if bias is None else bias.repeat_interleave(groups, 0)

    def _repeat_per_query_head(self, rows: Tensor) -> Tensor:
        groups = self.spec.num_heads // self.spec.num_kv_heads
        return rows.unflatten(0, (self.spec.num_kv_heads, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    bias = None if module.bias is None else module.bias.detach()  # type: ignore[union-attr, operator]
    return (weight.T if isinstance(module, Conv1D) else weight), bias  # type: ignore[return-value]


def discover_attention(model: PreTrainedModel) -> list[AttentionInfo]:
    """The attention of every layer, in order; UserError with what was missing where it cannot be read."""
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} has no head over the vocabulary; expected a causal language model")
    if getattr(model, "_is_stateful", False):
        raise UserError(f"{name} cannot be linearized: its layers keep recurrent states of their own already")
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        calls = trace_attention(model, random_tokens(model))
    finally:
        for module, mode in training:
            module.training = mode
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(calls))
    if not calls:
        raise UserError(
            f"{name} cannot be linearized: none of its layers hands queries, keys and values to transformers' "
            "attention interface, or writes softmax(q k^T) v out, where they are read"
        )
    if len(calls) != layers or len({id(call.module) for call in calls}) != layers:
        raise UserError(
            f"{name} cannot be linearized: {len(calls)} attentions in {layers} layers; expected one a layer, run once"
        )
    check_no_kv_sharing(name, calls)
    paths = {id(module): path for path, module in model.named_modules()}
    return [read_attention(i, paths[id(call.module)], call, model.config) for i, call in enumerate(calls)]


def check_no_kv_sharing(name: str, calls: list[AttentionCall]) -> None:
    """UserError where a layer attends to the keys and values of another (Gemma 3n): a mixer there has nothing to copy,
    and nothing of its own to read them from."""
    for index, call in enumerate(calls):
        lender = next((i for i in range(index) if same_values(calls[i].key, call.key)), None)
        if lender is not None:
            raise UserError(
                f"{name} cannot be linearized: layer {index} has no keys and values of its own, it attends to those of "
                f"layer {lender}"
            )


def random_tokens(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment, union-attr]
    return torch.randint(vocabulary, (TRACE_BATCH, TRACE_LENGTH), generator=generator).to(model.device)


def read_attention(index: int, path: str, call: AttentionCall, config: Any) -> AttentionInfo:
    where = f"layer {index} ({type(call.module).__name__})"
    if getattr(call.module, "is_causal", True) is False:
        raise UserError(f"{where} looks both ways; expected causal attention")
    if call.is_chunked:
        raise UserError(f"{where} cannot be linearized: it attends within chunks of the text, not to all before it")
    if adds_to_scores(call):
        raise UserError(
            f"{where} cannot be linearized: it adds more to its scores than a mask (a position bias such as ALiBi, or "
            "a gate), which would be lost"
        )
    sources = {}
    for name, values in (("q", call.query), ("k", call.key), ("v", call.value)):
        source = find_projection(call, values)
        if source is None:
            raise UserError(
                f"{where} cannot be linearized: its {name} is not made of channels of a projection of the layer's "
                f"input; its parts are {', '.join(n for n in call.submodule_io if '.' not in n)}"
            )
        sources[name] = source
    output = next((n for n in linear_submodules(call) if same_values(call.submodule_io[n][0], call.attn_output)), None)
    if output is None:
        raise UserError(
            f"{where} cannot be linearized: no projection takes what attention gives as it is; a gate or a norm stands "
            "between"
        )
    returned = call.module_output[0] if isinstance(call.module_output, tuple) else call.module_output
    if not isinstance(returned, Tensor) or not same_values(returned, call.submodule_io[output][1]):
        raise UserError(
            f"{where} cannot be linearized: what it returns is not what its output projection, {output}, gives; "
            "something is added to it or done with it inside, which a mixer in its place would leave out"
        )
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    if kv_heads == heads:  # some repeat them before attention does
        kv_heads = collapse_repeated_kv(sources, heads)
    projections = {name: call.module.get_submodule(source.projection) for name, source in sources.items()}
    norms = find_qk_norms(call, sources)
    layout = AttentionSpec(
        hidden_size=call.hidden_states.shape[-1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=call.query.shape[-1],
        value_dim=call.value.shape[-1],
        qkv_bias=any(_weight_and_bias(projection)[1] is not None for projection in projections.values()),
        output_bias=_weight_and_bias(call.module.get_submodule(output))[1] is not None,
        initializer_range=getattr(config, "initializer_range", None) or 0.02,
        rotary=find_rotary_style(call, sources["q"]),
        window=call.window,
        qk_norm=norms["q"][0] if norms else None,
        qk_norm_eps=norms["q"][1] if norms else 1e-6,
        num_outputs=len(call.module_output) if isinstance(call.module_output, tuple) else 0,
    )
    return AttentionInfo(index, path, call.module, layout, sources, output, norms)


def find_qk_norms(call: AttentionCall, sources: dict[str, ProjectionSlice]) -> dict[str, QKNorm]:
    """Those of queries and keys; empty unless both have one, of the same kind."""
    found = {}
    for name, values in (("q", call.query), ("k", call.key)):
        norm = sources[name].norm
        read = (
            None
            if norm is None
            else fit_norm(call.module.get_submodule(norm), *call.submodule_io[norm], values.shape[1])
        )
        if read is not None:
            found[name] = read
    return found if len(found) == 2 and found["q"][0] == found["k"][0] else {}


def collapse_repeated_kv(sources: dict[str, ProjectionSlice], heads: int) -> int:
    """Heads of keys and values without what is repeated for each head of a group, in `sources` too."""
    rows = {name: sources[name].rows.view(heads, -1) for name in ("k", "v")}
    for kv_heads in (n for n in range(1, heads) if heads % n == 0):
        one = {name: r[:: heads // kv_heads] for name, r in rows.items()}
        if all(torch.equal(r.repeat_interleave(heads // kv_heads, 0), rows[n]) for n, r in one.items()):
            sources.update({name: replace(sources[name], rows=r.flatten()) for name, r in one.items()})
            return kv_heads
    return heads


def adds_to_scores(call: AttentionCall) -> bool:
    """Whether scores are anything but (scaled) products of queries and keys, of the last `window` tokens."""
    distance = (torch.arange(TRACE_LENGTH).unsqueeze(-1) - torch.arange(TRACE_LENGTH)).to(call.query.device)
    seen = (distance >= 0) & (distance < (call.window or TRACE_LENGTH))
    if call.probabilities is not None:
        products = (call.query @ call.key.transpose(-1, -2)).float().masked_fill(~seen, -torch.inf)
        plain = ((products * factor).softmax(-1) for factor in (1.0, call.query.shape[-1] ** -0.5))
        return not any(torch.allclose(call.probabilities.float(), p, atol=TOLERANCE / TRACE_LENGTH) for p in plain)
    if call.mask is None:
        return False
    mask = call.mask[..., :TRACE_LENGTH]
    if mask.dtype == torch.bool:
        return not bool((mask == seen).all())
    return not (bool((mask[..., seen] == 0).all()) and bool((mask[..., ~seen] < -1e3).all()))


def linear_submodules(call: AttentionCall) -> list[str]:
    return [name for name in call.submodule_io if isinstance(call.module.get_submodule(name), nn.Linear | Conv1D)]


def find_projection(call: AttentionCall, values: Tensor) -> ProjectionSlice | None:
    """Finds each channel of `values`, `[B, H, T, D]`, among the outputs of projections of the layer's input, on the
    first token, where rotary turns nothing: directly, or as the output of a norm whose input is found there."""
    x = call.hidden_states
    names = linear_submodules(call)
    offered = {
        n: first_token_channels(call.submodule_io[n][1])
        for n in names
        if same_values(call.submodule_io[n][0], x) and has_token_axis(call.submodule_io[n][1])
    }
    # Some scale queries before attention does, and long-context rotary scales all.
    factors = [1.0, values.shape[-1] ** -0.5]
    if call.position_embeddings is not None:
        factors.append(float(call.position_embeddings[0].flatten()[0]))

    def among_projections(wanted: Tensor) -> ProjectionSlice | None:
        for name, channels in offered.items():
            rows = match_channels(wanted, channels, factors)
            if rows is not None:
                return ProjectionSlice(name, rows)
        return None

    wanted = first_token_channels(values.transpose(1, 2))
    direct = among_projections(wanted)
    if direct is not None:
        return direct
    for name, (taken, given) in call.submodule_io.items():
        if name in names or taken.shape != given.shape or not has_token_axis(given):
            continue
        rows = match_channels(wanted, first_token_channels(given), factors)
        behind = None if rows is None else among_projections(first_token_channels(taken)[rows])
        if behind is not None:
            return ProjectionSlice(behind.projection, behind.rows, norm=name)
    return None


def has_token_axis(x: Tensor) -> bool:
    """Whether `x` is `[B, T, ...]` or `[B, H, T, D]`: a part may see its tokens otherwise, as experts do."""
    return x.dim() > 2 and len(x) == TRACE_BATCH and TRACE_LENGTH in x.shape[1 : x.dim() - 1]


def first_token_channels(x: Tensor) -> Tensor:
    """Channels `[channels, ROWS]` of the first token of `[B, T, ...]`, or of `[B, H, T, D]` in the order of heads."""
    if x.dim() == 4 and x.shape[1] != TRACE_LENGTH and x.shape[2] == TRACE_LENGTH:
        x = x.transpose(1, 2)
    return x[:, 0].reshape(x.shape[0], -1).T.double()


def match_channels(wanted: Tensor, offered: Tensor, factors: list[float]) -> Tensor | None:
    """For each row of `wanted` the row of `offered` that is the same up to one of `factors`; None if any has none."""
    size = wanted.square().mean().sqrt().clamp_min(1e-30)
    for factor in factors:
        few = torch.cdist(wanted[:8], offered * factor).amin(dim=1)
        if bool((few > TOLERANCE * size).any()):  # most projections are others', told by their first channels
            continue
        near = [torch.cdist(part, offered * factor).min(dim=1) for part in wanted.split(1024)]
        if not all(bool((n.values < TOLERANCE * size).all()) for n in near):
            continue
        rows = torch.cat([n.indices for n in near])
        # Channels that are clipped (OLMo) are alike on a few tokens: those that stand together are theirs.
        order = torch.arange(len(rows), device=rows.device)
        block = order + (rows - order).mode().values
        if bool((block >= 0).all()) and bool((block < len(offered)).all()):
            errors = (wanted - offered[block] * factor).square().sum(-1).sqrt()
            if bool((errors < TOLERANCE * size).all()):
                return block
        return rows
    return None


def find_rotary_style(call: AttentionCall, source: ProjectionSlice) -> str | None:
    """How the queries were turned, one of `mixers.rotary.STYLES`; None where they were not, or in no known way."""
    if call.position_embeddings is None:
        return None
    part = call.submodule_io[source.norm][1] if source.norm else call.submodule_io[source.projection][1]
    if part.dim() == 4 and part.shape[1] != TRACE_LENGTH:
        part = part.transpose(1, 2)
    flat = part.flatten(2)
    plain = (flat if source.norm else flat[..., source.rows]).unflatten(-1, (call.query.shape[1], -1))
    turned = call.query.transpose(1, 2)
    size = turned.float().square().mean().sqrt()
    for style in STYLES:
        try:
            guess = apply_rotary(plain, *call.position_embeddings, style)
        except RuntimeError:
            continue
        if (guess.float() - turned.float()).square().mean().sqrt() < TOLERANCE * size:
            return style
    return None


# ---------------------------------------------------------------------- recording
