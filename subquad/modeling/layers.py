"""What stands in a decoder layer where attention stood: a mixer, or the attention that is kept.

Both take whatever the family hands to its attention, and give what that gives. `attention_mask` is always ours (see
`hub.py`): a 4D tensor `[B, 1, 1, S]` over the S tokens seen so far (or the last of them), or `[B, 1, 1, 0]` where all
tokens are real and of one document; bool for padding only, integer where rows hold several documents (0 is padding).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from subquad.mixers import AttentionSpec, Mixer
from subquad.mixers.norms import head_norm
from subquad.modeling.attention.scores import attention_probabilities, hidden_states_of
from subquad.modeling.cache import CACHE_ARGUMENT, RecurrentCacheLayer, SlidingWindowCacheLayer, SubquadCache
from subquad.modeling.masks import additive_mask, doc_ids_and_positions
from subquad.utils import UserError


class TokenMixerLayer(nn.Module):
    """The common part: who stands here, and how to read what a family hands over."""

    def __init__(self, spec: AttentionSpec, index: int):
        super().__init__()
        self.spec, self.index = spec, index

    def matrix_rows(self, *args: Any, **kwargs: Any) -> Callable[[slice], Tensor]:
        raise NotImplementedError

    def matrix(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mixing matrix, `[B, H, T, T]`, on what `forward` takes, for rows of one document each."""
        return self.matrix_rows(*args, **kwargs)(slice(None))

    def cache_of(self, args: tuple, kwargs: dict[str, Any]) -> SubquadCache | None:
        """The cache, by its type: families do not agree on its name."""
        return next((value for value in (*args, *kwargs.values()) if isinstance(value, SubquadCache)), None)


class MixerLayer(TokenMixerLayer):
    """A mixer in the place of attention, its state in the model's cache."""

    def __init__(self, mixer: Mixer, index: int):
        super().__init__(mixer.spec, index)
        self.mixer = mixer

    def new_cache_layer(self) -> RecurrentCacheLayer:
        return RecurrentCacheLayer()

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        x = hidden_states_of(args, kwargs)
        T = x.shape[1]
        documents = None
        if attention_mask is not None and attention_mask.shape[-1]:
            documents = attention_mask[:, 0, 0, -T:]
            if T == 1 and bool(documents.all()):  # the padding of a batch that is decoded lies behind it
                documents = None
        cache = self.cache_of(args, kwargs)
        layer = None if cache is None else cache.layers[self.index]
        if layer is not None and not isinstance(layer, RecurrentCacheLayer):
            raise TypeError(
                f"{CACHE_ARGUMENT} holds {type(layer).__name__} for layer {self.index}, which is a recurrent mixer; "
                "pass student.new_cache() or None"
            )
        state = None if layer is None else layer.states
        y, after = self.mixer(x, kwargs.get("position_embeddings"), documents, state)
        if layer is not None:
            layer.set(after, T)
        return (y, *[None] * (self.spec.num_outputs - 1)) if self.spec.num_outputs else y

    def matrix_rows(self, *args: Any, **kwargs: Any) -> Callable[[slice], Tensor]:
        """Gives rows of the mixer's mixing matrix, `[B, H, rows, T]`, on what `forward` takes; what all rows have in
        common is computed once, here."""
        x = hidden_states_of(args, kwargs)
        core, _ = self.mixer.op_inputs(x, kwargs.get("position_embeddings"), None, None)
        return lambda rows: self.mixer.mixing_matrix(core, rows)

    @property
    def scale_invariant(self) -> bool:
        return self.mixer.options.output_norm

    def matrix_parameters(self) -> list[nn.Parameter]:
        """Parameters on which the mixing matrix depends."""
        return [
            p for name, p in self.mixer.named_parameters() if name.split(".")[0] not in self.mixer.VALUE_PATH_PARAMS
        ]

    def projection_parameters(self) -> list[nn.Parameter]:
        """Parameters that a teacher's attention has too."""
        return [p for projection in self.mixer.projections().values() for p in projection.parameters()]


class NormedProjection(nn.Module):
    """A projection of queries or keys and, behind it, an RMS norm over each head that a teacher without one is given:
    its weight `[K]` is shared by the heads, as in Qwen3."""

    def __init__(self, projection: nn.Linear, head_dim: int, eps: float):
        super().__init__()
        self.projection, self.norm = projection, HeadNorm(head_dim, eps).to(projection.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.projection(x).unflatten(-1, (-1, len(self.norm.weight)))).flatten(-2)


class HeadNorm(nn.Module):
    """RMS norm over the last axis, of which each entry is a head's channel."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(head_dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight, self.eps)


class AttentionLayer(TokenMixerLayer):
    """The family's own attention, kept: it gets the mask that it expects, built here from ours.

    window: tokens that a query sees, itself included, where that is fewer than the teacher's; sinks: first tokens of
        each document that it sees besides (arXiv 2309.17453); qk_norm: epsilon of a norm of queries and keys that the
        family does not have.
    """

    scale_invariant = False

    def __init__(
        self,
        attention: nn.Module,
        layout: AttentionSpec,
        index: int,
        window: int | None = None,
        sinks: int = 0,
        qk_norm: float | None = None,
    ):
        super().__init__(layout, index)
        self.attention = attention
        windows = [w for w in (window, layout.window) if w is not None]
        self.window, self.sinks = min(windows, default=None), sinks
        if qk_norm is not None:
            self.add_norms(qk_norm)

    def add_norms(self, eps: float) -> None:
        projections = {name: getattr(self.attention, name, None) for name in ("q_proj", "k_proj")}
        if self.spec.qk_norm is not None or not all(isinstance(p, nn.Linear) for p in projections.values()):
            raise UserError(
                f"qk_norm: {type(self.attention).__name__} of layer {self.index} has such a norm, or no q_proj and "
                "k_proj of its own that could be given one; leave qk_norm out"
            )
        for name, projection in projections.items():
            setattr(self.attention, name, NormedProjection(projection, self.spec.head_dim, eps))  # type: ignore[arg-type]

    def added_norms(self) -> dict[str, nn.Parameter]:
        """Weights `[K]` of the norms of "q" and "k" that the family does not have."""
        found = {name: getattr(self.attention, f"{name}_proj", None) for name in ("q", "k")}
        return {name: p.norm.weight for name, p in found.items() if isinstance(p, NormedProjection)}

    def new_cache_layer(self) -> RecurrentCacheLayer | DynamicLayer:
        return DynamicLayer() if self.window is None else SlidingWindowCacheLayer(self.window, self.sinks)

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        x = hidden_states_of(args, kwargs)
        T = x.shape[1]
        cache = self.cache_of(args, kwargs)
        layer: Any = None if cache is None else cache.layers[self.index]
        before = 0 if layer is None else layer.get_seq_length()
        if attention_mask is not None and not attention_mask.shape[-1]:
            attention_mask = None
        documents, places = doc_ids_and_positions(attention_mask, len(x), before + T, x.device)
        keys = documents, places
        if isinstance(layer, SlidingWindowCacheLayer):
            layer.positions, kept = places[:, before:], layer.kept_positions()
            if kept is not None:
                documents = torch.cat((kept >= 0, documents[:, before:]), dim=1)
                keys = documents, torch.cat((kept, places[:, before:]), dim=1)
        mask = None
        # The teacher's implementation is causal without a mask; only the eager one is not.
        eager = getattr(getattr(self.attention, "config", None), "_attn_implementation", "eager") == "eager"
        all_seen = attention_mask is None and before + T <= (self.window or before + T)
        if not (all_seen and (T == 1 or (before == 0 and not eager))):
            queries = keys[0][:, -T:], keys[1][:, -T:]
            mask = additive_mask(queries, keys, self.window, self.sinks, x.dtype)
        return self.attention(*args, attention_mask=mask, **kwargs)

    def matrix_rows(self, *args: Any, **kwargs: Any) -> Callable[[slice], Tensor]:
        """Gives rows of the attention probabilities, `[B, H, rows, T]`, on what `forward` takes."""
        return lambda rows: attention_probabilities(self.attention, self.window, self.sinks, args, kwargs, rows)

    def matrix_parameters(self) -> list[nn.Parameter]:
        """All of them: where one projection makes q, k and v, they cannot be told apart. v and the output have no
        gradient from the probabilities where they can."""
        return list(self.attention.parameters())

    def projection_parameters(self) -> list[nn.Parameter]:
        """All but a norm that was added: they are the teacher's own."""
        added = {id(p) for p in self.added_norms().values()}
        return [p for p in self.attention.parameters() if id(p) not in added]
