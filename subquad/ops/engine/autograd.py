"""The chunk form with a backward pass of its own: one mechanism for every kind of recurrence.

A token has R rows, which read the state (its query; under the delta rule also its key), and one key, which writes it
(under the delta rule beta k). Inside a chunk, with the products of rows and keys A (queries) and L (keys, strictly
lower), rows decayed since the chunk's start P Q and P K, keys decayed to its end E K, and the state S at its start:

    U  = V                                additive       U = (I + L)^-1 (V - P K S)      delta rule
    O  = A U + P Q S                      S' = total S + (E K)^T U

What decays do to rows and keys is the business of the frame (`scalar`, `channel`), what U is that of the update
(`updates`); the walk over segments, the scan over states and everything else is written once, here. Backward,
with G the gradient of S', Z that of all rows' reads (dO, and under the delta rule -dU' for the keys'):

    dA, dL = Z U^T        d(P Q), d(P K) = Z S^T        d(E K) = U G^T        d total = sum of G S

Kept for it: the states at chunk starts and, additive, A, or, delta rule, U and (I + L)^-1. The rest is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops.checks import compute_dtype
from subquad.ops.engine.channel_decay import ChannelDecay
from subquad.ops.engine.functions import OnceDifferentiable, VmapByLoopFunction
from subquad.ops.engine.product_tree import tokens
from subquad.ops.engine.scalar_decay import LogCumDecay, ScalarDecay, cumulative_decay
from subquad.ops.engine.segments import ChunkedView, Layout, Segment, StateScan
from subquad.ops.engine.updates import (
    SavedForBackward,
    additive_backward,
    additive_forward,
    delta_backward,
    delta_forward,
)
from subquad.ops.engine.workspace import Workspace


class Inputs(NamedTuple):
    """The tensors of a call, packed. The first seven have gradients; levels and floor come with mLSTM's gates only."""

    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor  # [B, T, H, V]
    log_decay: Tensor | None  # [B, T, H] or [B, T, H, K]
    beta: Tensor | None  # [B, T, H]
    input_gate: Tensor | None  # [B, T, H]
    initial: Tensor | None  # [sequences, BH, K, V], with a normaliser V + 1
    rows: Tensor | None = None  # `scalar.Levels`
    columns: Tensor | None = None
    start: Tensor | None = None
    end: Tensor | None = None
    floor: Tensor | None = None  # [B, T, H], of the normaliser


@dataclass(frozen=True)
class ChunkSpec:
    """What a call asks for besides tensors.

    With `eps` the output is divided by what one more value channel, always one, reads: by max(|x|, floor), or by
    x + eps where there is no floor.
    """

    layout: Layout
    scale: float
    dtype: torch.dtype  # of the computation and the states
    keep: bool  # what the backward pass needs
    eps: float | None
    needed: tuple[bool, ...] = ()  # the inputs whose gradients are, in the backward pass


def run(inputs: Inputs, layout: Layout, scale: float, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final states [sequences, BH, K, V], with a normaliser V + 1."""
    if layout.B > 1 and 2 * layout.matrices < layout.BH:
        return _in_batches(inputs, layout, scale, eps)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    plan = ChunkSpec(layout, scale, compute_dtype(inputs.q), keep, eps)
    if torch.compiler.is_compiling():
        from subquad.ops.engine import compiled

        return compiled.run(inputs, plan)
    o, final, *_ = Chunked.apply(*inputs, plan)
    return o, final


def empty_results(inputs: Inputs, plan: ChunkSpec) -> tuple[Tensor | None, ...]:
    """What `Chunked` returns, not yet computed: o, the final states, and what is kept: A, U, the inverse, states, and
    of a normaliser its level and slope."""
    q, v, layout, C = inputs.q, inputs.v, plan.layout, plan.layout.C
    K, V = q.shape[-1], v.shape[-1] + (plan.eps is not None)
    kept_chunks = layout.N if plan.keep else layout.n
    m = kept_chunks * layout.BH
    made: dict[str, Any] = {"dtype": plan.dtype}
    A = U = inverse = level = slope = None
    if inputs.beta is None:
        A = q.new_empty(m, C, C, **made)
    else:
        U, inverse = q.new_empty(m, C, V, **made), q.new_zeros(m, C * (C + 1), **made)
    if plan.eps is not None:
        level, slope = (q.new_ones(q.shape[:3], **made) for _ in range(2))
    final = q.new_empty(layout.sequences, layout.BH, K, V, **made)
    slots = q.new_empty(kept_chunks + 1, layout.BH, K, V, **made)
    return q.new_empty(v.shape), final, A, U, inverse, slots, level, slope


def _in_batches(inputs: Inputs, layout: Layout, scale: float, eps: float | None) -> tuple[Tensor, Tensor]:
    """A batch so large that one chunk of it leaves the cache, some sequences at a time."""
    H, size = layout.H, max(1, layout.matrices // layout.H)
    by_head = ("initial", "rows", "columns", "start", "end")  # [..., BH, ...]
    parts = [
        [None] * -(-layout.B // size) if x is None else x.split(size * H, 1) if name in by_head else x.split(size, 0)
        for name, x in inputs._asdict().items()
    ]
    results = []
    for part in map(Inputs._make, zip(*parts, strict=True)):
        results.append(run(part, Layout(part.q.shape[0], layout.T, H, layout.C, layout.matrices), scale, eps))
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs), torch.cat(states, 1)


class Chunked(VmapByLoopFunction):
    """(*Inputs, plan) -> (o, final states, and what is kept for the backward pass)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        inputs, plan = Inputs(*args[:-1]), args[-1]
        layout, work = plan.layout, Workspace(inputs.q, plan.dtype)
        frame = make_decay(plan, inputs, work)
        results = empty_results(inputs, plan)
        o, final, A, U, inverse, slots, level, slope = results
        assert o is not None and final is not None and slots is not None  # noqa: PT018
        kept = SavedForBackward(StateScan(layout, slots, plan.keep), A, U, inverse)
        normalizer = None if level is None or slope is None else Normalizer(plan, inputs.floor, level, slope)
        update = additive_forward if inputs.beta is None else delta_forward
        sources, target = ChunkInputs(plan, inputs, work), ChunkedView(layout, o)
        for segment in layout.segments():
            rows, keys = sources.rows(segment)
            values = sources.values(segment)
            reads = update(segment, frame, kept, rows, keys, values, inputs.initial, final, work)
            if normalizer is not None:
                reads = normalizer.divide(reads, segment)
            target.store(reads, segment)
        for n in layout.empty:
            final[n] = 0 if inputs.initial is None else inputs.initial[n]
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.plan = inputs
        o, _, *kept = output
        ctx.mark_non_differentiable(*(x for x in kept if x is not None))
        ctx.save_for_backward(*tensors, *kept, o if ctx.plan.eps is not None else None)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grads = ChunkedBackward.apply(do, d_final, *ctx.saved_tensors, replace(ctx.plan, needed=ctx.needs_input_grad))
        return (*grads, *(None,) * (len(ctx.needs_input_grad) - len(grads)))


class ChunkedBackward(OnceDifferentiable):
    """(do, d_final, *Inputs, *kept, o, plan) -> the gradients of the first seven inputs."""

    @staticmethod
    def forward(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, A, U, inverse, slots, level, slope, o, plan = args
        inputs, layout = Inputs(*tensors), plan.layout
        V, beta = inputs.v.shape[-1], inputs.beta
        kept = SavedForBackward(StateScan(layout, slots, True), A, U, inverse)
        work = Workspace(inputs.q, plan.dtype)
        frame = make_decay(plan, inputs, work)
        grads = InputGrads(plan, inputs, slots, work)
        reading = OutputGrad(plan, do if do is not None else torch.zeros_like(inputs.v), o, level, slope)
        update = additive_backward if beta is None else delta_backward
        sources, carry = ChunkInputs(plan, inputs, work), torch.zeros_like(slots[0])
        for segment in reversed(layout.segments()):
            raw_rows, raw_keys = sources.rows(segment, "raw")
            m, C, R, K = raw_rows.shape
            reads = reading.load(segment, work("reads", m, C, R, slots.shape[-1]))
            decayed = frame.recompute(segment, raw_rows, raw_keys, kept.part(A, segment) if beta is None else None)
            values = sources.values(segment) if beta is None else kept.part(U, segment)
            ends, d_values = update(segment, frame, kept, decayed, reads, d_final, grads.initial, carry, work)
            grads.to_v.store(d_values[..., :V], segment)
            starts, flat = kept.states.starts(segment), reads.view(m, C * R, -1)
            dA = torch.bmm(flat, values.mT, out=work("dA", m, C * R, C)).view(m, C, R, C)
            d_rows, d_keys = tokens(work, "gradients", m, C, R, K)
            torch.bmm(flat, starts.flatten(0, 1).mT, out=d_rows.view(m, C * R, K))
            torch.bmm(values, ends.flatten(0, 1).mT, out=d_keys)
            gates = frame.backward(segment, dA, d_rows, d_keys, ends, starts, grads.wants_gates)
            grads.store(segment, d_rows, d_keys, raw_rows, gates)
        return grads.results(d_final)


class ChunkInputs:
    """The segments of q, k, v and beta."""

    def __init__(self, plan: ChunkSpec, inputs: Inputs, work: Workspace) -> None:
        self.plan, self.work = plan, work
        self.q, self.k, self.v = (ChunkedView(plan.layout, x) for x in (inputs.q, inputs.k, inputs.v))
        self.beta = None if inputs.beta is None else ChunkedView(plan.layout, inputs.beta)
        self.K, self.V = inputs.q.shape[-1], inputs.v.shape[-1]

    def rows(self, segment: Segment, name: str = "decayed") -> tuple[Tensor, Tensor]:
        """Rows [m, C, R, K] (queries times scale; keys) and keys [m, C, K] (times beta)."""
        m, C, R = segment.n * self.plan.layout.BH, self.plan.layout.C, 1 if self.beta is None else 2
        rows, keys = tokens(self.work, name, m, C, R, self.K)
        self.q.load(segment, rows[:, :, 0], self.plan.scale)
        self.k.load(segment, keys, by=self.beta)
        if R == 2:
            self.k.load(segment, rows[:, :, 1])
        return rows, keys

    def values(self, segment: Segment) -> Tensor:
        """Values [m, C, V]; with a normaliser one more channel of ones."""
        m, C, V = segment.n * self.plan.layout.BH, self.plan.layout.C, self.V
        if self.plan.eps is None:
            return self.v.load(segment, self.work("values", m, C, V))
        values = self.work("values", m, C, V + 1)
        self.v.load(segment, values[..., :V])
        values[..., V] = 1.0
        return values


class Normalizer:
    """Divides reads [m, C, V + 1] and remembers by what, level, and its derivative by the last channel, slope."""

    def __init__(self, plan: ChunkSpec, floor: Tensor | None, level: Tensor, slope: Tensor) -> None:
        assert plan.eps is not None
        self.eps, self.floor = plan.eps, None if floor is None else ChunkedView(plan.layout, floor)
        self.to_level, self.to_slope = ChunkedView(plan.layout, level), ChunkedView(plan.layout, slope)

    def divide(self, reads: Tensor, segment: Segment) -> Tensor:
        m, C, _ = reads.shape
        x = reads[..., -1:]
        if self.floor is None:
            level = x + self.eps
        else:
            floor = self.floor.load(segment, x.new_empty(m, C, 1))
            size = x.abs()
            level = size.maximum(floor)
            self.to_slope.store(x.sign() * (size > floor), segment)
        self.to_level.store(level, segment)
        return reads[..., :-1].div_(level)


class OutputGrad:
    """The gradient of what queries read: that of the output, through the normaliser if there is one."""

    def __init__(
        self, plan: ChunkSpec, do: Tensor, o: Tensor | None, level: Tensor | None, slope: Tensor | None
    ) -> None:
        self.V, self.do = do.shape[-1], ChunkedView(plan.layout, do)
        self.share = self.d_level = None
        if level is not None:
            assert o is not None
            assert slope is not None
            share = level.reciprocal()
            d_level = torch.linalg.vecdot(do.to(level.dtype), o.to(level.dtype)).mul_(share).mul_(slope).neg_()
            self.share, self.d_level = ChunkedView(plan.layout, share), ChunkedView(plan.layout, d_level)

    def load(self, segment: Segment, reads: Tensor) -> Tensor:
        """Fill the queries' role of `reads` [m, C, R, V]."""
        self.do.load(segment, reads[:, :, 0, : self.V], by=self.share)
        if self.d_level is not None:
            self.d_level.load(segment, reads[:, :, 0, self.V :])
        return reads


class InputGrads:
    """The results of the backward pass, filled segment by segment."""

    def __init__(self, plan: ChunkSpec, inputs: Inputs, chunk_states: Tensor, work: Workspace) -> None:
        layout = plan.layout
        q, k, v, log_decay, beta, *_ = inputs
        _, _, _, wants_decay, _, wants_input, self.wants_initial, *_ = plan.needed
        self.plan, self.work, self.beta, self.wants_gates = plan, work, beta, wants_decay or wants_input
        self.q, self.k, self.v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        self.to_q, self.to_k, self.to_v = (ChunkedView(layout, x) for x in (self.q, self.k, self.v))
        self.initial = chunk_states.new_empty(layout.sequences, *chunk_states.shape[1:])
        gate_shape = layout.N, layout.BH, layout.C
        self.per_channel = False
        self.decay = self.d_beta = self.d_input = None
        if self.wants_gates and log_decay is not None:
            self.per_channel = log_decay.dim() == 4
            self.decay = (
                log_decay.new_empty(log_decay.shape) if self.per_channel else chunk_states.new_empty(gate_shape)
            )
        if self.per_channel and self.decay is not None:
            self.to_decay = ChunkedView(layout, self.decay)
        if wants_input:
            self.d_input = chunk_states.new_empty(gate_shape)
        if beta is not None:
            self.d_beta, self.strength = chunk_states.new_empty(gate_shape), layout.gates(beta, chunk_states.dtype)

    def store(self, segment: Segment, d_rows: Tensor, d_keys: Tensor, raw_rows: Tensor, gates: tuple) -> None:
        s = slice(segment.first, segment.first + segment.n)
        if self.beta is not None:
            m, C, _ = d_keys.shape
            assert self.d_beta is not None
            self.d_beta[s] = self.work.dot(d_keys, raw_rows[:, :, 1]).view(segment.n, -1, C)
            d_keys.mul_(self.strength[s].reshape(m, C, 1)).add_(d_rows[:, :, 1])
        self.to_q.store(d_rows[:, :, 0], segment, self.plan.scale)
        self.to_k.store(d_keys, segment)
        if self.decay is not None and self.per_channel:
            self.to_decay.store(gates[0], segment)
        elif self.decay is not None:
            self.decay[s] = gates[0]
        if self.d_input is not None:
            self.d_input[s] = gates[1]

    def results(self, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        layout = self.plan.layout
        for n in layout.empty:
            self.initial[n] = 0 if d_final is None else d_final[n]
        decay = self.decay if self.decay is None or self.per_channel else layout.from_gates(self.decay)
        d_beta = None if self.d_beta is None else layout.from_gates(self.d_beta)
        d_input = None if self.d_input is None else layout.from_gates(self.d_input)
        initial = self.initial if self.wants_initial else None
        return self.q, self.k, self.v, decay, d_beta, d_input, initial


def make_decay(plan: ChunkSpec, inputs: Inputs, work: Workspace) -> ScalarDecay | ChannelDecay:
    log_decay = inputs.log_decay
    if log_decay is not None and log_decay.dim() == 4:
        return ChannelDecay(plan.layout, log_decay, work)
    levels = None
    if inputs.rows is not None:
        levels = LogCumDecay(*(x for x in inputs[7:11] if x is not None))
    elif log_decay is not None:
        levels = cumulative_decay(plan.layout, log_decay)
    return ScalarDecay(plan.layout, levels, work, plan.dtype, inputs.input_gate is not None)
