"""Argument checks of the public operators.

A wrong type or dtype raises a `TypeError`, anything else a `ValueError`. The message names the argument, what it got
and what was expected. Checks that read values (a positive decay, document boundaries) run only on the CPU and outside
compilation, where they cause no synchronization and no graph break.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the computation and the state: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def can_read_values(x: Tensor) -> bool:
    """Whether values of `x` can be read: it is a CPU tensor, outside compilation, `vmap` and fake tensors."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is enabled and some tensor requires a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in x.shape) + "]"


def check_tensor(name: str, x: object, like: Tensor | None = None, same_dtype: bool = False) -> None:
    """Raises unless `x` is a floating-point tensor on the device of `like` and, with `same_dtype`, of its dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: got dtype {x.dtype}, expected one of {expected}")
    if like is not None and x.device != like.device:
        raise ValueError(
            f"{name}: got a tensor on {x.device}, expected {like.device}, the device of the first argument"
        )
    if like is not None and same_dtype and x.dtype != like.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {like.dtype}, the dtype of the first argument")


def check_shape(name: str, x: Tensor, *expected: Sequence[int], dims: str) -> None:
    """Raises ValueError unless the shape of `x` is one of `expected`; `dims` names its dimensions in the message."""
    if tuple(x.shape) not in {tuple(e) for e in expected}:
        shapes = " or ".join(str(list(e)) for e in expected)
        raise ValueError(f"{name}: got shape {_shape(x)}, expected {dims} = {shapes}")


def check_qk(q: Tensor, k: Tensor) -> None:
    check_tensor("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: got shape {_shape(q)}, expected 4 dimensions, [batch, time, heads, key size]")
    check_tensor("k", k, like=q, same_dtype=True)
    check_shape("k", k, q.shape, dims="the shape of q")


def check_v(q: Tensor, v: Tensor) -> None:
    check_tensor("v", v, like=q, same_dtype=True)
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        B, T, H, _ = q.shape
        raise ValueError(f"v: got shape {_shape(v)}, expected [B, T, H, V] = [{B}, {T}, {H}, any]")


def check_log_decay(q: Tensor, log_decay: Tensor | None) -> None:
    if log_decay is None:
        return
    B, T, H, K = q.shape
    check_tensor("log_decay", log_decay, like=q)
    check_shape("log_decay", log_decay, (H,), (B, T, H), (B, T, H, K), dims="[H] or [B, T, H] or [B, T, H, K]")
    if can_read_values(log_decay) and log_decay.numel() and (largest := log_decay.amax().item()) > 0:
        raise ValueError(f"log_decay: got {largest:.6g}, expected at most 0, the log of a decay in [0, 1]")


def check_gate(name: str, q: Tensor, gate: Tensor) -> None:
    B, T, H, _ = q.shape
    check_tensor(name, gate, like=q)
    check_shape(name, gate, (B, T, H), dims="[B, T, H]")


def check_state(name: str, q: Tensor, state: Tensor | None, expected: Sequence[int], dims: str) -> None:
    if state is None:
        return
    check_tensor(name, state, like=q)
    if state.dtype != compute_dtype(q):
        raise TypeError(f"{name}: got dtype {state.dtype}, expected {compute_dtype(q)}, the dtype of states")
    check_shape(name, state, expected, dims=dims)


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool)):
        raise TypeError(f"chunk_size: got {type(chunk_size).__name__}, expected an int or None")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")


def check_cu_seqlens(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Returns the number of documents, each with its own state; without `cu_seqlens` the batch size of x."""
    if cu_seqlens is None:
        return x.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: got {type(cu_seqlens).__name__}, expected an integer torch.Tensor")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: got shape {_shape(cu_seqlens)}, expected [N + 1] for N >= 1 documents")
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens: got a batch of {x.shape[0]}, expected documents packed into a batch of 1")
    if can_read_values(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != x.shape[1] or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens: got {bounds}, expected boundaries that rise from 0 to T = {x.shape[1]}")
    return cu_seqlens.numel() - 1


def check_form(form: str, cu_seqlens: Tensor | None) -> None:
    if form not in ("chunk", "step"):
        raise ValueError(f'form: got {form!r}, expected "chunk" or "step"')
    if form == "step" and cu_seqlens is not None:
        raise ValueError('cu_seqlens: got boundaries with form="step", expected None; documents need form="chunk"')


def check_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Raises unless all arguments of `step` and `chunk` are valid."""
    check_qk(q, k)
    check_v(q, v)
    check_log_decay(q, log_decay)
    if beta is not None:
        check_gate("beta", q, beta)
    check_chunk_size(chunk_size)
    documents = check_cu_seqlens(q, cu_seqlens)
    _, _, H, K = q.shape
    owner = "B" if cu_seqlens is None else "documents"
    check_state("initial_state", q, initial_state, (documents, H, K, v.shape[-1]), dims=f"[{owner}, H, K, V]")


def check_tuple(name: str, x: object, parts: Sequence[str]) -> None:
    """Raises unless `x` is a tuple with one element for each of `parts`."""
    expected = "(" + ", ".join(parts) + ")"
    if not isinstance(x, (tuple, list)):
        raise TypeError(f"{name}: got {type(x).__name__}, expected the tuple {expected}")
    if len(x) != len(parts):
        raise ValueError(f"{name}: got {len(x)} tensors, expected the {len(parts)} of {expected}")


def check_rows(rows: slice | None, T: int) -> tuple[int, int]:
    """Returns the first row and the end of `rows`; None is all T."""
    if rows is None:
        return 0, T
    if not isinstance(rows, slice):
        raise TypeError(f"rows: got {type(rows).__name__}, expected a slice")
    first, end, step = rows.indices(T)
    if step != 1:
        raise ValueError(f"rows: got a step of {step}, expected consecutive rows")
    return first, max(first, end)


def check_inplace(initial_state: Tensor | None, tensors: Sequence[Tensor | None]) -> None:
    if initial_state is None:
        raise ValueError("inplace: got True without initial_state, expected a state to write into")
    if any_requires_grad(*tensors, initial_state):
        raise ValueError("inplace: got tensors that require gradients, expected torch.no_grad() or detached ones")
