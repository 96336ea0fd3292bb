"""The chunk form as one custom operation of a compiled graph, forward and backward.

Traced by `torch.compile`, its loops would become thousands of nodes and its scratch memory a constant of the graph. The
custom operation runs the eager code; its fake implementation gives the shapes. Operations have no optional results, so
a missing tensor is returned as an empty one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops.checks import compute_dtype
from subquad.ops.engine import autograd
from subquad.ops.engine.segments import ChunkLayout

INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? input_gate, Tensor? initial_state"
MLSTM_GATES = (
    "Tensor? cum_decay_at_queries, Tensor? cum_decay_at_keys, Tensor? cum_decay_at_start, Tensor? cum_decay_at_end, "
    "Tensor? floor"
)
SPEC = "SymInt[] sizes, SymInt[]? bounds, float scale, bool save, float? eps"
SAVED = "Tensor A, Tensor U, Tensor inverse, Tensor chunk_states, Tensor denominator, Tensor slope"


def chunked_recurrence(inputs: autograd.ChunkInputs, spec: autograd.ChunkSpec) -> tuple[Tensor, Tensor]:
    layout = spec.layout
    sizes = [layout.B, layout.T, layout.H, layout.C, layout.matrices_per_segment]
    o, final_state, *_ = forward(*inputs, sizes, layout.bounds, spec.scale, spec.save, spec.eps)
    return o, final_state


def _spec(q: Tensor, args: Sequence[Any], needs_grad: Sequence[bool] = ()) -> autograd.ChunkSpec:
    sizes, bounds, scale, save, eps = args
    B, T, H, C, matrices = sizes
    layout = ChunkLayout(B, T, H, C, matrices, None if bounds is None else list(bounds))
    return autograd.ChunkSpec(layout, scale, compute_dtype(q), save, eps, tuple(needs_grad))


def _none_if_empty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _empty_if_none(q: Tensor, results: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else x for x in results)


@torch.library.custom_op(
    "subquad::chunk", mutates_args=(), schema=f"({INPUTS}, {MLSTM_GATES}, {SPEC}) -> (Tensor, Tensor, {SAVED})"
)
def forward(*args: Any) -> tuple[Tensor, ...]:
    return _empty_if_none(args[0], autograd.ChunkedRecurrence.forward(*args[:12], _spec(args[0], args[12:])))


@forward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec = autograd.ChunkInputs(*args[:12]), _spec(args[0], args[12:])
    return _empty_if_none(args[0], autograd.empty_outputs(inputs, spec))


@torch.library.custom_op(
    "subquad::chunk_backward",
    mutates_args=(),
    schema=f"(Tensor? do, Tensor? d_final, {INPUTS}, {MLSTM_GATES}, {SAVED}, Tensor o, {SPEC}, bool[] needs_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, saved, o, spec_args, needs_grad = args[:12], args[12:18], args[18], args[19:24], args[24]
    spec = _spec(inputs[0], spec_args, needs_grad)
    grads = autograd.ChunkedRecurrenceBackward.forward(do, d_final, *inputs, *map(_none_if_empty, saved), o, spec)
    each = zip(inputs, grads, needs_grad, strict=False)
    return _empty_if_none(
        inputs[0], (g.to(x.dtype).contiguous() if need and g is not None else None for x, g, need in each)
    )


@backward.register_fake
def _(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    each = zip(args[:7], args[24], strict=False)
    return _empty_if_none(args[0], (x.new_empty(x.shape) if need and x is not None else None for x, need in each))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:12], *output[2:], output[0])
    ctx.spec_args = inputs[12:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs_grad = list(ctx.needs_input_grad[:7])
    grads = backward(do, d_final, *ctx.saved_tensors, *ctx.spec_args, needs_grad)
    return (*(g if need else None for g, need in zip(grads, needs_grad, strict=True)), *[None] * 10)


forward.register_autograd(_backward, setup_context=_setup_context)
