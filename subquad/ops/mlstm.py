"""mLSTM, the matrix memory of xLSTM, with exponential input gates (arXiv 2405.04517, section 2.3; 2503.13427).

Without a stabilizer, with the input gate i_t and the log forget gate f_t = logsigmoid(forget_gate_t):

    S_t = exp(f_t) S_{t-1} + exp(i_t) k_t v_t^T          n_t = exp(f_t) n_{t-1} + exp(i_t) k_t
    o_t = scale S_t^T q_t / max(|scale n_t^T q_t|, 1)

S and n are stored relative to exp(m_t) with the stabilizer m_t = max(f_t + m_{t-1}, i_t), so that nothing overflows.
The state is (S exp(-m), n exp(-m), m). The stabilizer cancels in every output and has no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.engine.autograd import ChunkInputs, chunked_recurrence
from subquad.ops.engine.scalar_decay import LOG2E, LogCumDecay
from subquad.ops.engine.segments import ChunkLayout, VarlenPadding

INITIAL_STABILIZER = -(2.0**100)
"""m before the first token: finite, since -inf minus -inf is NaN, and exact in every dtype."""

State = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_state: State | None = None,
    scale: float | None = None,
    form: str = "chunk",
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Runs the mLSTM over a sequence.

    Args:
        q, k: [B, T, H, K]; bfloat16 and float16 are computed in float32.
        v: [B, T, H, V].
        input_gate, forget_gate: [B, T, H], before exp and log-sigmoid. An input gate of -inf writes nothing.
        initial_state: (S [B, H, K, V], n [B, H, K], m [B, H]) in float32 (float64 for float64 inputs).
        scale: of q; None is K ** -0.5.
        form: "chunk" (training, prefill) or "step" (token by token, the definition).
        chunk_size, cu_seqlens: as in `chunk`; with documents the states are [N, ...].

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state (S, n, m).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; an unknown form.
    """
    check_mlstm(q, k, v, input_gate, forget_gate, initial_state, form, chunk_size, cu_seqlens)
    B, _, H, K = q.shape
    scale = K**-0.5 if scale is None else scale
    # Gates are computed in float64 in both forms: m grows to hundreds, and differences of it are exponentiated.
    i, f = input_gate.to(torch.float64), F.logsigmoid(forget_gate.to(torch.float64))
    if form == "chunk":
        padding = VarlenPadding(q, v, chunk_size, cu_seqlens)
        q, k, v, f = (padding.pad(x) for x in (q, k, v, f))
        i = padding.pad(i, fill=-torch.inf)
        o, state = _chunk(q, k, v, i, f, initial_state, scale, padding.layout)
        return padding.unpad(o), state
    dtype, dtype_out = checks.compute_dtype(q), q.dtype
    if initial_state is None:
        zeros = q.new_zeros(B, H, K, v.shape[-1] + 1, dtype=dtype)
        initial_state = zeros[..., :-1], zeros[..., -1], zeros.new_full((B, H), INITIAL_STABILIZER)
    o, state = _step(q.to(dtype) * scale, k.to(dtype), v.to(dtype), i, f, initial_state)
    return o.to(dtype_out), state


def _step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State) -> tuple[Tensor, State]:
    S, n, m = state
    m = m.detach()
    outputs = []
    for t in range(q.shape[1]):
        next_m = torch.maximum(f[:, t].detach() + m, i[:, t].detach()).clamp_min(INITIAL_STABILIZER).to(m.dtype)
        forget = (f[:, t] - (next_m.double() - m)).to(S.dtype).exp().unsqueeze(-1)
        write = (i[:, t] - next_m).to(S.dtype).exp().unsqueeze(-1) * k[:, t]
        m = next_m
        S = forget.unsqueeze(-1) * S + write.unsqueeze(-1) * v[:, t].unsqueeze(-2)
        n = forget * n + write
        denominator = (q[:, t] * n).sum(-1, keepdim=True).abs().maximum((-m).exp().unsqueeze(-1))
        outputs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2) / denominator)
    return torch.stack(outputs, 1) if outputs else v, (S, n, m)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State | None, scale: float, layout: ChunkLayout
) -> tuple[Tensor, State]:
    """The chunk form with the stabilized cumulative log decay of both gates; n is one more value channel of ones."""
    dtype, (_, _, H, K), V = checks.compute_dtype(q), q.shape, v.shape[-1]
    initial_state = None
    if state is not None:
        S, n, m = state
        initial_state = torch.cat([S, n.unsqueeze(-1)], -1).reshape(layout.num_documents, layout.BH, K, V + 1)
    with torch.no_grad():
        initial_m = None if state is None else state[2]
        cum_decay, m, last_m = stabilized_cum_decay(layout, i.detach(), f.detach(), initial_m)
        # The final state is relative to m as rounded to its dtype, so that the next call continues from exactly this m.
        final_m = last_m.to(dtype)
        rescale = (last_m - final_m.double()).to(dtype).exp()[..., None, None]
        floor = layout.chunks_to_gates((-m).to(dtype).exp())
    inputs = ChunkInputs(q, k, v, f, None, i, initial_state, *cum_decay, floor)
    o, final_state = chunked_recurrence(inputs, layout, scale, eps=0.0)
    final_state = (final_state * rescale).unflatten(1, (-1, H)).flatten(0, 1)
    return o, (final_state[..., :V], final_state[..., V], final_m.view(-1, H))


def stabilized_cum_decay(
    layout: ChunkLayout, i: Tensor, f: Tensor, m: Tensor | None
) -> tuple[LogCumDecay, Tensor, Tensor]:
    """The cumulative log decay relative to the running maximum of i_t - (f_1 + ... + f_t), float64, per document.

    Returns it, the stabilizer m_t = f_1 + ... + f_t + maximum [N, BH, C], and the last m [documents, BH].
    """
    N, BH, C = layout.N, layout.BH, layout.C

    def by_time(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(BH, N * C)

    def by_chunk(x: Tensor) -> Tensor:
        return x.view(BH, N, -1).transpose(0, 1)

    i = by_time(layout.gates_to_chunks(i, torch.float64, fill=-torch.inf))
    f = by_time(layout.gates_to_chunks(f, torch.float64))
    if m is None:
        m = torch.full((layout.num_documents, BH), INITIAL_STABILIZER, dtype=torch.float64, device=i.device)
    documents, last_m = [], []
    initial_m = m.double().reshape(layout.num_documents, BH, 1).clamp_min(INITIAL_STABILIZER)
    for (first, end), document_m in zip(layout.chunk_ranges, initial_m, strict=True):
        t = slice(first * C, end * C)
        sums = f[:, t].cumsum(-1)
        maxima = torch.cat([document_m, i[:, t] - sums], -1).cummax(-1)[0]
        documents.append((sums, maxima[:, 1:], maxima[:, :-1:C]))
        last_m.append(maxima[:, -1] + sums[:, -1] if first < end else maxima[:, -1])
    sums, maxima, maxima_at_start = (torch.cat(x, -1) for x in zip(*documents, strict=True))
    at_queries, at_keys = by_chunk(maxima * -LOG2E), by_chunk((sums - i) * LOG2E)
    cum_decay = LogCumDecay(at_queries, at_keys, by_chunk(maxima_at_start * -LOG2E), at_queries[..., -1:])
    return cum_decay, by_chunk(sums + maxima), torch.stack(last_m)


def mlstm_matrix(
    q: Tensor,
    k: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    scale: float | None = None,
    rows: slice | None = None,
) -> Tensor:
    """Returns the mixing matrix M [B, H, T, T], o = M v, including the normalizer; arguments as in `mlstm`.

    rows: compute only these rows of M, [B, H, len(rows), T]; a slice without a step.
    """
    check_mlstm(q, k, q, input_gate, forget_gate, None, "chunk", None, None)
    first, end = checks.check_rows(rows, q.shape[1])
    dtype, dtype_out, scale = checks.compute_dtype(q), q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (q[:, first:end].to(dtype) * scale).transpose(1, 2), k.to(dtype).transpose(1, 2)
    i = input_gate.to(torch.float64).transpose(1, 2)
    cum_forget = F.logsigmoid(forget_gate.to(torch.float64)).transpose(1, 2).cumsum(-1)
    log_write = i - cum_forget
    m = cum_forget.detach() + log_write.detach().cummax(-1)[0].clamp_min(INITIAL_STABILIZER)
    log_read = (cum_forget - m)[..., first:end]
    D = (log_write.unsqueeze(-2) + log_read.unsqueeze(-1)).tril(first).to(dtype).exp()
    M = (q @ k.mT * D).tril(first)
    floor = (-m[..., first:end]).to(dtype).exp().unsqueeze(-1)
    return (M / M.sum(-1, keepdim=True).abs().maximum(floor)).to(dtype_out)


def check_mlstm(q, k, v, input_gate, forget_gate, initial_state, form, chunk_size, cu_seqlens) -> None:
    checks.check_qk(q, k)
    checks.check_v(q, v)
    checks.check_gate("input_gate", q, input_gate)
    checks.check_gate("forget_gate", q, forget_gate)
    checks.check_form(form, cu_seqlens)
    checks.check_chunk_size(chunk_size)
    documents = checks.check_cu_seqlens(q, cu_seqlens)
    if initial_state is None:
        return
    checks.check_tuple("initial_state", initial_state, ("S", "n", "m"))
    _, _, H, K = q.shape
    V = v.shape[-1]
    for name, state, size in zip("Snm", initial_state, ((K, V), (K,), ()), strict=True):
        dims = "[B or documents, " + ", ".join(["H", "K", "V"][: 1 + len(size)]) + "]"
        checks.check_state(f"initial_state {name}", q, state, (documents, H, *size), dims=dims)
