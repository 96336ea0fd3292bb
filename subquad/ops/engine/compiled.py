"""The chunk form as one operation of a compiled graph, forward and backward.

Traced by `torch.compile`, its loops would become thousands of nodes and its scratch memory a constant of the graph; as
a custom operation it stays what it is in eager mode, with a fake implementation that gives the shapes. Tensors that
are not there are empty in results, since operations have no optional ones.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.ops.checks import compute_dtype
from subquad.ops.engine import autograd as engine
from subquad.ops.engine.segments import Layout

GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? input_gate, Tensor? initial"
LEVELS = "Tensor? rows, Tensor? columns, Tensor? start, Tensor? end, Tensor? floor"
PLAN = "SymInt[] sizes, SymInt[]? bounds, float scale, bool keep, float? eps"
KEPT = "Tensor A, Tensor U, Tensor inverse, Tensor slots, Tensor level, Tensor slope"


def run(inputs: engine.Inputs, plan: engine.ChunkSpec) -> tuple[Tensor, Tensor]:
    layout = plan.layout
    sizes = [layout.B, layout.T, layout.H, layout.C, layout.matrices]
    o, final, *_ = forward(*inputs, sizes, layout.bounds, plan.scale, plan.keep, plan.eps)
    return o, final


def _plan(q: Tensor, settings: Sequence[Any], needed: Sequence[bool] = ()) -> engine.ChunkSpec:
    sizes, bounds, scale, keep, eps = settings
    B, T, H, C, matrices = sizes
    layout = Layout(B, T, H, C, matrices, None if bounds is None else list(bounds))
    return engine.ChunkSpec(layout, scale, compute_dtype(q), keep, eps, tuple(needed))


def _present(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _results(q: Tensor, results: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else x for x in results)


@torch.library.custom_op(
    "subquad::chunk", mutates_args=(), schema=f"({GIVEN}, {LEVELS}, {PLAN}) -> (Tensor, Tensor, {KEPT})"
)
def forward(*args: Any) -> tuple[Tensor, ...]:
    return _results(args[0], engine.Chunked.forward(*args[:12], _plan(args[0], args[12:])))


@forward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return _results(args[0], engine.empty_results(engine.Inputs(*args[:12]), _plan(args[0], args[12:])))


@torch.library.custom_op(
    "subquad::chunk_backward",
    mutates_args=(),
    schema=f"(Tensor? do, Tensor? d_final, {GIVEN}, {LEVELS}, {KEPT}, Tensor o, {PLAN}, bool[] needed)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    inputs, kept, o, settings, needed = args[:12], args[12:18], args[18], args[19:24], args[24]
    plan = _plan(inputs[0], settings, needed)
    grads = engine.ChunkedBackward.forward(do, d_final, *inputs, *map(_present, kept), o, plan)
    wanted = zip(inputs, grads, needed, strict=False)
    return _results(
        inputs[0], (g.to(x.dtype).contiguous() if need and g is not None else None for x, g, need in wanted)
    )


@backward.register_fake
def _(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    wanted = zip(args[:7], args[24], strict=False)
    return _results(args[0], (x.new_empty(x.shape) if need and x is not None else None for x, need in wanted))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:12], *output[2:], output[0])
    ctx.settings = inputs[12:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:7])
    grads = backward(do, d_final, *ctx.saved_tensors, *ctx.settings, needed)
    return (*(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 10)


forward.register_autograd(_backward, setup_context=_setup_context)
