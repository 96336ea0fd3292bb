"""The chunk form: parallel within chunks, a scan over states between them. Linear in T; for training and prefill.

`engine.autograd` has the equations and the backward pass, `engine.segments` the order of computation.
"""

from __future__ import annotations

from torch import Tensor

from subquad.ops import checks, fla
from subquad.ops.engine.autograd import ChunkInputs, chunked_recurrence
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
    """Computes `step` in parallel over the tokens of each chunk.

    Args:
        q, k, v, log_decay, beta, initial_state, scale: as in `step`.
        chunk_size: tokens in a chunk, rounded up to a power of two, at least 16; the result does not depend on it.
        cu_seqlens: [N + 1] boundaries of N documents packed into a batch of one; each starts from its own state.
        backend: "torch", "fla", or None to choose by device, see `fla`.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [B, H, K, V] ([N, H, K, V] with `cu_seqlens`).

    Raises:
        TypeError, ValueError: as `step`; boundaries that do not rise from 0 to T.
    """
    checks.check_recurrence(q, k, v, log_decay, beta, initial_state, chunk_size, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if fla.use_fla(backend, q):
        results = fla.run_kernel("chunk", q, k, v, log_decay, beta, initial_state, scale, cu_seqlens)
        if results is not None:
            return results
    return chunk_unchecked(q, k, v, log_decay, beta, initial_state, scale, chunk_size, cu_seqlens, None)


def chunk_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int | None,
    cu_seqlens: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """`chunk` in PyTorch on checked arguments; with `eps` (a normalizer) the states have one more value channel."""
    B, T, H, K = q.shape
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(B, T, H)
    padding = VarlenPadding(q, v, chunk_size, cu_seqlens)
    q, k, v = padding.pad(q), padding.pad(k), padding.pad(v)
    log_decay = None if log_decay is None else padding.pad(log_decay)
    beta = None if beta is None else padding.pad(beta)
    layout = padding.layout
    if initial_state is not None:
        initial_state = initial_state.reshape(layout.num_documents, layout.BH, K, -1)
    inputs = ChunkInputs(q, k, v, log_decay, beta, None, initial_state)
    o, final_state = chunked_recurrence(inputs, layout, scale, eps)
    return padding.unpad(o), final_state.unflatten(1, (-1, H)).flatten(0, 1)
