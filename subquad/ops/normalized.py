"""Linear attention with its normaliser (arXiv 2006.16236, equation 12, with a decay if one is given):

    o_t = scale S_t^T q_t / (scale z_t^T q_t + eps)          z_t = exp(g_t) z_{t-1} + k_t

The normaliser's state z is the state of one more value channel that is always one: the ops of this file are `chunk`,
`step` and `matrix` with v widened by it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.chunk import chunk_packed
from subquad.ops.matrix import matrix
from subquad.ops.recurrence import step

State = tuple[Tensor, Tensor]


def normalized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: State | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    form: str = "chunk",
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Normalised linear attention; q and k come with their feature map applied and should not be negative.

    Args:
        q, k, v, log_decay, scale: as in `step`; chunk_size, cu_seqlens: as in `chunk`.
        initial_state: (S [B, H, K, V], z [B, H, K]) in float32 (float64 for float64 inputs); None is zeros.
        eps: added to the normaliser.
        form: "chunk" (training, prefill) or "step" (token by token).

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state (S, z).
    """
    check_normalized(q, k, v, log_decay, initial_state, form, chunk_size, cu_seqlens)
    state = None
    if initial_state is not None:
        S, z = initial_state
        state = torch.cat([S, z.unsqueeze(-1)], -1)
    if form == "chunk":
        o, state = chunk_packed(q, k, v, log_decay, None, state, scale, chunk_size, cu_seqlens, eps)
        return o, (state[..., :-1], state[..., -1])
    dtype = checks.compute_dtype(q)
    wide = F.pad(v.to(dtype), (0, 1), value=1.0)
    o, state = step(q.to(dtype), k.to(dtype), wide, log_decay, None, state, scale)
    o = o[..., :-1] / (o[..., -1:] + eps)
    return o.to(q.dtype), (state[..., :-1], state[..., -1])


def normalized_matrix(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    rows: slice | None = None,
) -> Tensor:
    """The mixing matrix M [B, H, T, T] with o = M v, the normaliser included; arguments as in `normalized`.

    rows: only these rows of M, [B, H, len(rows), T]; without a step.
    """
    dtype = checks.compute_dtype(q)
    M = matrix(q.to(dtype), k.to(dtype), log_decay, scale=scale, rows=rows)
    return (M / (M.sum(-1, keepdim=True) + eps)).to(q.dtype)


def check_normalized(q, k, v, log_decay, initial_state, form, chunk_size, cu_seqlens) -> None:
    checks.check_recurrence(q, k, v, log_decay, None, None, chunk_size, cu_seqlens)
    checks.check_form(form, cu_seqlens)
    if initial_state is None:
        return
    checks.check_tuple("initial_state", initial_state, ("S", "z"))
    _, _, H, K = q.shape
    V = v.shape[-1]
    sequences = checks.check_cu_seqlens(q, cu_seqlens)
    S, z = initial_state
    checks.check_state("initial_state S", q, S, (sequences, H, K, V), axes="[B or documents, H, K, V]")
    checks.check_state("initial_state z", q, z, (sequences, H, K), axes="[B or documents, H, K]")
