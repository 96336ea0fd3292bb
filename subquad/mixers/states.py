"""The dtype of recurrent states in a cache, between calls of an op, which computes in float32."""

import torch
from torch import Tensor

from subquad.ops.checks import compute_dtype

State = tuple[Tensor, ...]


def stored(state: State, dtype: str) -> State:
    """The op's state as a cache keeps it: with "bfloat16" its matrices `[B, G, K, V]` in it. Normalizers and
    stabilizers, vectors and numbers per state, stay in float32: an error in xLSTM's stabilizer is exponentiated."""
    return tuple(x.to(torch.bfloat16) if x.dim() == 4 else x for x in state) if dtype == "bfloat16" else state


def loaded(state: State | None, q: Tensor) -> State | None:
    """What `stored` returned, in the dtype in which the op computes for queries `q`."""
    return None if state is None else tuple(x.to(compute_dtype(q)) if x.dtype == torch.bfloat16 else x for x in state)
