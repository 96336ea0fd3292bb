"""Local attention by its definition, slowly: the teacher's own attention modules on the tokens that a query sees."""

import copy
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from subquad.modeling.attention.activations import hidden_states_of
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.attention.scores import replace_mask
from tests.helpers.teachers import layer_activations


def windows_of_heads(windows, layer: int, num_kv_heads: int) -> list:
    """The windows of a layer's key/value heads: layers have `windows` in turn, those of a tuple are its heads' in
    turn."""
    own = windows[layer % len(windows)]
    return [own[head % len(own)] for head in range(num_kv_heads)] if isinstance(own, tuple) else [own] * num_kv_heads


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class WindowedAttention(nn.Module):
    """The attention module of a layer, with a window for each key/value head.

    With a known rotary embedding, the module runs on short sequences: up to position `last = window + sinks - 1`, on
    the document; for each later query, on its sinks and its window, as the positions 0 to `last`. Without, it runs on
    the whole sequence, under a mask: sinks have their true distance.

    documents: `[B, T]`, 0 at padding; None: one a row. rotary: cos and sin at the positions from 0 on, `[1, n, R]`.
    constant_distance: False for true distances everywhere.
    """

    documents: Tensor | None = None

    def __init__(self, info: AttentionInfo, windows: list, sinks: int, rotary, constant_distance: bool):
        super().__init__()
        self.attention, self.spec, self.output_projection = info.module, info.spec, info.output_projection
        self.windows, self.sinks, self.rotary = windows, sinks, rotary
        self.limit = info.spec.window or 2**30
        self.constant_distance = constant_distance and info.spec.rotary_channels > 0

    def forward(self, *args, **kwargs):
        x = hidden_states_of(args, kwargs)
        B, T, _ = x.shape
        documents = torch.ones(B, T) if self.documents is None else self.documents
        repeats = self.spec.num_heads // self.spec.num_kv_heads
        if not self.constant_distance:
            seen = torch.stack([self.seen(documents, window) for window in self.windows], 1)
            mask = additive(seen.repeat_interleave(repeats, 1), x.dtype)
            args, kwargs = replace_mask(self.attention, args, kwargs, mask)
            return self.attention(*args, **kwargs)
        heads = x.new_zeros(B, T, self.spec.num_heads, self.spec.value_dim)
        windows = [window for window in self.windows for _ in range(repeats)]
        for row in range(B):
            for document in set(documents[row].tolist()) - {0}:
                tokens = (documents[row] == document).nonzero()
                for window in set(windows):
                    own = torch.tensor([head for head, w in enumerate(windows) if w == window])
                    heads[row, tokens, own] = self.heads(x[row, tokens.squeeze(1)], window, args, kwargs)[:, own]
        y = self.attention.get_submodule(self.output_projection)(heads.flatten(2))
        return (y, *[None] * (self.spec.num_outputs - 1)) if self.spec.num_outputs else y

    def seen(self, documents: Tensor, window) -> Tensor:
        """`[B, T, T]`, with true distances: whether a query sees a key; padding sees itself."""
        window = 2**30 if window == "full" else window
        before = torch.ones(documents.shape[1:] * 2).tril().bool()
        same = documents[:, :, None] == documents[:, None]
        positions = (same & before).sum(-1) - 1
        distance = positions[:, :, None] - positions[:, None]
        near = (distance < window) | (positions < self.sinks)[:, None]
        real = (documents > 0)[:, :, None]
        return (same & before & near & (distance < self.limit) & real) | torch.eye(documents.shape[1]).bool()

    def heads(self, x: Tensor, window, args, kwargs) -> Tensor:
        """Heads `[n, H, V]` of one document `x: [n, hidden]`."""
        n = len(x)
        window = min(n if window == "full" else window, self.limit)
        L = min(n, window + self.sinks)
        positions, causal = torch.arange(L), torch.ones(L, L).tril().bool()
        early = causal & (positions[:, None] - positions < self.limit)
        out = self.full_attention(x[None, :L], early[None], args, kwargs)[0]
        if n == L:
            return out
        late = torch.arange(L, n)[:, None]
        tokens = torch.cat((positions[: self.sinks].expand(n - L, -1), late - window + 1 + torch.arange(window)), 1)
        mask = causal & (late - tokens < self.limit)[:, None]
        return torch.cat((out, self.full_attention(x[tokens], mask, args, kwargs)[:, -1]))

    def full_attention(self, x: Tensor, seen: Tensor, args, kwargs) -> Tensor:
        """Heads `[n, L, H, V]` of the teacher's module on sequences `x: [n, L, hidden]` at the positions from 0 on."""
        args, kwargs = replace_mask(self.attention, args, kwargs, additive(seen[:, None], x.dtype))
        kwargs = {**kwargs, "position_embeddings": tuple(r[:, : x.shape[1]] for r in self.rotary)}
        if "position_ids" in kwargs:
            kwargs["position_ids"] = torch.arange(x.shape[1])[None]
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = x
        else:
            args = (x, *args[1:])
        with without_projection(self.attention, self.output_projection):
            result = self.attention(*args, **kwargs)
        heads = result[0] if isinstance(result, tuple) else result
        return heads.unflatten(-1, (self.spec.num_heads, self.spec.value_dim))


@contextmanager
def without_projection(module: nn.Module, name: str):
    projection = module.get_submodule(name)
    module.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        module.set_submodule(name, projection)


def windowed_teacher(teacher, *windows, sinks: int = 0, length: int = 64, constant_distance: bool = True):
    """A copy of `teacher` whose layers have `windows` in turn (`windows_of_heads`); for documents up to `length`."""
    model = copy.deepcopy(teacher)
    attention_layers = discover_attention(model)
    recorded = layer_activations(model, attention_layers, torch.full((1, length), 3))
    for info, activations in zip(attention_layers, recorded, strict=True):
        own = windows_of_heads(windows, info.index, info.spec.num_kv_heads)
        rotary = activations.position_embeddings
        model.set_submodule(info.path, WindowedAttention(info, own, sinks, rotary, constant_distance))
    return model


def windowed_logits(model, ids: Tensor, documents: Tensor | None = None) -> Tensor:
    """The logits of `ids: [B, T]` of a `windowed_teacher`. documents: `[B, T]`, 0 at padding; None: one a row."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    if documents is not None:
        same = documents[:, :, None] == documents[:, None]
        positions = (same.tril().sum(-1) - 1).masked_fill(documents == 0, 0)
    for module in model.modules():
        if isinstance(module, WindowedAttention):
            module.documents = documents
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits
