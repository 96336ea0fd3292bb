"""Rollback of a cache's layers, for drafts of which a part is rejected (speculative decoding, arXiv 2211.17192).

While a cache layer records (`activate_past_recording`), it keeps what it held before each call and the call's inputs.
`crop` puts back what was held before the call in which the accepted tokens end, and runs this call again on its
accepted tokens: one mixer or one window of attention, without MLPs. No call changes a cache's tensors in place, so what
is kept needs no copies: the cost is the memory of one more state for each call since the last `crop`.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

RECORDED_TOKENS = 128
"""How many of the last tokens `crop` can take back, at least. A longer call runs in two parts, the second of as many
tokens, so that neither the inputs of a long prompt are kept nor the prompt runs again."""


class LayerCall(ABC):
    """The pass of a layer over new tokens, which updates its cache layer."""

    mask: Tensor | None
    """The student's own mask (`subquad.modeling.masks`), of these tokens or of all tokens so far."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """The number of new tokens T."""

    @abstractmethod
    def narrow(self, start: int, stop: int) -> "LayerCall":
        """The pass over new tokens `start` to `stop` alone."""

    @abstractmethod
    def __call__(self) -> Tensor:
        """The output, `[B, T, ...]`."""

    @property
    def is_packed(self) -> bool:
        """Whether the mask holds the numbers of documents: their ends are not where a state could be put back."""
        return self.mask is not None and self.mask.dtype == torch.int64


class RecordedCall(NamedTuple):
    """A call, what the cache layer held before it, and whether autograd was enabled."""

    contents: dict[str, Any]
    call: LayerCall
    with_gradients: bool


class Record:
    """The calls of a cache layer since its last `crop`, as far as they reach back at most `RECORDED_TOKENS` tokens."""

    def __init__(self) -> None:
        self.active = False
        self._calls: list[RecordedCall] = []

    def clear(self) -> None:
        self._calls = []

    def add(self, contents: dict[str, Any], call: LayerCall) -> None:
        self._calls.append(RecordedCall(contents, call, torch.is_grad_enabled()))
        while self.num_tokens - self._calls[0].call.num_tokens >= RECORDED_TOKENS:
            self._calls.pop(0)

    @property
    def num_tokens(self) -> int:
        """How many tokens can be taken back."""
        return sum(recorded.call.num_tokens for recorded in self._calls)

    def check(self, count: int) -> None:
        """Raises RuntimeError if `count` tokens cannot be taken back."""
        if count > self.num_tokens:
            raise RuntimeError(
                f"crop: got {count} tokens to remove, expected at most {self.num_tokens}, those of calls since "
                "`cache.activate_past_recording()` and since the last crop"
            )
        packed = next((c for c, left in self._back(count) if left and c.call.is_packed), None)
        if packed is not None:
            raise RuntimeError("crop: the tokens to remove begin within a call with several documents a row")

    def _back(self, count: int) -> list[tuple[RecordedCall, int]]:
        """The calls that hold the last `count` tokens, the latest first, and how many tokens of each stay."""
        found = []
        for recorded in reversed(self._calls):
            if count <= 0:
                break
            found.append((recorded, max(recorded.call.num_tokens - count, 0)))
            count -= recorded.call.num_tokens
        return found

    def take_back(self, count: int) -> tuple[dict[str, Any], LayerCall | None, bool] | None:
        """What the layer must hold, the call to run then, and whether with autograd, so that the last `count` tokens
        are removed; None for no tokens. Forgets all calls."""
        back = self._back(count)
        self.clear()
        if not back:
            return None
        (contents, call, with_gradients), left = back[-1]
        return contents, call.narrow(0, left) if left else None, with_gradients


def run_recorded(cache_layer: Any, call: LayerCall) -> Tensor:
    """The output of `call`, which a `RecurrentCacheLayer` (None: no cache) records if it was asked to."""
    if cache_layer is None or not cache_layer.record.active:
        return call()
    earlier = call.num_tokens - RECORDED_TOKENS
    if earlier <= 0 or call.is_packed:
        cache_layer.record.add(cache_layer.contents(), call)
        return call()
    first, last = call.narrow(0, earlier)(), call.narrow(earlier, call.num_tokens)
    cache_layer.record.add(cache_layer.contents(), last)
    return torch.cat((first, last()), 1)


def tokens_of(x: Tensor, start: int, stop: int, dim: int = 1) -> Tensor:
    """Tokens `start` to `stop` of x along `dim`, copied, since a view would keep the whole tensor."""
    return x.narrow(dim, start, stop - start).clone()


def mask_of(mask: Tensor | None, T: int, start: int, stop: int) -> Tensor | None:
    """The part of the student's mask for new tokens `start` to `stop` of T."""
    if mask is None or not mask.shape[-1]:
        return mask
    past = mask.shape[-1] - T
    return mask[..., past + start : past + stop]
