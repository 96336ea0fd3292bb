"""The chunk form: parallel within chunks, a scan over states between them. Linear in T; for training and prefill.

`engine.autograd` has the equations and the backward pass, `engine.segments` the order of computation.
"""

from __future__ import annotations

from torch import Tensor

from subquad.ops import checks, fla
from subquad.ops.engine.autograd import chunked_recurrence


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
    inputs = checks.Inputs(q, k, v, log_decay, beta, initial_state)
    checks.check_recurrence(inputs, chunk_size, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if (results := fla.run(backend, "chunk", inputs, scale, cu_seqlens)) is not None:
        return results
    o, final_state, _ = chunked_recurrence(inputs, scale, chunk_size, cu_seqlens)
    return o, final_state
