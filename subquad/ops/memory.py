"""Scratch memory that is used again: fresh memory costs a page fault for every 4 KB. Knows nothing of what it holds."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Workspace:
    """Named scratch buffers that live as long as their thread."""

    _pool = threading.local()

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.key = (like.device, dtype)
        self.buffers: dict = self._pool.__dict__.setdefault("buffers", {})
        self.views: dict = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A buffer of this shape with anything in it, one a name and shape."""
        if (view := self.views.get((name, shape))) is not None:
            return view
        size = math.prod(shape)
        buffer = self.buffers.get((name, *self.key))
        if buffer is None or buffer.numel() < size:
            device, dtype = self.key
            buffer = self.buffers[(name, *self.key)] = torch.empty(size, dtype=dtype, device=device)
        view = self.views[(name, shape)] = buffer[:size].view(shape)
        return view

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of x y over the last axis; `vecdot` would write the products into fresh memory."""
        return torch.mul(x, y, out=self("products of a dot", *x.shape)).sum(-1)
