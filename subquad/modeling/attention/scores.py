"""The probabilities of a family's own softmax attention, some rows at a time: what stage 1 learns from.

They come from the family's eager attention function, so that caps, sinks and scalings are its own. It is handed only
the queries of the rows that are asked for; a family in which that is not the same as rows of the whole (one that
builds a causal mask of its own, or writes its attention out) gives the whole, of which the rows are taken.
"""

import inspect
import sys
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from subquad.modeling.attention.tracing import attention_implementation
from subquad.modeling.masks import additive_mask, doc_ids_and_positions

ROW_SLICED = "subquad_rows"
PROBE_LENGTH = 6
"""Tokens on which a family's rows are compared with its whole."""

_requests: list[tuple[slice, list[Tensor]]] = []
_row_slicing: dict[type, bool] = {}


def _row_sliced_attention(module, query, key, value, attention_mask, **options):
    rows, found = _requests[-1]
    eager = sys.modules[type(module).__module__].eager_attention_forward
    found.append(eager(module, query[:, :, rows], key, value, attention_mask, **options)[1])
    B, H, T, _ = query.shape
    return query.new_zeros(B, T, H, value.shape[-1]), None


AttentionInterface.register(ROW_SLICED, _row_sliced_attention)
AttentionMaskInterface.register(ROW_SLICED, eager_mask)


def attention_probabilities(
    attention: nn.Module, window: int | None, sinks: int, args: tuple, kwargs: dict[str, Any], rows: slice = slice(None)
) -> Tensor:
    """Rows of the attention probabilities of one layer, `[B, H, rows, T]`; differentiable.

    args, kwargs: what the family handed to it, for rows that are one document each, without a cache.
    """
    T = hidden_states_of(args, kwargs).shape[1]
    first, end, _ = rows.indices(T)
    if end - first == T:
        return _full_matrix(attention, window, sinks, args, kwargs)
    if not _supports_row_slicing(attention, window, sinks, args, kwargs):
        return _full_matrix(attention, window, sinks, args, kwargs)[:, :, rows]
    return _matrix_rows(attention, window, sinks, args, kwargs, slice(first, end))


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer or its attention, from what a family hands over."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def slice_tokens(value: Any, T: int, tokens: slice, row: slice = slice(None)) -> Any:
    """Some tokens (and rows) of whatever has the tokens of a batch on its second axis, also within tuples."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == T:
        return value[row if value.shape[0] > 1 else slice(None), tokens]
    return tuple(slice_tokens(v, T, tokens, row) for v in value) if isinstance(value, tuple) else value


def slice_arguments(args: tuple, kwargs: dict[str, Any], tokens: slice, row: slice = slice(None)) -> tuple[tuple, dict]:
    """A family's arguments for some tokens (and rows) of a batch."""
    T = hidden_states_of(args, kwargs).shape[1]
    return slice_tokens(args, T, tokens, row), {n: slice_tokens(value, T, tokens, row) for n, value in kwargs.items()}


def replace_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any], mask: Tensor | None) -> tuple[tuple, dict]:
    """What a family hands to a layer or its attention, `module`, with our mask in the place of its own."""
    T = hidden_states_of(args, kwargs).shape[1]

    def is_mask(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 4 and value.shape[-2:] in ((T, T), (1, T), (1, 0))

    # One that was handed over by place may have been None: all tokens are real, and attention knows that it is causal.
    taken = inspect.signature(module.forward).parameters.values()
    by_place = [parameter.name for parameter in taken if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    found = {name: mask if is_mask(value) else value for name, value in kwargs.items()}
    placed = [by_place[i : i + 1] == ["attention_mask"] or is_mask(value) for i, value in enumerate(args)]
    if any(placed):
        return tuple(mask if here else value for here, value in zip(placed, args, strict=True)), found
    return args, {**found, "attention_mask": mask}


def _make_mask(x: Tensor, window: int | None, sinks: int, rows: slice) -> Tensor:
    documents, places = doc_ids_and_positions(None, len(x), x.shape[1], x.device)
    return additive_mask((documents[:, rows], places[:, rows]), (documents, places), window, sinks, x.dtype)


def _full_matrix(attention: nn.Module, window: int | None, sinks: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    mask = _make_mask(hidden_states_of(args, kwargs), window, sinks, slice(None))
    with attention_implementation(attention, "eager"):
        return attention(*args, **{**kwargs, "attention_mask": mask})[1]


def _matrix_rows(
    attention: nn.Module, window: int | None, sinks: int, args: tuple, kwargs: dict[str, Any], rows: slice
) -> Tensor:
    mask = _make_mask(hidden_states_of(args, kwargs), window, sinks, rows)
    found: list[Tensor] = []
    _requests.append((rows, found))
    try:
        with attention_implementation(attention, ROW_SLICED):
            attention(*args, **{**kwargs, "attention_mask": mask})
    finally:
        _requests.pop()
    return found[0]


@torch.no_grad()
def _supports_row_slicing(
    attention: nn.Module, window: int | None, sinks: int, args: tuple, kwargs: dict[str, Any]
) -> bool:
    """Whether this family's eager function, given some of the queries, gives those rows of the whole."""
    known = _row_slicing.get(type(attention))
    if known is None:
        few_args, few = slice_arguments(args, kwargs, slice(0, PROBE_LENGTH))
        rows = slice(2, 4)
        try:
            some = _matrix_rows(attention, window, sinks, few_args, few, rows)
            whole = _full_matrix(attention, window, sinks, few_args, few)
            known = some.shape == whole[:, :, rows].shape and torch.allclose(some, whole[:, :, rows], atol=1e-4)
        except (AttributeError, IndexError, RuntimeError):
            known = False
        _row_slicing[type(attention)] = known
    return known
