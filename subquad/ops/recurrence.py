"""The recurrence, one token after the other: how a student decodes, and the definition of every other form.

Per head, with a state S of shape [K, V] and the log decay g_t <= 0 (design: one recurrence):

    S~_t = Diag(exp(g_t)) S_{t-1}
    S_t  = S~_t + k_t v_t^T                              additive, or with beta
    S_t  = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T        the delta rule
    o_t  = scale S_t^T q_t

Run in float64 this file is what the tests hold everything else against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import checks, fla


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence token by token; time and memory of one token do not depend on how many came before.

    Args:
        q, k: [B, T, H, K]; bfloat16 and float16 are computed in float32.
        v: [B, T, H, V].
        log_decay: [H] (fixed), [B, T, H] (scalar) or [B, T, H, K] (per channel), never positive; None is no decay.
        beta: [B, T, H], the write strength; giving it switches the delta rule on.
        initial_state: [B, H, K, V] in float32 (float64 for float64 inputs); None is zeros.
        scale: of the output; K ** -0.5 if None.
        backend: "torch", "fla", or None to let the device decide: see `fla`.
        inplace: write the new state over `initial_state`; without gradients only.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [B, H, K, V].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a positive log decay.
    """
    checks.check_recurrence(q, k, v, log_decay, beta, initial_state)
    if inplace:
        checks.check_inplace(initial_state, (q, k, v, log_decay, beta))
    B, T, H, K = q.shape
    V = v.shape[-1]
    dtype, scale = checks.compute_dtype(q), K**-0.5 if scale is None else scale
    if T == 0:
        return v.clone(), q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state
    if fla.wanted(backend, q):
        by_kernel = fla.run("step", q, k, v, log_decay, beta, initial_state, scale)
        if by_kernel is not None:
            o, state = by_kernel
            return (o, initial_state.copy_(state)) if inplace and initial_state is not None else by_kernel
    S = q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state
    rows, cols, writes = (q.to(dtype) * scale).unsqueeze(-2), k.to(dtype).unsqueeze(-1), v.to(dtype).unsqueeze(-2)
    decay = None if log_decay is None else decay_per_step(log_decay.to(dtype), B, T).exp().unsqueeze(-1)
    strength = None if beta is None else beta.to(dtype)[..., None, None]
    tensors = (q, k, v, log_decay, beta, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        outputs, S = _differentiable(rows, cols, writes, decay, strength, S)
    else:
        outputs, S = _in_place(
            rows, cols, writes, decay, strength, S if inplace or initial_state is None else S.clone()
        )
    # [B, H, 1, V] each: with the axes of time and heads exchanged this is [B, 1, H, V], without a copy for one token.
    o = torch.cat(outputs, 2).transpose(1, 2) if len(outputs) != 1 else outputs[0].transpose(1, 2)
    return o.to(q.dtype), S


def _differentiable(
    rows: Tensor, cols: Tensor, writes: Tensor, decay: Tensor | None, strength: Tensor | None, S: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The definition. Rows [B, T, H, 1, K], columns [B, T, H, K, 1], writes [B, T, H, 1, V]; outputs [B, H, 1, V]."""
    outputs = []
    for t in range(rows.shape[1]):
        if decay is not None:
            S = S * decay[:, t]
        write = writes[:, t]
        if strength is not None:
            write = strength[:, t] * (write - cols[:, t].mT @ S)
        S = S + cols[:, t] * write
        outputs.append(rows[:, t] @ S)
    return outputs, S


def _in_place(
    rows: Tensor, cols: Tensor, writes: Tensor, decay: Tensor | None, strength: Tensor | None, S: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The same on the memory of S: decoding is bound by launches, and by reading S."""
    outputs = []
    nothing = [None] * rows.shape[1]
    decays = nothing if decay is None else decay.unbind(1)
    strengths = nothing if strength is None else strength.unbind(1)
    for row, col, write, d, b in zip(rows.unbind(1), cols.unbind(1), writes.unbind(1), decays, strengths, strict=True):
        if d is not None:
            S.mul_(d)
        if b is not None:
            write = (write - col.mT @ S).mul_(b)
        S.addcmul_(col, write)
        outputs.append(row @ S)
    return outputs, S


def decay_per_step(log_decay: Tensor, B: int, T: int) -> Tensor:
    """`log_decay` of any kind as [B, T, H, 1] or [B, T, H, K]."""
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(B, T, -1)
    return log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
