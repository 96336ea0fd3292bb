"""The recurrence in two forms: `step`, token by token, defines all others and decodes; `chunk`, parallel within chunks
with a scan over states between them, is linear in T and computes training and prefill.

Per state S, of shape [K, V], with the log decay g_t <= 0:

    S~_t = Diag(exp(g_t)) S_{t-1}
    S_t  = S~_t + k_t v_t^T                              additive, or with beta
    S_t  = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T        the delta rule
    o_t  = scale S_t^T q_t                               for each query head that reads S

In float64 `step` is the reference of all tests. `engine.autograd` has the equations of `chunk` and its backward pass,
`engine.segments` the order of computation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops import checks, fla
from subquad.ops.engine.autograd import chunked_recurrence


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
        q: [B, T, H, K]; bfloat16 and float16 are computed in float32.
        k: [B, T, G, K], for G states; H is a multiple of G, and query head h reads state h // (H / G).
        v: [B, T, G, V].
        log_decay: [G] (fixed), [B, T, G] (scalar) or [B, T, G, K] (per channel), at most 0; None is no decay.
        beta: [B, T, G], the step size of the delta rule; None is the additive update.
        initial_state: [B, G, K, V] in float32 (float64 for float64 inputs); None is zeros.
        scale: of the output; None is K ** -0.5.
        backend: "torch", "fla", or None to choose by device, see `fla`.
        inplace: write the final state into `initial_state`; only without gradients.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [B, G, K, V].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a positive log decay.
    """
    inputs = checks.Inputs(q, k, v, log_decay, beta, initial_state)
    checks.check_recurrence(inputs)
    if inplace and initial_state is None:
        raise ValueError("inplace: got True without initial_state, expected a state to write into")
    if inplace and checks.any_requires_grad(*inputs):
        raise ValueError("inplace: got tensors that require gradients, expected torch.no_grad() or detached ones")
    return unchecked_step(inputs, scale, backend, inplace)


def unchecked_step(
    inputs: checks.Inputs, scale: float | None = None, backend: str | None = None, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """`step` of arguments that are known to be valid: without checks, some of which read the values of tensors."""
    q, v, initial_state = inputs.q, inputs.v, inputs.initial_state
    B, T, _, K = q.shape
    scale = K**-0.5 if scale is None else scale
    if initial_state is None:
        S = q.new_zeros(B, v.shape[2], K, v.shape[-1], dtype=checks.compute_dtype(q))
    else:
        S = initial_state
    if T == 0:
        return v.repeat_interleave(inputs.queries, 2), S
    if (results := fla.run(backend, "step", inputs, scale)) is not None:
        o, state = results
        return (o, initial_state.copy_(state)) if inplace and initial_state is not None else results
    differentiable = checks.any_requires_grad(*inputs)
    if T == 1 and not inplace:
        return _one_token(inputs, S, scale, differentiable)
    if not (differentiable or inplace or initial_state is None):
        S = S.clone()
    return _token_by_token(inputs, S, scale, differentiable)


def _one_token(inputs: checks.Inputs, S: Tensor, scale: float, differentiable: bool) -> tuple[Tensor, Tensor]:
    """`step` of one token from the state `S`, in few operations, whose number bounds the speed of decoding. All states
    of the batch are one dimension."""
    q, k, v, log_decay, beta = inputs[:5]
    B, _, G, K = k.shape
    dtype, V, N = checks.compute_dtype(q), v.shape[-1], B * G
    key, value = k.to(dtype).reshape(N, K, 1), v.to(dtype).reshape(N, 1, V)
    before = S = S.reshape(N, K, V)
    if log_decay is not None:
        decay = log_decay.to(dtype).exp()
        decay = decay.expand(B, G) if decay.dim() == 1 else decay
        S = S * decay.reshape(N, -1, 1)
    if beta is not None:
        value = (value - torch.bmm(key.mT, S)) * beta.to(dtype).reshape(N, 1, 1)
    S = torch.addcmul(S, key, value) if differentiable or S is before else S.addcmul_(key, value)
    o = torch.bmm((q.to(dtype) * scale).reshape(N, -1, K), S)
    return o.view(B, 1, -1, V).to(q.dtype), S.view(B, G, K, V)


def _token_by_token(inputs: checks.Inputs, S: Tensor, scale: float, differentiable: bool) -> tuple[Tensor, Tensor]:
    """`step` from the state `S`, which is written into unless the computation is differentiable."""
    q, k, v, log_decay, beta = inputs[:5]
    B, T, G, K = k.shape
    dtype, none = checks.compute_dtype(q), [None] * T
    queries = (q.to(dtype) * scale).view(B, T, G, -1, K).unbind(1)
    keys, values = k.to(dtype).unsqueeze(-1).unbind(1), v.to(dtype).unsqueeze(-2).unbind(1)
    if log_decay is not None:  # as [B, T, G, 1] or [B, T, G, K]
        log_decay = log_decay.to(dtype).expand(B, T, G) if log_decay.dim() == 1 else log_decay.to(dtype)
        log_decay = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
    decays = none if log_decay is None else log_decay.exp().unsqueeze(-1).unbind(1)
    betas = none if beta is None else beta.to(dtype)[..., None, None].unbind(1)
    outputs = []
    for query, key, value, decay, strength in zip(queries, keys, values, decays, betas, strict=True):
        if differentiable:
            S = S if decay is None else S * decay
            value = value if strength is None else strength * (value - key.mT @ S)
            S = S + key * value
        else:  # in the memory of S, since dispatch and reading S bound the speed of decoding
            S = S if decay is None else S.mul_(decay)
            value = value if strength is None else (value - key.mT @ S).mul_(strength)
            S.addcmul_(key, value)
        outputs.append(query @ S)
    # [B, G, H / G, V] each; one token takes no copy.
    o = torch.stack(outputs, 1) if T > 1 else outputs[0]
    return o.view(B, T, -1, v.shape[-1]).to(q.dtype), S


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `step` in parallel over the tokens of each chunk.

    Args:
        q, k, v, log_decay, beta, initial_state, scale: as in `step`.
        chunk_size: tokens in a chunk, rounded up to a power of two, at least 16; the result does not depend on it.
        cu_seqlens: [N + 1] boundaries of N documents packed into a batch of one; each starts from its own state.
        backend: "torch", "fla", or None to choose by device, see `fla`.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [B, G, K, V] ([N, G, K, V] with `cu_seqlens`).

    Raises:
        TypeError, ValueError: as `step`; boundaries that do not rise from 0 to T.
    """
    inputs = checks.Inputs(q, k, v, log_decay, beta, initial_state)
    checks.check_recurrence(inputs, chunk_size, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (results := fla.run(backend, "chunk", inputs, scale, cu_seqlens)) is not None:
        return results
    o, final_state, _ = chunked_recurrence(inputs, scale, chunk_size, cu_seqlens)
    return o, final_state
