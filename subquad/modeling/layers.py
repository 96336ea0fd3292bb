"""What replaces the attention module of a decoder layer: `MixerLayer`, or `AttentionLayer`, which keeps the attention.

Both take the arguments that the decoder layer passes to its attention and return what that returns. Their
`attention_mask` is always the student's own mask (see `subquad.modeling.masks`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from subquad.mixers import AttentionSpec, Mixer
from subquad.mixers.norms import head_norm
from subquad.modeling.attention.activations import hidden_states_of
from subquad.modeling.attention.local import LocalCall, head_windows, joined_mask, run_local, uses_local_attention
from subquad.modeling.attention.scores import AttentionProbabilities
from subquad.modeling.attention.tracing import attention_implementation
from subquad.modeling.cache import (
    CACHE_ARGUMENT,
    HeadGroup,
    LocalCacheLayer,
    RecurrentCacheLayer,
    SubquadCache,
    head_groups,
)
from subquad.modeling.layer_types import Window
from subquad.modeling.masks import additive_mask, doc_ids_and_positions, new_documents
from subquad.modeling.rollback import LayerCall, mask_of, run_recorded, tokens_of
from subquad.utils import UserError


def find_cache_layer(args: tuple, kwargs: dict[str, Any], index: int) -> Any:
    """Layer `index` of the cache among the arguments, found by its type: its name differs between architectures."""
    caches = (value for value in (*args, *kwargs.values()) if isinstance(value, SubquadCache))
    return next((cache.layers[index] for cache in caches), None)


@dataclass
class MixerCall(LayerCall):
    """A pass of a mixer over new tokens `x: [B, T, hidden]`, with cos and sin `[1 or B, T, R]`."""

    mixer: Mixer
    cache_layer: RecurrentCacheLayer | None
    x: Tensor
    position_embeddings: tuple[Tensor, Tensor] | None
    mask: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.x.shape[1]

    def narrow(self, start: int, stop: int) -> "MixerCall":
        rotary: Any = self.position_embeddings
        rotary = None if rotary is None else tuple(tokens_of(t, start, stop) for t in rotary)
        mask = mask_of(self.mask, self.num_tokens, start, stop)
        return MixerCall(self.mixer, self.cache_layer, tokens_of(self.x, start, stop), rotary, mask)

    def __call__(self) -> Tensor:
        doc_ids = None if self.mask is None else new_documents(self.mask, self.x.shape[1])
        state = None if self.cache_layer is None else self.cache_layer.states
        y, new_state = self.mixer(self.x, self.position_embeddings, doc_ids, state)
        if self.cache_layer is not None:
            self.cache_layer.update_states(new_state, self.x.shape[1])
        return y


class MixerLayer(nn.Module):
    """A mixer whose state is in the model's cache; `spec` is the attention that it replaces, in layer `index`."""

    def __init__(self, mixer: Mixer, index: int):
        super().__init__()
        self.mixer, self.spec, self.index = mixer, mixer.spec, index

    def reset_parameters(self) -> None:
        self.mixer.reset_parameters()

    def new_cache_layer(self) -> RecurrentCacheLayer:
        return RecurrentCacheLayer()

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        x = hidden_states_of(args, kwargs)
        cache_layer = find_cache_layer(args, kwargs, self.index)
        if cache_layer is not None and not isinstance(cache_layer, RecurrentCacheLayer):
            raise TypeError(
                f"{CACHE_ARGUMENT}: got {type(cache_layer).__name__} for layer {self.index}, expected "
                "RecurrentCacheLayer; pass student.new_cache() or None"
            )
        call = MixerCall(self.mixer, cache_layer, x, kwargs.get("position_embeddings"), attention_mask)
        y = run_recorded(cache_layer, call)
        return (y, *[None] * (self.spec.num_outputs - 1)) if self.spec.num_outputs else y

    def matrix_rows(self, *args: Any, **kwargs: Any) -> Callable[[slice], Tensor]:
        """Returns a function that gives rows of the mixing matrix, `[B, H, rows, T]`, for the arguments of `forward`,
        where each row of the batch is one document. The inputs of the op are computed once, here."""
        x = hidden_states_of(args, kwargs)
        op_inputs, _ = self.mixer.op_inputs(x, kwargs.get("position_embeddings"), None, None)
        return lambda rows: self.mixer.mixing_matrix(op_inputs, rows)

    def gates(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The inputs of the op, for the arguments of `matrix_rows`: decays, beta and others by name."""
        x = hidden_states_of(args, kwargs)
        return self.mixer.op_inputs(x, kwargs.get("position_embeddings"), None, None)[0]

    @property
    def scale_invariant(self) -> bool:
        """Whether the layer's output does not depend on the scale of the mixing matrix."""
        return self.mixer.options.output_norm

    def matrix_parameters(self) -> list[nn.Parameter]:
        """Parameters on which the mixing matrix depends."""
        outside = self.mixer.VALUE_PATH_PARAMS
        return [p for name, p in self.mixer.named_parameters() if name.split(".")[0] not in outside]

    def projection_parameters(self) -> list[nn.Parameter]:
        """Parameters that a teacher's attention has too."""
        return [p for projection in self.mixer.projections().values() for p in projection.parameters()]


class NormedProjection(nn.Module):
    """A projection of queries or keys, followed by an RMS norm of each head."""

    def __init__(self, projection: nn.Linear, head_dim: int, eps: float):
        super().__init__()
        self.projection, self.norm = projection, QKHeadNorm(head_dim, eps).to(projection.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.projection(x).unflatten(-1, (-1, len(self.norm.weight)))).flatten(-2)


class QKHeadNorm(nn.Module):
    """RMS norm over the last axis, the channels of a head; its weight `[K]` is shared by the heads, as in Qwen3."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(head_dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight, self.eps)


class AttentionLayer(nn.Module):
    """The teacher's attention module, kept, with a window for some or all key/value heads or without.

    Args:
        attention: the module in layer `index`, which `spec` describes.
        window: tokens that a query sees, itself included: one number, or one for each key/value head; "full" or None:
            all tokens. Never more than the teacher's own window.
        sinks: first tokens of each document that heads with a window see in addition (arXiv 2309.17453).
        qk_norm: epsilon of an RMS norm of queries and keys, added to an attention that has none.

    Raises:
        UserError: another number of windows than of key/value heads, or a norm that cannot be added.
    """

    scale_invariant = False

    def __init__(
        self,
        attention: nn.Module,
        spec: AttentionSpec,
        index: int,
        window: Window | Sequence[Window] = None,
        sinks: int = 0,
        qk_norm: float | None = None,
    ):
        super().__init__()
        self.attention, self.spec, self.index, self.sinks = attention, spec, index, sinks
        self.config = getattr(attention, "config", None)  # before `use_local_attention` gives the module its own
        windows = [window] * spec.num_kv_heads if window is None or isinstance(window, int | str) else window
        if len(windows) != spec.num_kv_heads:
            expected = f"one number, or one for each of the {spec.num_kv_heads} key/value heads"
            raise UserError(f"window: got {len(windows)} numbers for layer {index}, expected {expected}")
        self.windows: tuple[int | None, ...] = tuple(w if isinstance(w, int) else None for w in windows)
        """One for each key/value head; None: all tokens, as far as the teacher's own window allows."""
        if qk_norm is None:
            return
        projections = {name: getattr(attention, name, None) for name in ("q_proj", "k_proj")}
        if spec.qk_norm is not None or not all(isinstance(p, nn.Linear) for p in projections.values()):
            raise UserError(
                f"qk_norm: {type(attention).__name__} of layer {index} has such a norm already, or no linear "
                "q_proj and k_proj to add one to; leave qk_norm out"
            )
        for name, projection in projections.items():
            setattr(attention, name, NormedProjection(projection, spec.head_dim, qk_norm))  # type: ignore[arg-type]

    @property
    def head_groups(self) -> tuple[HeadGroup, ...]:
        """The key/value heads by their windows, the teacher's own window included."""
        return head_groups(self.windows, self.sinks, self.spec.window)

    @property
    def is_local(self) -> bool:
        """Whether some heads have a window, be it the teacher's own."""
        return any(group.window is not None for group in self.head_groups)

    def added_qk_norms(self) -> dict[str, nn.Parameter]:
        """Weights `[K]` of the norms of "q" and "k" that were added."""
        projections = {name: getattr(self.attention, f"{name}_proj", None) for name in ("q", "k")}
        return {name: p.norm.weight for name, p in projections.items() if isinstance(p, NormedProjection)}

    def new_cache_layer(self) -> LocalCacheLayer | DynamicLayer:
        return LocalCacheLayer(self.head_groups) if self.is_local else DynamicLayer()

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        cache_layer = find_cache_layer(args, kwargs, self.index)
        if self.is_local:
            return self.forward_local(cache_layer, args, kwargs, attention_mask)
        x = hidden_states_of(args, kwargs)
        T = x.shape[1]
        past_tokens = 0 if cache_layer is None else cache_layer.get_seq_length()
        mask = None
        padded = attention_mask is not None and attention_mask.shape[-1]
        # Without a mask every implementation of the teacher is causal, except the eager one.
        if padded or (T > 1 and (past_tokens or self.implementation == "eager")):
            docs, positions = doc_ids_and_positions(attention_mask, len(x), past_tokens + T, x.device)
            queries = docs[:, past_tokens:], positions[:, past_tokens:]
            mask = additive_mask(queries, (docs, positions), None, 0, None, x.dtype)
        if mask is not None and "flash" in self.implementation:  # flash attention has no such masks
            with attention_implementation(self.attention, "sdpa"):
                return self.attention(*args, attention_mask=mask, **kwargs)
        return self.attention(*args, attention_mask=mask, **kwargs)

    @property
    def implementation(self) -> str:
        """The attention implementation that the teacher's configuration names."""
        return getattr(self.config, "_attn_implementation", None) or "eager"

    def forward_local(
        self, cache_layer: Any, args: tuple, kwargs: dict[str, Any], attention_mask: Tensor | None, far: Any = None
    ) -> Any:
        """The result of `forward` where some heads have a window. far: in place of what `far_call` returns."""
        if cache_layer is not None and not isinstance(cache_layer, LocalCacheLayer):
            raise TypeError(
                f"{CACHE_ARGUMENT}: got {type(cache_layer).__name__} for layer {self.index}, expected LocalCacheLayer; "
                "pass student.new_cache() or None"
            )
        call = self.local_call(args, kwargs, attention_mask, cache_layer)
        x = hidden_states_of(args, kwargs)
        call.far = self.far_call(x, attention_mask, cache_layer) if far is None else far
        if uses_local_attention(self.attention):
            return run_local(self.attention, call, args, kwargs)
        mask = joined_mask(call, x, self.spec.num_heads)
        return self.attention(*args, attention_mask=mask, **kwargs)

    def local_call(
        self, args: tuple, kwargs: dict[str, Any], attention_mask: Tensor | None, cache_layer: LocalCacheLayer | None
    ) -> LocalCall:
        """What `run_local` needs besides the attention module."""
        rotary, positions = None, kwargs.get("position_embeddings")
        if self.spec.rotary is not None and self.spec.rotary_channels and positions is not None:
            rotary = (self.spec.rotary, *positions)
        return LocalCall(self.head_groups, self.spec.window, self.implementation, attention_mask, cache_layer, rotary)

    def far_call(self, x: Tensor, attention_mask: Tensor | None, cache_layer: Any) -> Any:
        """What `LocalCall.far` gets."""
        return None

    def matrix_rows(self, *args: Any, **kwargs: Any) -> Callable[[slice], Tensor]:
        """As of a mixer: of the attention probabilities."""
        window = head_windows(self.head_groups, self.spec.num_heads) if self.is_local else None
        limit, rotary = self.spec.window, self.spec.rotary if self.spec.rotary_channels else None
        return AttentionProbabilities(self.attention, window, self.sinks, args, kwargs, limit, rotary)

    def matrix_parameters(self) -> list[nn.Parameter]:
        """All parameters: where q, k and v share a projection they cannot be separated. Where they are separate, those
        of v and the output get no gradient from the probabilities."""
        return list(self.attention.parameters())

    def projection_parameters(self) -> list[nn.Parameter]:
        """Parameters that the teacher has: all but those of added norms."""
        added = {id(p) for p in self.added_qk_norms().values()}
        return [p for p in self.attention.parameters() if id(p) not in added]
