"""Linear attention with its normalizer (arXiv 2006.16236, equation 12), optionally with a decay:

    o_t = scale S_t^T q_t / (scale z_t^T q_t + eps)          z_t = exp(g_t) z_{t-1} + k_t

The normalizer's state z is the state of one more value channel of ones in `chunk`, `step` and `matrix`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.checks import Inputs, check_recurrence, compute_dtype
from subquad.ops.engine.autograd import chunked_recurrence
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
    """Normalized linear attention; q and k are feature maps and should not be negative.

    Args:
        q, k, v, log_decay, scale: as in `step`; chunk_size, cu_seqlens: as in `chunk`.
        initial_state: (S [B, H, K, V], z [B, H, K]) in float32 (float64 for float64 inputs); None is zeros.
        eps: added to the normalizer.
        form: "chunk" (training, prefill) or "step" (token by token).

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state (S, z).

    Raises:
        TypeError, ValueError: as `chunk`; an unknown form.
    """
    dtype = compute_dtype(q)
    shapes = check_recurrence(Inputs(q, k, v, log_decay), chunk_size, cu_seqlens, form)
    shapes.check_states(initial_state, dtype, S="NHKV", z="NHK")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = None
    if initial_state is not None:
        S, z = initial_state
        state = torch.cat([S, z.unsqueeze(-1)], -1)
    if form == "chunk":
        inputs = Inputs(q, k, v, log_decay, None, state)
        o, state, _ = chunked_recurrence(inputs, scale, chunk_size, cu_seqlens, eps)
    else:
        values = F.pad(v.to(dtype), (0, 1), value=1.0)
        o, state = step(q.to(dtype), k.to(dtype), values, log_decay, None, state, scale)
        o = (o[..., :-1] / (o[..., -1:] + eps)).to(q.dtype)
    return o, (state[..., :-1], state[..., -1])


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
