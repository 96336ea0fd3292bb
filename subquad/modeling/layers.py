"""What stands in a decoder layer where attention stood: a mixer, or the attention that is kept.

Both take whatever the family hands to its attention, and give what that gives. `attention_mask` is always ours (see
`hub.py`): a 4D tensor `[B, 1, 1, S]` over the S tokens seen so far (or the last of them), or `[B, 1, 1, 0]` where all
tokens are real and of one document; bool for padding only, integer where rows hold several documents (0 is padding).
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from subquad.mixers import HeadLayout, Mixer
from subquad.modeling.cache import CACHE_ARGUMENT, StateLayer, SubquadCache, WindowLayer
from subquad.modeling.watch import attention_implementation


class Block(nn.Module):
    """The common part: who stands here, and how to read what a family hands over."""

    def __init__(self, layout: HeadLayout, index: int):
        super().__init__()
        self.layout, self.index = layout, index

    def cache_of(self, args: tuple, kwargs: dict[str, Any]) -> SubquadCache | None:
        """The cache, by its type: families do not agree on its name."""
        return next((value for value in (*args, *kwargs.values()) if isinstance(value, SubquadCache)), None)


class MixerLayer(Block):
    """A mixer in the place of attention, its state in the model's cache."""

    def __init__(self, mixer: Mixer, index: int):
        super().__init__(mixer.layout, index)
        self.mixer = mixer

    def new_cache_layer(self) -> StateLayer:
        return StateLayer()

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        T = x.shape[1]
        documents = None
        if attention_mask is not None and attention_mask.shape[-1]:
            documents = attention_mask[:, 0, 0, -T:]
        cache = self.cache_of(args, kwargs)
        layer = None if cache is None else cache.layers[self.index]
        if layer is not None and not isinstance(layer, StateLayer):
            raise TypeError(
                f"{CACHE_ARGUMENT} holds {type(layer).__name__} for layer {self.index}, which is a recurrent mixer; "
                "pass student.new_cache() or None"
            )
        state = None if layer is None else layer.states
        y, after = self.mixer(x, kwargs.get("position_embeddings"), documents, state)
        if layer is not None:
            layer.set(after, T)
        return (y, *[None] * (self.layout.returns - 1)) if self.layout.returns else y

    def matrix(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mixer's mixing matrix, `[B, H, T, T]`, on what `forward` takes."""
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return self.mixer.matrix(x, kwargs.get("position_embeddings"))

    @property
    def matrix_scale_is_free(self) -> bool:
        return self.mixer.options.output_norm

    def matrix_parameters(self) -> list[nn.Parameter]:
        """Parameters on which the mixing matrix depends."""
        return [p for name, p in self.mixer.named_parameters() if name.split(".")[0] not in self.mixer.BEHIND_MATRIX]

    def copied_parameters(self) -> list[nn.Parameter]:
        """Parameters that a teacher's attention has too."""
        return [p for projection in self.mixer.projections().values() for p in projection.parameters()]


class AttentionLayer(Block):
    """The family's own attention, kept: it gets the mask that it expects, built here from ours.

    window: tokens that a query sees, itself included, where that is fewer than the teacher's; sinks: first tokens of
        each document that it sees besides (arXiv 2309.17453).
    """

    matrix_scale_is_free = False

    def __init__(self, attention: nn.Module, layout: HeadLayout, index: int, window: int | None = None, sinks: int = 0):
        super().__init__(layout, index)
        self.attention = attention
        windows = [w for w in (window, layout.window) if w is not None]
        self.window, self.sinks = min(windows, default=None), sinks

    def new_cache_layer(self) -> StateLayer | DynamicLayer:
        return DynamicLayer() if self.window is None else WindowLayer(self.window, self.sinks)

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        T = x.shape[1]
        cache = self.cache_of(args, kwargs)
        layer: Any = None if cache is None else cache.layers[self.index]
        before = 0 if layer is None else layer.get_seq_length()
        if attention_mask is not None and not attention_mask.shape[-1]:
            attention_mask = None
        documents, places = describe_columns(attention_mask, len(x), before + T, x.device)
        keys = documents, places
        if isinstance(layer, WindowLayer):
            layer.places, kept = places[:, before:], layer.kept_places()
            if kept is not None:
                documents = torch.cat((kept >= 0, documents[:, before:]), dim=1)
                keys = documents, torch.cat((kept, places[:, before:]), dim=1)
        mask = None
        # The teacher's implementation is causal without a mask; only the eager one is not.
        eager = getattr(getattr(self.attention, "config", None), "_attn_implementation", "eager") == "eager"
        all_seen = attention_mask is None and before + T <= (self.window or before + T)
        if not (all_seen and (T == 1 or (before == 0 and not eager))):
            queries = keys[0][:, -T:], keys[1][:, -T:]
            mask = added_mask(queries, keys, self.window, self.sinks, x.dtype)
        return self.attention(*args, attention_mask=mask, **kwargs)

    def matrix(self, *args: Any, **kwargs: Any) -> Tensor:
        """The attention probabilities, `[B, H, T, T]`, on what `forward` takes."""
        return attention_matrix(self.attention, self.window, self.sinks, args, kwargs)

    def matrix_parameters(self) -> list[nn.Parameter]:
        """All of them: where one projection makes q, k and v, they cannot be told apart. v and the output have no
        gradient from the probabilities where they can."""
        return list(self.attention.parameters())

    def copied_parameters(self) -> list[nn.Parameter]:
        """All of them: they are the teacher's own."""
        return list(self.attention.parameters())


def attention_matrix(
    attention: nn.Module, window: int | None, sinks: int, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """The attention probabilities of one layer, `[B, H, T, T]`, by the module's own eager path; differentiable.

    args, kwargs: what the family handed to it, for rows that are one document each, without a cache.
    """
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    columns = describe_columns(None, len(x), x.shape[1], x.device)
    mask = added_mask(columns, columns, window, sinks, x.dtype)
    with attention_implementation(attention, "eager"):
        return attention(*args, **{**kwargs, "attention_mask": mask})[1]


Columns = tuple[Tensor, Tensor]
"""Of each token, `[B, S]`: the number of its document, 0 at padding; its place in the document, -1 at padding."""


def describe_columns(mask: Tensor | None, B: int, S: int, device: torch.device) -> Columns:
    """From our mask `[B, 1, 1, S]`; None is one document without padding."""
    if mask is None:
        return torch.ones(B, S, dtype=torch.long, device=device), torch.arange(S, device=device).expand(B, S)
    documents = mask[:, 0, 0].long()
    count = (documents != 0).cumsum(1)
    starts = documents != torch.nn.functional.pad(documents, (1, 0), value=-1)[:, :-1]
    # padding does not end a document, and what stands before its first token is not in it
    number = documents.cummax(1).values
    starts = starts & (documents != 0) & (number != torch.nn.functional.pad(number, (1, 0), value=0)[:, :-1])
    first = torch.where(starts, count - 1, 0).cummax(1).values
    return documents, (count - 1 - first).masked_fill(documents == 0, -1)


def added_mask(queries: Columns, keys: Columns, window: int | None, sinks: int, dtype: torch.dtype) -> Tensor:
    """`[B, 1, T, S]`, added to the scores: 0 where a query may see a key, else the lowest number."""
    (q_document, q_place), (k_document, k_place) = queries, keys
    distance = q_place.unsqueeze(-1) - k_place.unsqueeze(-2)
    allowed = (q_document.unsqueeze(-1) == k_document.unsqueeze(-2)) & (k_document != 0).unsqueeze(-2)
    allowed &= distance >= 0
    if window is not None:
        allowed &= (distance < window) | (k_place < sinks).unsqueeze(-2)
    # a query at padding sees itself, so that its softmax has something to sum
    T, S = allowed.shape[-2:]
    own = torch.arange(S, device=allowed.device) == torch.arange(S - T, S, device=allowed.device).unsqueeze(-1)
    allowed = (allowed | (own & (q_document == 0).unsqueeze(-1))).unsqueeze(1)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
