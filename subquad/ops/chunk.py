"""The chunk form: parallel inside a chunk, a scan over the state between chunks; O(T), training and prefill.

The mathematics and its backward pass are in `engine`, the walk over the sequence in `segments`.
"""

from __future__ import annotations

from torch import Tensor

from subquad.ops import checks, fla
from subquad.ops.engine.autograd import Inputs, run
from subquad.ops.engine.segments import VarlenPadding


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
    """What `step` computes, in parallel over the tokens of a chunk: training and prefill.

    Args:
        q, k, v, log_decay, beta, initial_state, scale: as in `step`.
        chunk_size: tokens in a chunk, rounded up to a power of two, at least 16; the result does not depend on it.
        cu_seqlens: [N + 1] boundaries of N documents packed into a batch of one; each starts from its own state.
        backend: "torch", "fla", or None to let the device decide: see `fla`.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [B, H, K, V] ([N, H, K, V] with `cu_seqlens`).

    Raises:
        TypeError, ValueError: as `step`; boundaries that do not rise from 0 to T.
    """
    checks.check_recurrence(q, k, v, log_decay, beta, initial_state, chunk_size, cu_seqlens)
    if fla.wanted(backend, q):
        by_kernel = fla.run(
            "chunk",
            q,
            k,
            v,
            log_decay,
            beta,
            initial_state,
            q.shape[-1] ** -0.5 if scale is None else scale,
            cu_seqlens,
        )
        if by_kernel is not None:
            return by_kernel
    return chunk_packed(q, k, v, log_decay, beta, initial_state, scale, chunk_size, cu_seqlens, None)


def chunk_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float | None,
    chunk_size: int | None,
    cu_seqlens: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """`chunk` with its arguments checked; with `eps` (a normaliser) the states have one more value channel."""
    B, T, H, K = q.shape
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(B, T, H)
    packing = VarlenPadding(q, v, chunk_size, cu_seqlens)
    q, k, v = packing.pack(q), packing.pack(k), packing.pack(v)
    log_decay = None if log_decay is None else packing.pack(log_decay)
    beta = None if beta is None else packing.pack(beta)
    layout = packing.layout
    if initial_state is not None:
        initial_state = initial_state.reshape(layout.sequences, layout.BH, K, -1)
    inputs = Inputs(q, k, v, log_decay, beta, None, initial_state)
    o, final = run(inputs, layout, K**-0.5 if scale is None else scale, eps)
    return packing.unpack(o), final.unflatten(1, (-1, H)).flatten(0, 1)
