"""The chunk form as one custom operation of a compiled graph, forward and backward.

Traced by `torch.compile`, its loops would become thousands of nodes and its scratch memory a constant of the graph. The
custom operation runs the eager code; its fake implementation gives the shapes. Operations have no optional results, so
a missing tensor is returned as an empty one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from subquad.ops.checks import Inputs
from subquad.ops.engine import autograd

INPUTS = ", ".join(f"Tensor{'?' if name in Inputs._field_defaults else ''} {name}" for name in Inputs._fields)
SPEC = "SymInt C, SymInt[]? bounds, float scale, bool save, float? eps"
SAVED = "Tensor states, Tensor A, Tensor U, Tensor inverse, Tensor denominator, Tensor slope"


def chunked_recurrence(inputs: Inputs, spec: autograd.ChunkSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    o, final_state, last_m, *_ = forward(*inputs, spec.C, spec.bounds, spec.scale, spec.save, spec.eps)
    return o, final_state, None if inputs.input_gate is None else last_m


def _call(args: tuple) -> tuple[Inputs, autograd.ChunkSpec]:
    return Inputs(*args[:8]), autograd.ChunkSpec(*args[8:])


def _empty_if_none(q: Tensor, results: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else x for x in results)


@torch.library.custom_op(
    "subquad::chunk", mutates_args=(), schema=f"({INPUTS}, {SPEC}) -> (Tensor, Tensor, Tensor, {SAVED})"
)
def forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec = _call(args)
    return _empty_if_none(inputs.q, autograd.ChunkedRecurrence.forward(*inputs, spec))


@forward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return _empty_if_none(args[0], autograd.empty_outputs(*_call(args)))


@torch.library.custom_op(
    "subquad::chunk_backward",
    mutates_args=(),
    schema=f"(Tensor? do, Tensor? d_final, {SAVED}, Tensor o, {INPUTS}, {SPEC}, bool[] needs_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    saved, (inputs, spec) = (x if x.numel() else None for x in args[:6]), _call(args[7:])
    grads = autograd.ChunkedRecurrenceBackward.forward(do, d_final, *inputs, *saved, args[6], spec)
    return _empty_if_none(inputs.q, grads)


@backward.register_fake
def _(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, spec = _call(args[7:])
    needed = (x if needs else None for x, needs in zip(inputs, spec.needs_grad, strict=False))
    return _empty_if_none(inputs.q, (None if x is None else x.new_empty(x.shape) for x in needed))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[3:], output[0], *inputs[:8])
    ctx.spec_args = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs_grad = list(ctx.needs_input_grad[:7])
    grads = backward(do, d_final, *ctx.saved_tensors, *ctx.spec_args, needs_grad)
    return (*(g if needs else None for g, needs in zip(grads, needs_grad, strict=True)), *[None] * 6)


forward.register_autograd(_backward, setup_context=_setup_context)
