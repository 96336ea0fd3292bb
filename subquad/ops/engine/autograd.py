"""The chunk form and its backward pass, written once for every decay and update.

Each token has R queries that read the state (q; under the delta rule also k) and one key that writes it (under the
delta rule beta k). Inside a chunk: the products of queries and keys A (with q) and L (with k, strictly lower), the
queries decayed since the chunk's start P q and P k, the keys decayed to its end E k, and the state S before it give

    U  = V                                additive       U = (I + L)^-1 (V - P k S)      delta rule
    O  = A U + P q S                      S' = total S + (E k)^T U

The decay (`scalar_decay`, `channel_decay`) computes A, L, P q, P k and E k; the update (`updates`) computes U and the
states. Backward, with the gradients G of S' and Z of what all queries read (dO, and under the delta rule -dU' for k):

    dA, dL = Z U^T        d(P q), d(P k) = Z S^T        d(E k) = U G^T        d total = sum of G S

Saved for it are the states before each chunk and A (additive) or U and (I + L)^-1 (delta rule). The rest is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops.checks import any_requires_grad, compute_dtype
from subquad.ops.engine.channel_decay import ChannelDecay
from subquad.ops.engine.functions import OnceDifferentiable, VmapByLoopFunction
from subquad.ops.engine.product_tree import queries_and_keys
from subquad.ops.engine.scalar_decay import LogCumDecay, ScalarDecay, cumulative_log_decay
from subquad.ops.engine.segments import ChunkedView, ChunkLayout, Segment, StateScan
from subquad.ops.engine.updates import AdditiveUpdate, DeltaUpdate, SavedForBackward
from subquad.ops.engine.workspace import Workspace


class ChunkInputs(NamedTuple):
    """The tensors of a call, padded. Only the first seven have gradients; the last five are for mLSTM's gates."""

    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor  # [B, T, H, V]
    log_decay: Tensor | None  # [B, T, H] or [B, T, H, K]
    beta: Tensor | None  # [B, T, H]
    input_gate: Tensor | None  # [B, T, H]
    initial_state: Tensor | None  # [documents, BH, K, V], with a normalizer V + 1
    cum_decay_at_queries: Tensor | None = None  # the fields of `LogCumDecay`
    cum_decay_at_keys: Tensor | None = None
    cum_decay_at_start: Tensor | None = None
    cum_decay_at_end: Tensor | None = None
    floor: Tensor | None = None  # [B, T, H], of the normalizer


@dataclass(frozen=True)
class ChunkSpec:
    """The arguments of a call that are not tensors.

    With `eps` (a normalizer), v has one more channel of ones, and the output is divided by what queries read from it,
    x: by max(|x|, floor), or by x + eps without a floor.
    """

    layout: ChunkLayout
    scale: float
    dtype: torch.dtype  # of the computation and the states
    save: bool  # whether intermediates are saved for the backward pass
    eps: float | None
    needs_grad: tuple[bool, ...] = ()  # of each input; set in the backward pass


def chunked_recurrence(
    inputs: ChunkInputs, layout: ChunkLayout, scale: float, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """Returns o [B, T, H, V] and the final states [documents, BH, K, V], with a normalizer V + 1."""
    if layout.B > 1 and 2 * layout.matrices_per_segment < layout.BH:
        return _split_batch(inputs, layout, scale, eps)
    save = any_requires_grad(*inputs)
    spec = ChunkSpec(layout, scale, compute_dtype(inputs.q), save, eps)
    if torch.compiler.is_compiling():
        from subquad.ops.engine import compiled

        return compiled.chunked_recurrence(inputs, spec)
    o, final_state, *_ = ChunkedRecurrence.apply(*inputs, spec)
    return o, final_state


def empty_outputs(inputs: ChunkInputs, spec: ChunkSpec) -> tuple[Tensor | None, ...]:
    """Allocates the outputs of `ChunkedRecurrence`: o and the final states, and what is saved for the backward pass: A,
    U, (I + L)^-1, the states before each chunk, and the normalizer's denominator and its slope."""
    q, v, layout, C = inputs.q, inputs.v, spec.layout, spec.layout.C
    K, V = q.shape[-1], v.shape[-1] + (spec.eps is not None)
    chunks = layout.N if spec.save else layout.chunks_per_segment
    m = chunks * layout.BH
    options: dict[str, Any] = {"dtype": spec.dtype}
    A = U = inverse = denominator = slope = None
    if inputs.beta is None:
        A = q.new_empty(m, C, C, **options)
    else:
        U, inverse = q.new_empty(m, C, V, **options), q.new_zeros(m, C * (C + 1), **options)
    if spec.eps is not None:
        denominator, slope = (q.new_ones(q.shape[:3], **options) for _ in range(2))
    final_state = q.new_empty(layout.num_documents, layout.BH, K, V, **options)
    chunk_states = q.new_empty(chunks + 1, layout.BH, K, V, **options)
    return q.new_empty(v.shape), final_state, A, U, inverse, chunk_states, denominator, slope


def _split_batch(inputs: ChunkInputs, layout: ChunkLayout, scale: float, eps: float | None) -> tuple[Tensor, Tensor]:
    """Computes a few sequences at a time where one chunk of the whole batch would exceed the CPU cache."""
    H, matrices = layout.H, layout.matrices_per_segment
    size = max(1, matrices // H)

    def split(name: str, x: Tensor | None) -> Sequence[Tensor | None]:
        if x is None:
            return [None] * -(-layout.B // size)
        by_head = name == "initial_state" or name.startswith("cum_decay")  # [..., BH, ...]
        return x.split(size * H, 1) if by_head else x.split(size, 0)

    pieces = [split(name, x) for name, x in inputs._asdict().items()]
    results = []
    for piece in map(ChunkInputs._make, zip(*pieces, strict=True)):
        piece_layout = ChunkLayout(piece.q.shape[0], layout.T, H, layout.C, matrices)
        results.append(chunked_recurrence(piece, piece_layout, scale, eps))
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs), torch.cat(states, 1)


class ChunkedRecurrence(VmapByLoopFunction):
    """(*ChunkInputs, spec) -> (o, final states, *saved), see `empty_outputs`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        inputs, spec = ChunkInputs(*args[:-1]), args[-1]
        layout, work = spec.layout, Workspace(inputs.q, spec.dtype)
        decay = make_decay(spec, inputs, work)
        outputs = empty_outputs(inputs, spec)
        o, final_state, A, U, inverse, chunk_states, denominator, slope = outputs
        assert o is not None and final_state is not None and chunk_states is not None  # noqa: PT018
        saved = SavedForBackward(StateScan(layout, chunk_states, spec.save), A, U, inverse)
        normalizer = None
        if denominator is not None and slope is not None:
            normalizer = Normalizer(spec, inputs.floor, denominator, slope)
        update = (AdditiveUpdate if inputs.beta is None else DeltaUpdate)(decay, saved, work)
        ends = inputs.initial_state, final_state
        loader, o_chunks = SegmentLoader(spec, inputs, work), ChunkedView(layout, o)
        for segment in layout.segments():
            queries, keys = loader.queries_and_keys(segment)
            reads = update.forward(segment, queries, keys, loader.values(segment), ends)
            if normalizer is not None:
                reads = normalizer.divide(reads, segment)
            o_chunks.store(reads, segment)
        for document in layout.empty_documents:
            final_state[document] = 0 if inputs.initial_state is None else inputs.initial_state[document]
        work.release()
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.spec = inputs
        o, _, *saved = output
        ctx.mark_non_differentiable(*(x for x in saved if x is not None))
        ctx.save_for_backward(*tensors, *saved, o if ctx.spec.eps is not None else None)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        spec = replace(ctx.spec, needs_grad=ctx.needs_input_grad)
        grads = ChunkedRecurrenceBackward.apply(do, d_final, *ctx.saved_tensors, spec)
        return (*grads, *(None,) * (len(ctx.needs_input_grad) - len(grads)))


class ChunkedRecurrenceBackward(OnceDifferentiable):
    """(do, d_final, *ChunkInputs, *saved, o, spec) -> the gradients of the first seven inputs."""

    @staticmethod
    def forward(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, A, U, inverse, chunk_states, denominator, slope, o, spec = args
        inputs, layout = ChunkInputs(*tensors), spec.layout
        V, additive = inputs.v.shape[-1], inputs.beta is None
        saved = SavedForBackward(StateScan(layout, chunk_states, True), A, U, inverse)
        work = Workspace(inputs.q, spec.dtype)
        decay = make_decay(spec, inputs, work)
        grads = InputGrads(spec, inputs, chunk_states, work)
        output_grad = OutputGrad(spec, do if do is not None else torch.zeros_like(inputs.v), o, denominator, slope)
        update = (AdditiveUpdate if additive else DeltaUpdate)(decay, saved, work)
        loader = SegmentLoader(spec, inputs, work)
        d_ends = torch.zeros_like(chunk_states[0]), d_final, grads.d_initial
        for segment in reversed(layout.segments()):
            raw_queries, raw_keys = loader.queries_and_keys(segment, "raw")
            m, C, R, K = raw_queries.shape
            d_reads = output_grad.load(segment, work("reads", m, C, R, chunk_states.shape[-1]))
            saved_A = saved.of_segment(A, segment) if additive else None
            queries, keys, A_segment = decay.recompute(segment, raw_queries, raw_keys, saved_A)
            values = loader.values(segment) if additive else saved.of_segment(U, segment)
            G, d_values = update.backward(segment, queries, keys, A_segment, d_reads, d_ends)
            grads.v_chunks.store(d_values[..., :V], segment)
            S, flat = saved.states.before(segment), d_reads.view(m, C * R, -1)
            dA = torch.bmm(flat, values.mT, out=work("dA", m, C * R, C)).view(m, C, R, C)
            d_queries, d_keys = queries_and_keys(work, "gradients", m, C, R, K)
            torch.bmm(flat, S.flatten(0, 1).mT, out=d_queries.view(m, C * R, K))
            torch.bmm(values, G.flatten(0, 1).mT, out=d_keys)
            d_gates = decay.backward(segment, dA, d_queries, d_keys, G, S, grads.needs_gates)
            grads.store(segment, d_queries, d_keys, raw_queries, d_gates)
        results = grads.results(d_final)
        work.release()
        return results


class SegmentLoader:
    """Copies the segments of q, k, v and beta into scratch memory."""

    def __init__(self, spec: ChunkSpec, inputs: ChunkInputs, work: Workspace) -> None:
        self.spec, self.work = spec, work
        self.q, self.k, self.v = (ChunkedView(spec.layout, x) for x in (inputs.q, inputs.k, inputs.v))
        self.beta = None if inputs.beta is None else ChunkedView(spec.layout, inputs.beta)
        self.K, self.V = inputs.q.shape[-1], inputs.v.shape[-1]

    def queries_and_keys(self, segment: Segment, name: str = "decayed") -> tuple[Tensor, Tensor]:
        """Queries [m, C, R, K] (scale q; delta rule: also k) and keys [m, C, K] (delta rule: beta k)."""
        m, C, R = segment.n * self.spec.layout.BH, self.spec.layout.C, 1 if self.beta is None else 2
        queries, keys = queries_and_keys(self.work, name, m, C, R, self.K)
        self.q.load(segment, queries[:, :, 0], self.spec.scale)
        self.k.load(segment, keys, by=self.beta)
        if R == 2:
            self.k.load(segment, queries[:, :, 1])
        return queries, keys

    def values(self, segment: Segment) -> Tensor:
        """Values [m, C, V]; with a normalizer one more channel of ones."""
        m, C, V = segment.n * self.spec.layout.BH, self.spec.layout.C, self.V
        if self.spec.eps is None:
            return self.v.load(segment, self.work("values", m, C, V))
        values = self.work("values", m, C, V + 1)
        self.v.load(segment, values[..., :V])
        values[..., V] = 1.0
        return values


class Normalizer:
    """Divides reads [m, C, V + 1] by a function of their last channel.

    Stores the denominator and its slope, the derivative with respect to the last channel, both [B, T, H].
    """

    def __init__(self, spec: ChunkSpec, floor: Tensor | None, denominator: Tensor, slope: Tensor) -> None:
        assert spec.eps is not None
        self.eps, self.floor = spec.eps, None if floor is None else ChunkedView(spec.layout, floor)
        self.denominator, self.slope = ChunkedView(spec.layout, denominator), ChunkedView(spec.layout, slope)

    def divide(self, reads: Tensor, segment: Segment) -> Tensor:
        m, C, _ = reads.shape
        x = reads[..., -1:]
        if self.floor is None:
            denominator = x + self.eps
        else:
            floor = self.floor.load(segment, x.new_empty(m, C, 1))
            size = x.abs()
            denominator = size.maximum(floor)
            self.slope.store(x.sign() * (size > floor), segment)
        self.denominator.store(denominator, segment)
        return reads[..., :-1].div_(denominator)


class OutputGrad:
    """The gradient of what q reads: that of the output, with a normalizer through its division."""

    def __init__(
        self, spec: ChunkSpec, do: Tensor, o: Tensor | None, denominator: Tensor | None, slope: Tensor | None
    ) -> None:
        self.V, self.do = do.shape[-1], ChunkedView(spec.layout, do)
        self.reciprocal = self.d_last = None
        if denominator is not None:
            assert o is not None
            assert slope is not None
            reciprocal, dtype = denominator.reciprocal(), denominator.dtype
            d_last = torch.linalg.vecdot(do.to(dtype), o.to(dtype)).mul_(reciprocal).mul_(slope).neg_()
            self.reciprocal, self.d_last = ChunkedView(spec.layout, reciprocal), ChunkedView(spec.layout, d_last)

    def load(self, segment: Segment, d_reads: Tensor) -> Tensor:
        """Fills `d_reads[:, :, 0]` of [m, C, R, V], with a normalizer V + 1."""
        self.do.load(segment, d_reads[:, :, 0, : self.V], by=self.reciprocal)
        if self.d_last is not None:
            self.d_last.load(segment, d_reads[:, :, 0, self.V :])
        return d_reads


class InputGrads:
    """The gradients of the inputs, filled segment by segment."""

    def __init__(self, spec: ChunkSpec, inputs: ChunkInputs, chunk_states: Tensor, work: Workspace) -> None:
        layout = spec.layout
        q, k, v, log_decay, beta, *_ = inputs
        _, _, _, needs_decay, _, needs_input_gate, self.needs_initial, *_ = spec.needs_grad
        self.spec, self.work, self.beta, self.needs_gates = spec, work, beta, needs_decay or needs_input_gate
        self.dq, self.dk, self.dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        self.q_chunks, self.k_chunks, self.v_chunks = (ChunkedView(layout, x) for x in (self.dq, self.dk, self.dv))
        self.d_initial = chunk_states.new_empty(layout.num_documents, *chunk_states.shape[1:])
        gate_shape = layout.N, layout.BH, layout.C
        self.d_log_decay = self.d_beta = self.d_input_gate = self.channel_decay_chunks = None
        if self.needs_gates and log_decay is not None and log_decay.dim() == 4:
            self.d_log_decay = log_decay.new_empty(log_decay.shape)
            self.channel_decay_chunks = ChunkedView(layout, self.d_log_decay)
        elif self.needs_gates and log_decay is not None:
            self.d_log_decay = chunk_states.new_empty(gate_shape)
        if needs_input_gate:
            self.d_input_gate = chunk_states.new_empty(gate_shape)
        if beta is not None:
            self.d_beta = chunk_states.new_empty(gate_shape)
            self.beta_chunks = layout.gates_to_chunks(beta, chunk_states.dtype)

    def store(self, segment: Segment, d_queries: Tensor, d_keys: Tensor, raw_queries: Tensor, d_gates: tuple) -> None:
        s = slice(segment.first, segment.first + segment.n)
        if self.beta is not None:
            m, C, _ = d_keys.shape
            assert self.d_beta is not None
            self.d_beta[s] = self.work.dot(d_keys, raw_queries[:, :, 1]).view(segment.n, -1, C)
            d_keys.mul_(self.beta_chunks[s].reshape(m, C, 1)).add_(d_queries[:, :, 1])
        self.q_chunks.store(d_queries[:, :, 0], segment, self.spec.scale)
        self.k_chunks.store(d_keys, segment)
        if self.channel_decay_chunks is not None:
            self.channel_decay_chunks.store(d_gates[0], segment)
        elif self.d_log_decay is not None:
            self.d_log_decay[s] = d_gates[0]
        if self.d_input_gate is not None:
            self.d_input_gate[s] = d_gates[1]

    def results(self, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        layout = self.spec.layout
        for document in layout.empty_documents:
            self.d_initial[document] = 0 if d_final is None else d_final[document]

        def gate(x: Tensor | None) -> Tensor | None:
            return None if x is None else layout.chunks_to_gates(x)

        d_log_decay = self.d_log_decay if self.channel_decay_chunks is not None else gate(self.d_log_decay)
        d_initial = self.d_initial if self.needs_initial else None
        return self.dq, self.dk, self.dv, d_log_decay, gate(self.d_beta), gate(self.d_input_gate), d_initial


def make_decay(spec: ChunkSpec, inputs: ChunkInputs, work: Workspace) -> ScalarDecay | ChannelDecay:
    log_decay = inputs.log_decay
    if log_decay is not None and log_decay.dim() == 4:
        return ChannelDecay(spec.layout, log_decay, work)
    cum_decay = None
    if inputs.cum_decay_at_queries is not None:
        cum_decay = LogCumDecay(*(x for x in inputs[7:11] if x is not None))
    elif log_decay is not None:
        cum_decay = cumulative_log_decay(spec.layout, log_decay)
    return ScalarDecay(spec.layout, cum_decay, work, spec.dtype, inputs.input_gate is not None)
