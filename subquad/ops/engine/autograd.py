"""The chunk form and its backward pass, written once for every decay and update.

Each token has R queries that read the state (Q = H / G heads of q; under the delta rule, last, also k) and one key that
writes it (under the delta rule beta k). Inside a chunk: the products of queries and keys A (with q) and L (with k,
strictly lower), the queries decayed since the chunk's start P q and P k, the keys decayed to its end E k, and the state
S before it give

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
from typing import Any

import torch
from torch import Tensor

from subquad.ops.checks import Inputs, any_requires_grad, compute_dtype
from subquad.ops.engine import segments
from subquad.ops.engine.channel_decay import ChannelDecay
from subquad.ops.engine.functions import OnceDifferentiable, VmapByLoopFunction
from subquad.ops.engine.product_tree import queries_and_keys
from subquad.ops.engine.scalar_decay import ScalarDecay
from subquad.ops.engine.segments import ChunkedView, ChunkLayout, DocumentPadding, Segment
from subquad.ops.engine.updates import AdditiveUpdate, DeltaUpdate
from subquad.ops.engine.workspace import Workspace


@dataclass(frozen=True)
class ChunkSpec:
    """The arguments of a call that are not tensors. No tuple, which `torch.func` would unpack.

    With `eps` (a normalizer), v has one more channel of ones, and the output is divided by what queries read from it,
    x: by x + eps, under mLSTM by max(|x|, exp(-m)).
    """

    C: int
    bounds: list[int] | None  # of documents, in padded tokens
    scale: float
    save: bool  # whether intermediates are saved for the backward pass
    eps: float | None
    needs_grad: tuple[bool, ...] = ()  # of each input; set in the backward pass


def chunked_recurrence(
    inputs: Inputs, scale: float, chunk_size: int | None, cu_seqlens: Tensor | None, eps: float | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns o [B, T, H, V], the final states [B or documents, G, K, V], with a normalizer V + 1, and of mLSTM the
    final stabilizers [B or documents, G], float64."""
    B, T, G, _ = inputs.k.shape
    C = segments.chunk_length(T, chunk_size)
    matrices = segments.matrices_per_segment(inputs, C)
    if inputs.log_decay is not None and inputs.log_decay.dim() == 1:
        inputs = inputs._replace(log_decay=inputs.log_decay.expand(B, T, G))
    if B > 1 and 2 * matrices < B * G:  # one chunk of the whole batch would exceed the CPU cache
        size = max(1, matrices // G)
        parts = zip(*([None] * -(-B // size) if x is None else x.split(size) for x in inputs), strict=True)
        results = [chunked_recurrence(Inputs._make(part), scale, chunk_size, None, eps) for part in parts]
        outputs, states, stabilizers = zip(*results, strict=True)
        return torch.cat(outputs), torch.cat(states), None if stabilizers[0] is None else torch.cat(stabilizers)
    padding = DocumentPadding(cu_seqlens, C, inputs.q.device)
    inputs = padding.pad(inputs)
    spec = ChunkSpec(C, padding.bounds, scale, any_requires_grad(*inputs), eps)
    if torch.compiler.is_compiling():
        from subquad.ops.engine import compiled

        o, final_state, last_m = compiled.chunked_recurrence(inputs, spec)
    else:
        o, final_state, last_m, *_ = ChunkedRecurrence.apply(*inputs, spec)
    return padding.unpad(o), final_state, last_m


def empty_outputs(inputs: Inputs, spec: ChunkSpec) -> tuple[Any, ...]:
    """Allocates the outputs of `ChunkedRecurrence`: o, the final states, the final stabilizers of mLSTM, and what is
    saved for the backward pass: the states before each chunk, A, U, (I + L)^-1, and the normalizer's denominator and
    slope, its derivative with respect to what queries read from the last channel of v."""
    q, v, C = inputs.q, inputs.v, spec.C
    layout, K, V = ChunkLayout(inputs, C, spec.bounds), q.shape[-1], v.shape[-1] + (spec.eps is not None)
    chunks = layout.N if spec.save else layout.chunks_per_segment
    m, num_states = chunks * layout.BG, layout.num_documents * layout.B
    options: dict[str, Any] = {"dtype": compute_dtype(q)}
    last_m = A = U = inverse = denominator = slope = None
    if inputs.input_gate is not None:
        last_m = q.new_empty(num_states, layout.G, dtype=torch.float64)
    if inputs.beta is None:
        A = q.new_empty(m, C, layout.Q, C, **options)
    else:
        U, inverse = q.new_empty(m, C, V, **options), q.new_zeros(m, C * (C + 1), **options)
    if spec.eps is not None:
        denominator, slope = (q.new_ones(q.shape[:3], **options) for _ in range(2))
    final_state = q.new_empty(num_states, layout.G, K, V, **options)
    states = q.new_empty(chunks + 1, layout.BG, K, V, **options)
    return q.new_empty(*q.shape[:3], v.shape[-1]), final_state, last_m, states, A, U, inverse, denominator, slope


class ChunkedRecurrence(VmapByLoopFunction):
    """(*Inputs, spec) -> (o, final states, final stabilizers, *saved), see `empty_outputs`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        inputs, spec = Inputs(*args[:-1]), args[-1]
        outputs = empty_outputs(inputs, spec)
        o, final_state, last_m, *saved, denominator, slope = outputs
        call = ChunkedCall(inputs, spec, saved)
        layout, initial, final = call.layout, call.by_document(inputs.initial_state), call.by_document(final_state)
        if call.decay.last_m is not None:
            last_m.copy_(call.decay.last_m.view_as(last_m))
        normalizer = None if spec.eps is None else Normalizer(spec.eps, call, denominator, slope)
        o_chunks = ChunkedView(layout, o, by_query=True)
        for segment in layout.segments():
            queries, keys = call.queries_and_keys(segment)
            reads = call.update.forward(segment, queries, keys, call.values(segment), (initial, final))
            o_chunks.store(reads if normalizer is None else normalizer.divide(reads, segment), segment)
        for document in layout.empty_documents:
            final[document] = 0 if initial is None else initial[document]
        call.work.release()
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.spec = inputs
        o, _, *rest = output
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        ctx.save_for_backward(*tensors, *rest[1:], o if ctx.spec.eps is not None else None)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        spec = replace(ctx.spec, needs_grad=ctx.needs_input_grad)
        return (*ChunkedRecurrenceBackward.apply(do, d_final, *ctx.saved_tensors, spec), None, None)


class ChunkedRecurrenceBackward(OnceDifferentiable):
    """(do, d_final, *Inputs, *saved, o, spec) -> the gradients of the first seven inputs."""

    @staticmethod
    def forward(do: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        *tensors, states, A, U, inverse, denominator, slope, o, spec = args
        inputs = Inputs(*tensors)
        V, additive = inputs.v.shape[-1], inputs.beta is None
        do = inputs.q.new_zeros(*inputs.q.shape[:3], V) if do is None else do
        call = ChunkedCall(inputs, spec, (states, A, U, inverse))
        layout, work, decay, update, Q = call.layout, call.work, call.decay, call.update, call.layout.Q
        grads = InputGrads(call, inputs, spec.needs_grad)
        do_chunks, reciprocal, d_last = ChunkedView(layout, do, by_query=True), None, None
        if denominator is not None:  # through the division, and of the last channel that q reads
            each = denominator.reciprocal()
            d_each = torch.linalg.vecdot(do.to(each), o.to(each)).mul_(each).mul_(slope).neg_()
            reciprocal, d_last = (ChunkedView(layout, x, by_query=True) for x in (each, d_each))
        d_initial = states.new_empty(layout.num_documents, *states.shape[1:])
        d_ends = torch.zeros_like(states[0]), call.by_document(d_final), d_initial
        for segment in reversed(layout.segments()):
            raw_queries, raw_keys = call.queries_and_keys(segment, "raw")
            m, C, R, K = raw_queries.shape
            d_reads = work("reads", m, C, R, states.shape[-1])
            do_chunks.load(segment, d_reads[:, :, :Q, :V], by=reciprocal)
            if d_last is not None:
                d_last.load(segment, d_reads[:, :, :Q, V:])
            saved_A = update.of_segment(A, segment) if additive else None
            queries, keys, A_segment = decay.recompute(segment, raw_queries, raw_keys, saved_A)
            values = call.values(segment) if additive else update.of_segment(U, segment)
            G, d_values = update.backward(segment, queries, keys, A_segment, d_reads, d_ends)
            S, flat = update.before(segment), d_reads.view(m, C * R, -1)
            dA = torch.bmm(flat, values.mT, out=work("dA", m, C * R, C)).view(m, C, R, C)
            d_queries, d_keys = queries_and_keys(work, "gradients", m, C, R, K)
            torch.bmm(flat, S.flatten(0, 1).mT, out=d_queries.view(m, C * R, K))
            torch.bmm(values, G.flatten(0, 1).mT, out=d_keys)
            d_gates = decay.backward(segment, dA, d_queries, d_keys, G, S, grads.needs_gates)
            grads.store(segment, d_queries, d_keys, d_values[..., :V], raw_queries, d_gates)
        for document in layout.empty_documents:
            d_initial[document] = 0 if d_ends[1] is None else d_ends[1][document]
        work.release()
        return grads.results(d_initial)


class ChunkedCall:
    """What the forward and the backward pass of a call share: its decay and update, and the segments of its inputs."""

    def __init__(self, inputs: Inputs, spec: ChunkSpec, saved: Sequence[Any]) -> None:
        self.spec, self.V = spec, inputs.v.shape[-1]
        self.layout = layout = ChunkLayout(inputs, spec.C, spec.bounds)
        self.work = work = Workspace(inputs.q, compute_dtype(inputs.q))
        per_channel = inputs.log_decay is not None and inputs.log_decay.dim() == 4
        self.decay = (ChannelDecay if per_channel else ScalarDecay)(layout, inputs, work)
        self.update = (AdditiveUpdate if inputs.beta is None else DeltaUpdate)(
            layout, self.decay, work, spec.save, *saved
        )
        self.q, self.K = ChunkedView(layout, inputs.q, by_query=True), inputs.k.shape[-1]
        self.k, self.v = ChunkedView(layout, inputs.k), ChunkedView(layout, inputs.v)
        self.beta = None if inputs.beta is None else ChunkedView(layout, inputs.beta)

    def by_document(self, states: Tensor | None) -> Any:
        """States [B or documents, G, K, V] as [documents, BG, K, V]; None stays None."""
        layout = self.layout
        return None if states is None else states.reshape(layout.num_documents, layout.BG, *states.shape[2:])

    def queries_and_keys(self, segment: Segment, name: str = "decayed") -> tuple[Tensor, Tensor]:
        """Queries [m, C, R, K] (scale q; delta rule: also k) and keys [m, C, K] (delta rule: beta k)."""
        m, C, Q = segment.n * self.layout.BG, self.layout.C, self.layout.Q
        queries, keys = queries_and_keys(self.work, name, m, C, Q + (self.beta is not None), self.K)
        self.q.load(segment, queries[:, :, :Q], self.spec.scale)
        self.k.load(segment, keys, by=self.beta)
        if self.beta is not None:
            self.k.load(segment, queries[:, :, Q])
        return queries, keys

    def values(self, segment: Segment) -> Tensor:
        """Values [m, C, V]; with a normalizer one more channel of ones."""
        m, C, V = segment.n * self.layout.BG, self.layout.C, self.V
        if self.spec.eps is None:
            return self.v.load(segment, self.work("values", m, C, V))
        values = self.work("values", m, C, V + 1)
        self.v.load(segment, values[..., :V])
        values[..., V] = 1.0
        return values


class Normalizer:
    """Divides reads [m, C, Q, V + 1] by a function of their last channel. Stores the denominator and its slope."""

    def __init__(self, eps: float, call: ChunkedCall, denominator: Tensor, slope: Tensor) -> None:
        self.eps, self.floor = eps, call.decay.floor
        self.denominator, self.slope = (ChunkedView(call.layout, x, by_query=True) for x in (denominator, slope))

    def divide(self, reads: Tensor, segment: Segment) -> Tensor:
        x = reads[..., -1:]
        if self.floor is None:
            denominator = x + self.eps
        else:
            floor, size = self.floor[segment.chunks].reshape(*x.shape[:2], 1, 1), x.abs()
            denominator = size.maximum(floor)
            self.slope.store(x.sign() * (size > floor), segment)
        self.denominator.store(denominator, segment)
        return reads[..., :-1].div_(denominator)


class InputGrads:
    """The gradients of the inputs that need one, filled segment by segment."""

    def __init__(self, call: ChunkedCall, inputs: Inputs, needs_grad: Sequence[bool]) -> None:
        self.call, self.inputs = call, inputs
        needed = {name for name, needs in zip(Inputs._fields, needs_grad, strict=False) if needs}
        self.needs_gates, self.needs_initial = bool(needed & {"log_decay", "input_gate"}), "initial_state" in needed
        given = {name: getattr(inputs, name) for name in needed - {"initial_state"}}
        self.grads = {name: torch.empty(x.shape, dtype=x.dtype, device=x.device) for name, x in given.items()}
        self.views = {name: ChunkedView(call.layout, grad, name == "q") for name, grad in self.grads.items()}

    def store(
        self, segment: Segment, d_queries: Tensor, d_keys: Tensor, d_values: Tensor, raw_queries: Tensor, d_gates: tuple
    ) -> None:
        call, (m, C, _), Q = self.call, d_keys.shape, self.call.layout.Q
        found = {"k": d_keys, "v": d_values, "log_decay": d_gates[0], "input_gate": d_gates[1]}
        if call.beta is not None:
            found["beta"] = call.work.dot(d_keys, raw_queries[:, :, Q])
            beta = call.beta.load(segment, call.work("beta", m, C, 1))
            d_keys.mul_(beta).add_(d_queries[:, :, Q])
        for name, view in self.views.items():
            if name == "q":
                view.store(d_queries[:, :, :Q], segment, call.spec.scale)
            else:
                view.store(found[name].view(m, C, -1), segment)

    def results(self, d_initial: Tensor) -> tuple[Tensor | None, ...]:
        """In the order of `Inputs`, without that of the stabilizer."""
        if self.needs_initial and self.inputs.initial_state is not None:
            self.grads["initial_state"] = d_initial.view(self.inputs.initial_state.shape)
        return tuple(self.grads.get(name) for name in Inputs._fields[:-1])
