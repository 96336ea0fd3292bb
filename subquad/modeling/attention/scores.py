"""The attention probabilities of a softmax attention module, whole or some rows at a time; the targets of stage 1.

They come from the model's own eager attention function, which includes its soft caps, attention sinks and scaling. To
get some rows, the function is given only the queries of these rows. Where this does not return rows of the whole matrix
(a model that builds its own causal mask, or has no such function), the whole matrix is computed and sliced.
"""

import inspect
import sys
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from subquad.modeling.attention.activations import hidden_states_of
from subquad.modeling.attention.sinks import RotaryTokens, with_sink_channels
from subquad.modeling.attention.tracing import attention_implementation, is_shape_mismatch
from subquad.modeling.masks import additive_mask, doc_ids_and_positions, numbers_of_heads

ROW_SLICED = "subquad_rows"
"""Name of the attention implementation that computes some rows."""
PROBE_LENGTH = 6
"""Tokens on which row slicing is compared with the whole matrix, once for each class of attention."""

_request: ContextVar[tuple["AttentionProbabilities", slice, list[Tensor]]] = ContextVar("what a thread asks for")
"""Of which attention which rows, and a list, which gets the rows of the matrix and the values."""
_row_slicing: dict[type, bool] = {}


def _row_sliced_attention(module, query, key, value, attention_mask, **kwargs):
    probabilities, rows, found = _request.get()
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    B, H, T, K = query.shape
    if eager is not None:
        q, k, v = query[:, :, rows], key, value
        if (moved := probabilities.moved_queries(q, rows, T)) is not None:
            kwargs["scaling"] = kwargs.get("scaling") or K**-0.5
            q, k, v = with_sink_channels(q, moved, k, v, probabilities.sinks, None)
        found += [eager(module, q, k, v, attention_mask, **kwargs)[1], value]
    return query.new_zeros(B, T, H, value.shape[-1]), None


AttentionInterface.register(ROW_SLICED, _row_sliced_attention)
AttentionMaskInterface.register(ROW_SLICED, eager_mask)


def slice_arguments(
    args: tuple, kwargs: dict[str, Any], tokens: slice, batch: slice = slice(None)
) -> tuple[tuple, dict]:
    """The arguments of an attention's forward for some tokens (and rows) of a batch."""
    T = hidden_states_of(args, kwargs).shape[1]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == T:
            return value[batch if value.shape[0] > 1 else slice(None), tokens].contiguous()  # GPT-2 takes a view of it
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    return cut(args), {name: cut(value) for name, value in kwargs.items()}


def replace_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any], mask: Tensor | None) -> tuple[tuple, dict]:
    """The arguments of a decoder layer's or an attention's forward, with `mask` in place of their attention mask."""
    T = hidden_states_of(args, kwargs).shape[1]

    def is_mask(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 4 and value.shape[-2:] in ((T, T), (1, T), (1, 0))

    # A positional mask can be None (no padding, causal attention), so positional masks are also found by name.
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    replaced = {name: mask if is_mask(value) else value for name, value in kwargs.items()}
    is_positional_mask = [names[i : i + 1] == ["attention_mask"] or is_mask(value) for i, value in enumerate(args)]
    if any(is_positional_mask):
        return tuple(mask if found else arg for found, arg in zip(is_positional_mask, args, strict=True)), replaced
    return args, {**replaced, "attention_mask": mask}


@dataclass
class AttentionProbabilities:
    """The attention probabilities of one layer; called with a slice of rows, gives these, `[B, H, rows, T]`;
    differentiable.

    window: tokens that a query attends to, itself included: a number, or one for each head; None for all.
    sinks: first tokens that every query also attends to.
    args, kwargs: of the attention module's forward, for sequences of one document each, without padding or cache.
    limit: the teacher's own window, which the sinks do not extend.
    rotary: layout of the rotary embedding, with which sinks stay at a constant distance (see `sinks.py`).
    """

    attention: nn.Module
    window: int | tuple[int, ...] | None
    sinks: int
    args: tuple
    kwargs: dict[str, Any]
    limit: int | None = None
    rotary: str | None = None

    def __call__(self, rows: slice = slice(None)) -> Tensor:
        T = hidden_states_of(self.args, self.kwargs).shape[1]
        chosen = range(*rows.indices(T))
        if (self.sinks or len(chosen) < T) and self.supports_row_slicing():
            return self.some_rows(slice(chosen.start, chosen.stop, chosen.step))
        return self.whole()[:, :, rows]

    def moved_queries(self, q: Tensor, rows: slice, T: int) -> Tensor | None:
        """The queries `[B, H, rows, K]` of T tokens as the sinks see them; None if they are the queries themselves."""
        positions = self.kwargs.get("position_embeddings")
        if not self.sinks or self.window is None or self.rotary is None or positions is None:
            return None
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        of_heads = numbers_of_heads(windows, q.device)
        cos, sin = positions
        chosen = RotaryTokens(self.rotary, cos[:, rows], sin[:, rows], 0, torch.arange(T, device=q.device)[None, rows])
        moved = q
        for window in set(windows):
            last = window + self.sinks - 1
            rotation = RotaryTokens(self.rotary, cos, sin).at(last, None)
            if rotation is not None:
                moved = torch.where(of_heads == window, chosen.moved(q, last, rotation), moved)
        return moved

    def run(self, implementation: str, rows: slice) -> Any:
        """The result of the attention module, with the rows of a mask."""
        x = hidden_states_of(self.args, self.kwargs)
        keys = doc_ids, positions = doc_ids_and_positions(None, len(x), x.shape[1], x.device)
        window = numbers_of_heads(self.window, x.device) if isinstance(self.window, tuple) else self.window
        mask = additive_mask((doc_ids[:, rows], positions[:, rows]), keys, window, self.sinks, self.limit, x.dtype)
        with attention_implementation(self.attention, implementation):
            return self.attention(*self.args, **{**self.kwargs, "attention_mask": mask})

    def whole(self) -> Tensor:
        return self.run("eager", slice(None))[1]

    def some_rows(self, rows: slice) -> Tensor:
        """No elements where the module has no eager function, or computes attention itself."""
        return (self._request(rows) or [torch.empty(0)])[0]

    def values(self) -> Tensor | None:
        """The values `[B, heads, T, V]` of all key/value heads, or of all query heads if the module repeats them; None
        where the module computes attention itself."""
        found = self._request(slice(0, 1))
        return found[1] if found else None

    def _request(self, rows: slice) -> list[Tensor]:
        found: list[Tensor] = []
        token = _request.set((self, rows, found))
        try:
            self.run(ROW_SLICED, rows)
        finally:
            _request.reset(token)
        return found

    @torch.no_grad()
    def supports_row_slicing(self) -> bool:
        """Whether the eager function of this class, given some queries, returns their rows of the whole matrix.

        An error other than a mismatch of shapes, such as too little memory, is raised and says nothing about the class.
        """
        kind = type(self.attention)
        if kind not in _row_slicing:
            args, kwargs = slice_arguments(self.args, self.kwargs, slice(0, PROBE_LENGTH))
            probe, rows = replace(self, args=args, kwargs=kwargs, rotary=None), slice(2, 4)
            whole = probe.whole()[:, :, rows]
            try:
                some = probe.some_rows(rows)
            except RuntimeError as error:
                if not is_shape_mismatch(error):
                    raise
                some = torch.empty(0)
            _row_slicing[kind] = some.shape == whole.shape and torch.allclose(some, whole, atol=1e-4)
        return _row_slicing[kind]
