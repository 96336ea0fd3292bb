"""mLSTM, the matrix memory of xLSTM (arXiv 2405.04517, section 2.3; 2503.13427): exponential input gates.

Without a stabiliser, with the input gate i_t and log forget gate f_t = logsigmoid(forget_gate_t):

    S_t = exp(f_t) S_{t-1} + exp(i_t) k_t v_t^T          n_t = exp(f_t) n_{t-1} + exp(i_t) k_t
    o_t = scale S_t^T q_t / max(|scale n_t^T q_t|, 1)

S and n are kept relative to exp(m_t), m_t = max(f_t + m_{t-1}, i_t), so that nothing overflows; the state is the
triple (S exp(-m), n exp(-m), m). The reference level m cancels in every output and carries no gradient. Before the
first token it is `EMPTY`, in effect minus infinity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.engine.autograd import Inputs, run
from subquad.ops.engine.scalar_decay import LOG2E, LogCumDecay
from subquad.ops.engine.segments import Layout, VarlenPadding

EMPTY = -(2.0**100)  # finite, because minus infinity minus itself is NaN; the same number in every dtype

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
    """The mLSTM over a sequence.

    Args:
        q, k: [B, T, H, K]; bfloat16 and float16 are computed in float32.
        v: [B, T, H, V].
        input_gate, forget_gate: [B, T, H], before exp and log-sigmoid. An input gate of -inf writes nothing.
        initial_state: (S [B, H, K, V], n [B, H, K], m [B, H]) in float32 (float64 for float64 inputs).
        scale: of q; K ** -0.5 if None.
        form: "chunk" (training, prefill) or "step" (token by token, the definition).
        chunk_size, cu_seqlens: as in `chunk`; with documents the states are [N, ...].

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state (S, n, m).
    """
    check_mlstm(q, k, v, input_gate, forget_gate, initial_state, form, chunk_size, cu_seqlens)
    B, _, H, K = q.shape
    scale = K**-0.5 if scale is None else scale
    # Gate arithmetic runs in float64 in both forms: m grows to hundreds, and what is exponentiated are differences.
    i, f = input_gate.to(torch.float64), F.logsigmoid(forget_gate.to(torch.float64))
    if form == "chunk":
        packing = VarlenPadding(q, v, chunk_size, cu_seqlens)
        q, k, v, f = (packing.pack(x) for x in (q, k, v, f))
        i = packing.pack(i, fill=-torch.inf)
        o, state = _chunk(q, k, v, i, f, initial_state, scale, packing.layout)
        return packing.unpack(o), state
    dtype, dtype_out = checks.compute_dtype(q), q.dtype
    if initial_state is None:
        zeros = q.new_zeros(B, H, K, v.shape[-1] + 1, dtype=dtype)
        initial_state = zeros[..., :-1], zeros[..., -1], zeros.new_full((B, H), EMPTY)
    o, state = _step(q.to(dtype) * scale, k.to(dtype), v.to(dtype), i, f, initial_state)
    return o.to(dtype_out), state


def _step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State) -> tuple[Tensor, State]:
    S, n, m = state
    m = m.detach()
    outputs = []
    for t in range(q.shape[1]):
        higher = torch.maximum(f[:, t].detach() + m, i[:, t].detach()).clamp_min(EMPTY).to(m.dtype)
        forget = (f[:, t] - (higher.double() - m)).to(S.dtype).exp().unsqueeze(-1)
        write = (i[:, t] - higher).to(S.dtype).exp().unsqueeze(-1) * k[:, t]
        m = higher
        S = forget.unsqueeze(-1) * S + write.unsqueeze(-1) * v[:, t].unsqueeze(-2)
        n = forget * n + write
        level = (q[:, t] * n).sum(-1, keepdim=True).abs().maximum((-m).exp().unsqueeze(-1))
        outputs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2) / level)
    return torch.stack(outputs, 1) if outputs else v, (S, n, m)


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State | None, scale: float, layout: Layout
) -> tuple[Tensor, State]:
    """The engine, with the levels of the exponential gate and one more value channel, always one, for n."""
    dtype, (_, _, H, K), V = checks.compute_dtype(q), q.shape, v.shape[-1]
    initial = None
    if state is not None:
        S, n, m = state
        initial = torch.cat([S, n.unsqueeze(-1)], -1).reshape(layout.sequences, layout.BH, K, V + 1)
    with torch.no_grad():
        levels, m, last = gate_cumulative_decay(layout, i.detach(), f.detach(), None if state is None else state[2])
        # The state is handed on relative to m as its dtype holds it, so that the next piece continues from this very m.
        handed = last.to(dtype)
        rest = (last - handed.double()).to(dtype).exp()[..., None, None]
        floor = layout.from_gates((-m).to(dtype).exp())
    o, final = run(Inputs(q, k, v, f, None, i, initial, *levels, floor), layout, scale, eps=0.0)
    final = (final * rest).unflatten(1, (-1, H)).flatten(0, 1)
    return o, (final[..., :V], final[..., V], handed.view(-1, H))


def gate_cumulative_decay(layout: Layout, i: Tensor, f: Tensor, m: Tensor | None) -> tuple[LogCumDecay, Tensor, Tensor]:
    """Levels relative to the running maximum of a_t = i_t - (f_1 + ... + f_t), in float64, document by document.

    Returns them, the reference level m_t = f_1 + ... + f_t + maximum [N, BH, C] and the last m [sequences, BH].
    """
    N, BH, C = layout.N, layout.BH, layout.C

    def in_time(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(BH, N * C)

    def in_chunks(x: Tensor) -> Tensor:
        return x.view(BH, N, -1).transpose(0, 1)

    i, f = in_time(layout.gates(i, torch.float64, fill=-torch.inf)), in_time(layout.gates(f, torch.float64))
    if m is None:
        m = torch.full((layout.sequences, BH), EMPTY, dtype=torch.float64, device=i.device)
    parts, last = [], []
    for n, level in enumerate(m.double().reshape(layout.sequences, BH, 1).clamp_min(EMPTY)):
        first, end = layout.spans[n]
        t = slice(first * C, end * C)
        sums = f[:, t].cumsum(-1)
        top = torch.cat([level, i[:, t] - sums], -1).cummax(-1)[0]
        parts.append((sums, top[:, 1:], top[:, :-1:C]))
        last.append(top[:, -1] + sums[:, -1] if first < end else top[:, -1])
    since, peak, before = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    rows = in_chunks(peak * -LOG2E)
    levels = LogCumDecay(rows, in_chunks((since - i) * LOG2E), in_chunks(before * -LOG2E), rows[..., -1:])
    return levels, in_chunks(since + peak), torch.stack(last)


def mlstm_matrix(
    q: Tensor,
    k: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    scale: float | None = None,
    rows: slice | None = None,
) -> Tensor:
    """The mixing matrix M [B, H, T, T] with o = M v, the normaliser included; arguments as in `mlstm`.

    rows: only these rows of M, [B, H, len(rows), T]; without a step.
    """
    check_mlstm(q, k, q, input_gate, forget_gate, None, "chunk", None, None)
    first, end = checks.check_rows(rows, q.shape[1])
    dtype, dtype_out, scale = checks.compute_dtype(q), q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (q[:, first:end].to(dtype) * scale).transpose(1, 2), k.to(dtype).transpose(1, 2)
    i = input_gate.to(torch.float64).transpose(1, 2)
    since = F.logsigmoid(forget_gate.to(torch.float64)).transpose(1, 2).cumsum(-1)
    a = i - since
    m = since.detach() + a.detach().cummax(-1)[0].clamp_min(EMPTY)  # a constant level: it cancels in M
    level = (since - m)[..., first:end]
    D = (a.unsqueeze(-2) + level.unsqueeze(-1)).tril(first).to(dtype).exp()
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
    sequences = checks.check_cu_seqlens(q, cu_seqlens)
    if initial_state is None:
        return
    checks.check_tuple("initial_state", initial_state, ("S", "n", "m"))
    _, _, H, K = q.shape
    V = v.shape[-1]
    for name, state, size in zip("Snm", initial_state, ((K, V), (K,), ()), strict=True):
        axes = "[B or documents, " + ", ".join(["H", "K", "V"][: 1 + len(size)]) + "]"
        checks.check_state(f"initial_state {name}", q, state, (sequences, H, *size), axes=axes)
