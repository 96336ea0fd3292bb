"""Scratch memory that is used again: fresh memory costs a page fault for every 4 KB. Knows nothing of what it holds."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

REMEMBERED = 1000  # views at most: sequences of all lengths would leave some of each


class Workspace:
    """Named scratch buffers, and views of them, that live as long as their thread."""

    _pool = threading.local()

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.key = (like.device, dtype)
        # A compiled graph would take what is left from another call for an input of its own.
        pools: dict = {} if torch.compiler.is_compiling() else self._pool.__dict__.setdefault("pools", {})
        self.buffers, self.views = pools.setdefault(self.key, ({}, {}))

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A buffer of this shape with anything in it, one a name and shape."""
        if (view := self.views.get((name, shape))) is not None:
            return view
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            device, dtype = self.key
            self.views.clear()  # those of the buffer that this one replaces are among them
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype, device=device)
        view = self.views[(name, shape)] = buffer[:size].view(shape)
        return view

    def cached_view(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` derives from buffers, made anew only when some buffer was replaced: a view costs as much as a
        small op."""
        if (made := self.views.get(key)) is not None:
            return made
        if len(self.views) >= REMEMBERED:
            self.views.clear()
        make()  # so that the buffers have their size: what is derived from one that grows later would be stale
        made = self.views[key] = make()
        return made

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of x y over the last axis; `vecdot` would write the products into fresh memory."""
        return torch.mul(x, y, out=self("products of a dot", *x.shape)).sum(-1)
