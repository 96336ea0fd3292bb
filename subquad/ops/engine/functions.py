"""Base classes of the autograd functions: they support `torch.func` and the first derivative only.

Under `torch.func` a backward pass receives wrapped tensors, which must not be written into scratch memory. A backward
pass that is an autograd function itself (`OnceDifferentiable`) receives plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class VmapByLoopFunction(torch.autograd.Function):
    """Runs `vmap` as a loop over calls."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> tuple[tuple, tuple]:
        def nth(x: Any, dim: int | None, i: int) -> Any:
            return x if dim is None else x.select(dim, i)

        calls = [cls.apply(*(nth(x, d, i) for x, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        outputs = tuple(None if xs[0] is None else torch.stack(xs) for xs in zip(*calls, strict=True))
        return outputs, tuple(None if x is None else 0 for x in outputs)


class OnceDifferentiable(VmapByLoopFunction):
    """A backward pass that raises when it is differentiated."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
        raise RuntimeError(
            "subquad.ops: chunk forms and short_conv have no second derivative; `step` and `matrix`, plain PyTorch, do"
        )
