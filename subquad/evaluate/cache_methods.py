"""Other ways to shrink a teacher's cache: eviction of tokens (TOVA), and keys and values in 4 bits.

What such a cache holds when a token is read depends on the tokens before it. So attention reads a sequence in pieces,
in each layer after another, also where the caller asks for no cache: scores of a text are those of a decoder.
"""

import copy
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from subquad.evaluate.baselines import kept_attention
from subquad.mixers import ATTENTION
from subquad.modeling.attention.local import calls_interface, forward_globals
from subquad.modeling.cache import RecurrentCacheLayer
from subquad.modeling.layers import AttentionLayer, find_cache_layer
from subquad.modeling.masks import to_additive
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError, as_user_error, needs_extra

PIECEWISE = "subquad_piecewise"
"""Name of the attention implementation."""
BITS = 4
RESIDUAL_TOKENS = 128
"""Last tokens that a quantized cache holds unquantized, as by default in `transformers`."""


class PiecewiseCacheLayer(RecurrentCacheLayer):
    """A cache layer that is updated after every `piece_tokens` tokens."""

    piece_tokens = 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The arguments: the attention implementation calls `append` itself."""
        return key_states, value_states

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a piece `[B, G, n, D]`, and returns all keys and values that its tokens see, `[B, G, S, D]`."""
        raise NotImplementedError

    def evict(self, probabilities: Tensor) -> None:
        """Called with the attention probabilities of a piece, `[B, H, n, S]`."""


class TovaCacheLayer(PiecewiseCacheLayer):
    """Keys and values of at most `capacity` tokens. With one more, the token is dropped to which the last query, itself
    a candidate, pays the least attention on average over the heads (TOVA, arXiv 2401.06104, section 4)."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.states is not None:
            keys, values = torch.cat((self.states[0], keys), 2), torch.cat((self.states[1], values), 2)
        self.states = keys, values
        return keys, values

    def evict(self, probabilities: Tensor) -> None:
        B, _, _, S = probabilities.shape
        if self.capacity >= S:
            return
        dropped = probabilities[:, :, -1].float().mean(1).argmin(-1)  # [B]
        rows = torch.arange(B, device=dropped.device)

        def overwrite(x: Tensor) -> Tensor:  # the new token takes the place; `append` made `x`
            x[rows, :, dropped] = x[:, :, -1]
            return x[:, :, :-1]

        self._map_states(overwrite)


class QuantizedCacheLayer(PiecewiseCacheLayer):
    """The quantized cache of `transformers` (after KIVI, arXiv 2402.02750; integers by quanto, one scale and zero point
    for 64 numbers), with the last tokens unquantized."""

    piece_tokens = RESIDUAL_TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = quantized_layer_type()(nbits=BITS, residual_length=RESIDUAL_TOKENS)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.inner.update(keys, values)
        own = [self.inner._quantized_keys, self.inner._quantized_values, self.inner.keys, self.inner.values]
        self.states = tuple(part for tensor in own for part in plain_tensors(tensor))
        return found

    def _map_states(self, function: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError("a quantized cache cannot be reordered")

    def __deepcopy__(self, memo: dict) -> "QuantizedCacheLayer":
        other = copy.copy(self)  # the inner layer replaces its tensors, and never writes into them
        other.inner = copy.copy(self.inner)
        return other

    def batch_repeat_interleave(self, repeats: int) -> None:
        inner = self.inner
        for name, axis in (("_quantized_keys", inner.axis_key), ("_quantized_values", inner.axis_value)):
            whole = inner._dequantize(getattr(inner, name)).repeat_interleave(repeats, 0)
            setattr(inner, name, inner._quantize(whole.contiguous(), axis))  # of quantized numbers: without a loss
        if inner.keys.numel():
            inner.keys, inner.values = (x.repeat_interleave(repeats, 0) for x in (inner.keys, inner.values))


@functools.cache
def quantized_layer_type() -> Any:
    """The class in `transformers`, once it has quantized something: on first use quanto compiles an extension.

    Raises:
        UserError: quanto is not installed, or there is no compiler for C++ or no ninja.
    """
    with needs_extra(f"a cache of {BITS} bits", "eval"):
        import optimum.quanto  # noqa: F401
    from transformers.cache_utils import QuantoQuantizedLayer

    with as_user_error(f"a cache of {BITS} bits: quanto cannot compile its extension"):
        layer = QuantoQuantizedLayer(nbits=BITS)
        layer._dequantize(layer._quantize(torch.zeros(1, 1, 1, 64), layer.axis_key))
    return QuantoQuantizedLayer


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's numbers: itself, or packed integers, scales and zero points."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[operator]
    return [part for name in names for part in plain_tensors(getattr(tensor, name))]


# ---------------------------------------------------------------------- the teacher with such a cache

_layer: ContextVar[PiecewiseCacheLayer] = ContextVar("the cache layer of the attention that runs in this thread")


class PiecewiseAttention(AttentionLayer):
    """The teacher's attention with a cache layer that `make_cache_layer` makes. It takes no padding."""

    def __init__(self, layer: AttentionLayer, make_cache_layer: Callable[[], PiecewiseCacheLayer]):
        super().__init__(layer.attention, layer.spec, layer.index)
        self.make_cache_layer = make_cache_layer

    def new_cache_layer(self) -> PiecewiseCacheLayer:  # type: ignore[override]
        return self.make_cache_layer()

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.shape[-1]:
            raise ValueError("attention_mask: got padding or several documents a row, expected neither")
        token = _layer.set(find_cache_layer(args, kwargs, self.index) or self.make_cache_layer())
        try:
            return self.attention(*args, attention_mask=None, **kwargs)
        finally:
            _layer.reset(token)


def with_cache(teacher: PreTrainedModel, make_cache_layer: Callable[[], PiecewiseCacheLayer]) -> SubquadForCausalLM:
    """The teacher, its weights shared, with another cache.

    Raises:
        UserError: its attention computes its output itself or has a window of its own; the cache needs what is missing.
    """
    make_cache_layer()
    student = kept_attention(teacher, {"default": ATTENTION})
    for index, layer in enumerate(student.mixer_layers):
        assert isinstance(layer, AttentionLayer)
        eager = "eager_attention_forward" in forward_globals(layer.attention)
        if layer.spec.window is not None or not calls_interface(layer.attention) or not eager:
            name = type(layer.attention).__name__
            raise UserError(f"layer {index}: {name} has a window, or no attention function that could be replaced")
        layer.attention.config = copy.copy(layer.attention.config)  # type: ignore[assignment, arg-type]
        layer.attention.config._attn_implementation_internal = PIECEWISE  # type: ignore[union-attr]
        student.mixer_layers[index] = PiecewiseAttention(layer, make_cache_layer)
        student.base.set_submodule(student.config.attention_specs[index]["path"], student.mixer_layers[index])
    return student


def piecewise_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query `[B, H, T, K]`, key `[B, G, T, K]`, value `[B, G, T, V]` of the new tokens; returns `[B, T, H, V]`."""
    layer, outputs = _layer.get(), []
    eager = forward_globals(module)["eager_attention_forward"]
    for q, k, v in zip(*(x.split(layer.piece_tokens, 2) for x in (query, key, value)), strict=True):
        keys, values = layer.append(k, v)
        n, S = q.shape[2], keys.shape[2]
        mask = None
        if n > 1:
            mask = to_additive(torch.ones(n, S, dtype=torch.bool, device=q.device).tril(S - n)[None, None], q.dtype)
        output, probabilities = eager(module, q, keys, values, mask, **kwargs)
        layer.evict(probabilities)
        outputs.append(output)
    layer.num_tokens += query.shape[2]
    return torch.cat(outputs, 1), None


AttentionInterface.register(PIECEWISE, piecewise_attention_forward)
AttentionMaskInterface.register(PIECEWISE, sdpa_mask)
