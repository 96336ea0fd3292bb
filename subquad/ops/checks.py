"""The tensors of a recurrence, and argument checks of the public operators.

A wrong type or dtype raises a `TypeError`, anything else a `ValueError`. The message names the argument, what it got
and what was expected. Checks that read values (a positive decay, document boundaries) run only on the CPU and outside
compilation, where they cause no synchronization and no graph break.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIMENSIONS = {"N": "B or documents", "P": "W - 1"}
"""What the less obvious letters of a shape mean."""


class Inputs(NamedTuple):
    """The tensors of a call: H query heads read G states. Only `stabilizer` has no gradient."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, G, K]
    v: Tensor  # [B, T, G, V]
    log_decay: Tensor | None = None  # [G], [B, T, G] or [B, T, G, K]
    beta: Tensor | None = None  # [B, T, G]
    initial_state: Tensor | None = None  # [B or documents, G, K, V], with a normalizer V + 1
    input_gate: Tensor | None = None  # [B, T, G], of mLSTM
    stabilizer: Tensor | None = None  # [B or documents, G], of mLSTM, before the first token

    @property
    def queries(self) -> int:
        """Query heads that read each state."""
        return self.q.shape[2] // max(1, self.k.shape[2])

    def expand(self) -> Inputs:
        """The same recurrence with as many equal states as query heads."""

        def repeat(name: str, x: Tensor) -> Tensor:
            axis = 1 if name in ("initial_state", "stabilizer") else min(2, x.dim() - 1)
            return x.repeat_interleave(self.queries, axis)

        named = self._asdict().items()
        changed = {n: repeat(n, x) for n, x in named if x is not None and n != "q" and self.queries != 1}
        return self._replace(**changed)


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


class Shapes:
    """Checks tensors. Shapes are strings with a letter for each dimension; equal letters stand for equal sizes."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.first: Tensor | None = None

    def check(self, name: str, x: object, *shapes: str, dtype: torch.dtype | None = None) -> None:
        """Raises unless `x` is a floating-point tensor of that dtype and one of the shapes, on the first's device."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
        if x.dtype not in DTYPES:
            expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise TypeError(f"{name}: got dtype {x.dtype}, expected one of {expected}")
        first = self.first = x if self.first is None else self.first
        if x.device != first.device:
            raise ValueError(
                f"{name}: got a tensor on {x.device}, expected {first.device}, the device of the first argument"
            )
        if dtype is not None and x.dtype != dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {dtype} for a first argument in {first.dtype}")
        for shape in shapes:
            if len(shape) == x.dim():
                for letter, size in zip(shape, x.shape, strict=True):
                    if self.sizes.setdefault(letter, size) != size:
                        break
                else:
                    return

        def written(names: Mapping[str, object], unknown: str | None = None) -> str:
            each = (", ".join(str(names.get(letter, unknown or letter)) for letter in shape) for shape in shapes)
            return " or ".join(f"[{dims}]" for dims in each)

        expected = f"{written(DIMENSIONS)} = {written(self.sizes, 'any')}"
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected {expected}")

    def check_states(self, states: Any, dtype: torch.dtype, **shapes: str) -> None:
        """Raises unless `states`, an initial state, is None or a tuple of tensors with these names and shapes."""
        if states is None:
            return
        expected = "(" + ", ".join(shapes) + ")"
        if not isinstance(states, (tuple, list)):
            raise TypeError(f"initial_state: got {type(states).__name__}, expected the tuple {expected}")
        if len(states) != len(shapes):
            raise ValueError(f"initial_state: got {len(states)} tensors, expected the {len(shapes)} of {expected}")
        for state, (name, shape) in zip(states, shapes.items(), strict=True):
            self.check(f"initial_state {name}", state, shape, dtype=dtype)


def check_recurrence(
    inputs: Inputs, chunk_size: int | None = None, cu_seqlens: Tensor | None = None, form: str = "chunk"
) -> Shapes:
    """Raises unless the arguments of a recurrence, but its gates of mLSTM, are valid. Returns the sizes found."""
    shapes, (q, k, v, log_decay, beta, initial_state, *_) = Shapes(), inputs
    shapes.check("q", q, "BTHK")
    shapes.check("k", k, "BTGK", dtype=q.dtype)
    if q.shape[2] % max(1, k.shape[2]):
        raise ValueError(f"q: got {q.shape[2]} heads, expected a multiple of the {k.shape[2]} heads of k")
    shapes.check("v", v, "BTGV", dtype=q.dtype)
    if log_decay is not None:
        shapes.check("log_decay", log_decay, "G", "BTG", "BTGK")
        if can_read_values(log_decay) and log_decay.numel() and (largest := log_decay.amax().item()) > 0:
            raise ValueError(f"log_decay: got {largest:.6g}, expected at most 0, the log of a decay in [0, 1]")
    if beta is not None:
        shapes.check("beta", beta, "BTG")
    if chunk_size is not None:
        if type(chunk_size) is not int:
            raise TypeError(f"chunk_size: got {type(chunk_size).__name__}, expected an int or None")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: got {chunk_size}, expected at least 1")
    if form not in ("chunk", "step"):
        raise ValueError(f'form: got {form!r}, expected "chunk" or "step"')
    if form == "step" and cu_seqlens is not None:
        raise ValueError('cu_seqlens: got boundaries with form="step", expected None; documents need form="chunk"')
    shapes.sizes["N"] = check_cu_seqlens(q, cu_seqlens)
    if initial_state is not None:
        shapes.check("initial_state", initial_state, "NGKV", dtype=compute_dtype(q))
    return shapes


def check_cu_seqlens(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Returns the number of documents, each with its own state; without `cu_seqlens` the batch size of x."""
    if cu_seqlens is None:
        return x.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: got {type(cu_seqlens).__name__}, expected an integer torch.Tensor")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}, expected [N + 1] for N >= 1 documents")
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens: got a batch of {x.shape[0]}, expected documents packed into a batch of 1")
    if can_read_values(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != x.shape[1] or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"cu_seqlens: got {bounds}, expected boundaries that rise from 0 to T = {x.shape[1]}")
    return cu_seqlens.numel() - 1


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
