"""Linear attention with its normalizer (arXiv 2006.16236, equation 12), optionally with a decay:

    o_t = scale S_t^T q_t / (scale z_t^T q_t + eps)          z_t = exp(g_t) z_{t-1} + k_t

And mLSTM, the matrix memory of xLSTM, with exponential input gates (arXiv 2405.04517, section 2.3; 2503.13427). Without
a stabilizer, with the input gate i_t and the log forget gate f_t = logsigmoid(forget_gate_t):

    S_t = exp(f_t) S_{t-1} + exp(i_t) k_t v_t^T          n_t = exp(f_t) n_{t-1} + exp(i_t) k_t
    o_t = scale S_t^T q_t / max(|scale n_t^T q_t|, 1)

S and n are stored relative to exp(m_t) with the stabilizer m_t = max(f_t + m_{t-1}, i_t), so that nothing overflows.
The state is (S exp(-m), n exp(-m), m). The stabilizer cancels in every output and has no gradient.

The normalizer's state, z or n, is that of one more value channel of ones. On a GPU the kernels of `fla` for a decay per
head compute both chunk forms: mLSTM's with the decay f_t + m_{t-1} - m_t, at most 0, and keys times exp(i_t - m_t), at
most 1.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import fla
from subquad.ops.checks import Inputs, check_recurrence, check_rows, compute_dtype
from subquad.ops.engine.autograd import chunked_recurrence
from subquad.ops.engine.scalar_decay import INITIAL_STABILIZER
from subquad.ops.matrix import matrix
from subquad.ops.recurrence import step

MIN_DECAY = -104.0
"""Of mLSTM in the kernels of `fla`, which add decays up in float32."""
MLSTMState = tuple[Tensor, Tensor, Tensor]


def normalized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    form: str = "chunk",
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Normalized linear attention; q and k are feature maps and should not be negative.

    Args:
        q, k, v, log_decay, scale: as in `step`; chunk_size, cu_seqlens, backend: as in `chunk`.
        initial_state: (S [B, G, K, V], z [B, G, K]) in float32 (float64 for float64 inputs); None is zeros.
        eps: added to the normalizer.
        form: "chunk" (training, prefill) or "step" (token by token).

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state (S, z).

    Raises:
        TypeError, ValueError: as `chunk`; an unknown form.
    """
    dtype = compute_dtype(q)
    shapes = check_recurrence(Inputs(q, k, v, log_decay), chunk_size, cu_seqlens, form)
    shapes.check_states(initial_state, dtype, S="NGKV", z="NGK")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = None
    if initial_state is not None:
        S, z = initial_state
        state = torch.cat([S, z.unsqueeze(-1)], -1)
    inputs, found = Inputs(q, k, v, log_decay, None, state), None
    if form == "step":
        values = F.pad(v.to(dtype), (0, 1), value=1.0)
        found = step(q.to(dtype), k.to(dtype), values, log_decay, None, state, scale)
    elif fla.use_fla(backend, q):
        found = _reads_by_fla(backend, inputs, scale, cu_seqlens)
    if found is None:
        o, state, _ = chunked_recurrence(inputs, scale, chunk_size, cu_seqlens, eps)
    else:
        reads, state = found
        o = (reads[..., :-1].to(dtype) / (reads[..., -1:].to(dtype) + eps)).to(q.dtype)
    return o, (state[..., :-1], state[..., -1])


def _reads_by_fla(
    backend: str | None, inputs: Inputs, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """What queries read, with the normalizer as the last channel, and the final state; None: see `fla.run`."""
    return fla.run(backend, "chunk", inputs._replace(v=F.pad(inputs.v, (0, 1), value=1.0)), scale, cu_seqlens)


def normalized_matrix(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    rows: slice | None = None,
) -> Tensor:
    """Returns the mixing matrix M [B, H, T, T], o = M v, including the normalizer; arguments as in `normalized`.

    rows: compute only these rows of M, [B, H, len(rows), T]; a slice without a step.
    """
    dtype = compute_dtype(q)
    M = matrix(q.to(dtype), k.to(dtype), log_decay, scale=scale, rows=rows)
    return (M / (M.sum(-1, keepdim=True) + eps)).to(q.dtype)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_state: MLSTMState | None = None,
    scale: float | None = None,
    form: str = "chunk",
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MLSTMState]:
    """Runs the mLSTM over a sequence.

    Args:
        q, k, v: [B, T, H, K], [B, T, G, K], [B, T, G, V], as in `step`.
        input_gate, forget_gate: [B, T, G], before exp and log-sigmoid. An input gate of -inf writes nothing.
        initial_state: (S [B, G, K, V], n [B, G, K], m [B, G]) in float32 (float64 for float64 inputs).
        scale: of q; None is K ** -0.5.
        form: "chunk" (training, prefill) or "step" (token by token, the definition).
        chunk_size, cu_seqlens, backend: as in `chunk`; with documents the states are [N, ...].

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state (S, n, m).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; an unknown form.
    """
    shapes = check_recurrence(Inputs(q, k, v), chunk_size, cu_seqlens, form)
    shapes.check("input_gate", input_gate, "BTG")
    shapes.check("forget_gate", forget_gate, "BTG")
    dtype = compute_dtype(q)
    shapes.check_states(initial_state, dtype, S="NGKV", n="NGK", m="NG")
    N, G, K, V = (shapes.sizes[letter] for letter in "NGKV")
    scale = K**-0.5 if scale is None else scale
    # Gates are computed in float64 in both forms: m grows to hundreds, and differences of it are exponentiated.
    i, f = input_gate.to(torch.float64), F.logsigmoid(forget_gate.to(torch.float64))
    if initial_state is None:
        zeros = q.new_zeros(N, G, K, V + 1, dtype=dtype)
        initial_state = zeros[..., :-1], zeros[..., -1], zeros.new_full((N, G), INITIAL_STABILIZER)
    S, n, m = initial_state
    m = m.detach()
    if form == "step":
        o, state = _mlstm_step(q.to(dtype) * scale, k.to(dtype), v.to(dtype), i, f, (S, n, m))
        return o.to(q.dtype), state
    # n is one more value channel of ones
    inputs = Inputs(q, k, v, f, None, torch.cat([S, n.unsqueeze(-1)], -1), i, m)
    found = _mlstm_by_fla(backend, inputs, scale, cu_seqlens) if fla.use_fla(backend, q) else None
    o, final_state, exact_m = found or chunked_recurrence(inputs, scale, chunk_size, cu_seqlens, eps=0.0)
    assert exact_m is not None
    # The final state is relative to m as rounded to its dtype, so that the next call continues from exactly this m.
    m = exact_m.to(dtype)
    final_state = final_state * (exact_m - m.double()).to(dtype).exp()[..., None, None]
    return o, (final_state[..., :-1], final_state[..., -1], m)


def _mlstm_by_fla(
    backend: str | None, inputs: Inputs, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `chunked_recurrence`, with mLSTM's gates in float64; None: see `fla.run`."""
    q, k, v, f, _, state, i, initial_m = inputs
    assert f is not None
    assert i is not None
    assert initial_m is not None
    before, m, last_m = _stabilizers(f.detach(), i.detach(), initial_m.double(), cu_seqlens)
    # at most 0 after rounding too; nothing decays where nothing has been written; exp(MIN_DECAY) is 0 in float32
    decay = f + (before - m).minimum(-f.detach())
    decay = decay.masked_fill(before < INITIAL_STABILIZER / 2, 0.0).clamp_min(MIN_DECAY).float()
    keys = (k * (i - m).float().exp().unsqueeze(-1)).to(k.dtype)
    found = _reads_by_fla(backend, Inputs(q, keys, v, decay, None, state), scale, cu_seqlens)
    if found is None:
        return None
    floor = (-m).float().exp().repeat_interleave(inputs.queries, 2).unsqueeze(-1)
    reads = found[0].float()
    return (reads[..., :-1] / reads[..., -1:].abs().maximum(floor)).to(q.dtype), found[1], last_m


def _stabilizers(f: Tensor, i: Tensor, initial_m: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """m_{t-1} and m_t [B, T, G], and the last m [B or documents, G], in float64."""
    bounds = [0, f.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    all_m = []
    for (start, end), first in zip(itertools.pairwise(bounds), initial_m.split(f.shape[0]), strict=True):
        first, sums = first.clamp_min(INITIAL_STABILIZER).unsqueeze(1), f[:, start:end].cumsum(1)
        maxima = torch.cat([first, i[:, start:end] - sums], 1).cummax(1)[0]
        all_m.append(torch.cat([first, sums + maxima[:, 1:]], 1))
    before, m = (torch.cat(x, 1) for x in zip(*((x[:, :-1], x[:, 1:]) for x in all_m), strict=True))
    return before, m, torch.cat([x[:, -1] for x in all_m])


def _mlstm_step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState) -> tuple[Tensor, MLSTMState]:
    S, n, m = state
    queries = Inputs(q, k, v).queries
    q, outputs = q.unflatten(2, (k.shape[2], queries)), []
    for t in range(q.shape[1]):
        next_m = torch.maximum(f[:, t].detach() + m, i[:, t].detach()).clamp_min(INITIAL_STABILIZER).to(m.dtype)
        forget = (f[:, t] - (next_m.double() - m)).to(S.dtype).exp().unsqueeze(-1)
        write = (i[:, t] - next_m).to(S.dtype).exp().unsqueeze(-1) * k[:, t]
        m = next_m
        S = forget.unsqueeze(-1) * S + write.unsqueeze(-1) * v[:, t].unsqueeze(-2)
        n = forget * n + write
        size = (q[:, t] * n.unsqueeze(-2)).sum(-1, keepdim=True).abs()
        outputs.append((q[:, t] @ S) / size.maximum((-m).exp()[..., None, None]))
    o = torch.stack(outputs, 1).flatten(2, 3) if outputs else v.repeat_interleave(queries, 2)
    return o, (S, n, m)


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
    shapes = check_recurrence(Inputs(q, k, k))
    shapes.check("input_gate", input_gate, "BTG")
    shapes.check("forget_gate", forget_gate, "BTG")
    queries = Inputs(q, k, k).queries
    k, input_gate, forget_gate = (x.repeat_interleave(queries, 2) for x in (k, input_gate, forget_gate))
    first, end = check_rows(rows, q.shape[1])
    dtype, dtype_out, scale = compute_dtype(q), q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
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
