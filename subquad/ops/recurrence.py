"""The recurrence token by token: the definition of all other forms, and how a student decodes.

Per head, with a state S of shape [K, V] and the log decay g_t <= 0:

    S~_t = Diag(exp(g_t)) S_{t-1}
    S_t  = S~_t + k_t v_t^T                              additive, or with beta
    S_t  = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T        the delta rule
    o_t  = scale S_t^T q_t

In float64 it is the reference of all tests.
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
    """Runs the recurrence token by token. Time and memory of a token do not depend on the number of tokens before it.

    Args:
        q, k: [B, T, H, K]; bfloat16 and float16 are computed in float32.
        v: [B, T, H, V].
        log_decay: [H] (fixed), [B, T, H] (scalar) or [B, T, H, K] (per channel), at most 0; None is no decay.
        beta: [B, T, H], the step size of the delta rule; None is the additive update.
        initial_state: [B, H, K, V] in float32 (float64 for float64 inputs); None is zeros.
        scale: of the output; None is K ** -0.5.
        backend: "torch", "fla", or None to choose by device, see `fla`.
        inplace: write the final state into `initial_state`; only without gradients.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [B, H, K, V].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a positive log decay.
    """
    checks.check_recurrence(q, k, v, log_decay, beta, initial_state)
    if inplace:
        checks.check_inplace(initial_state, (q, k, v, log_decay, beta))
    B, T, H, K = q.shape
    V = v.shape[-1]
    dtype, scale = checks.compute_dtype(q), K**-0.5 if scale is None else scale
    if T == 0:
        return v.clone(), q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state
    if fla.use_fla(backend, q):
        results = fla.run_kernel("step", q, k, v, log_decay, beta, initial_state, scale)
        if results is not None:
            o, state = results
            return (o, initial_state.copy_(state)) if inplace and initial_state is not None else results
    S = q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state
    queries, keys, values = (q.to(dtype) * scale).unsqueeze(-2), k.to(dtype).unsqueeze(-1), v.to(dtype).unsqueeze(-2)
    decay = None if log_decay is None else expand_log_decay(log_decay.to(dtype), B, T).exp().unsqueeze(-1)
    strength = None if beta is None else beta.to(dtype)[..., None, None]
    if checks.any_requires_grad(q, k, v, log_decay, beta, initial_state):
        outputs, S = _steps_out_of_place(queries, keys, values, decay, strength, S)
    else:
        S = S if inplace or initial_state is None else S.clone()
        outputs, S = _steps_in_place(queries, keys, values, decay, strength, S)
    # [B, H, 1, V] each; transposing one token to [B, 1, H, V] takes no copy.
    o = torch.cat(outputs, 2).transpose(1, 2) if len(outputs) != 1 else outputs[0].transpose(1, 2)
    return o.to(q.dtype), S


def _steps_out_of_place(
    queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor | None, beta: Tensor | None, S: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The definition. Queries [B, T, H, 1, K], keys [B, T, H, K, 1], values [B, T, H, 1, V]; outputs [B, H, 1, V]."""
    outputs = []
    for t in range(queries.shape[1]):
        if decay is not None:
            S = S * decay[:, t]
        value = values[:, t]
        if beta is not None:
            value = beta[:, t] * (value - keys[:, t].mT @ S)
        S = S + keys[:, t] * value
        outputs.append(queries[:, t] @ S)
    return outputs, S


def _steps_in_place(
    queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor | None, beta: Tensor | None, S: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The same in the memory of S, since dispatch and reading S bound the speed of decoding."""
    outputs = []
    none = [None] * queries.shape[1]
    decays = none if decay is None else decay.unbind(1)
    betas = none if beta is None else beta.unbind(1)
    for q, k, v, d, b in zip(queries.unbind(1), keys.unbind(1), values.unbind(1), decays, betas, strict=True):
        if d is not None:
            S.mul_(d)
        if b is not None:
            v = (v - k.mT @ S).mul_(b)
        S.addcmul_(k, v)
        outputs.append(q @ S)
    return outputs, S


def expand_log_decay(log_decay: Tensor, B: int, T: int) -> Tensor:
    """A fixed, scalar or per-channel log decay as [B, T, H, 1] or [B, T, H, K]."""
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(B, T, -1)
    return log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
