"""Reused scratch memory: a new allocation costs a page fault for every 4 KB."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 2**25
"""What a thread keeps for its next call, for each device and dtype. Segments keep the buffers of nearly all calls below
this; those of a call that needs more are released when it ends."""
MAX_VIEWS = 1000  # sequences of many lengths would otherwise leave some views of each length


class Workspace:
    """Named scratch buffers of one device and dtype, and views of them, for one call after another of a thread."""

    _pool = threading.local()

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.key = (like.device, dtype)
        if torch.compiler.is_compiling():  # a graph would treat a buffer left by an earlier call as its input
            self.buffers: dict[str, Tensor] = {}
            self.views: dict[Hashable, Any] = {}
            return
        pools = self._pool.__dict__.setdefault("pools", {})
        # tensors that are made in inference mode cannot be written outside of it
        self.buffers, self.views = pools.setdefault((*self.key, torch.is_inference_mode_enabled()), ({}, {}))

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Returns the uninitialized buffer of this name in this shape. Equal names share memory."""
        if (view := self.views.get((name, shape))) is not None:
            return view
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            device, dtype = self.key
            self.views.clear()  # some are views of the buffer that this one replaces
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype, device=device)
        view = self.views[(name, shape)] = buffer[:size].view(shape)
        return view

    def release(self) -> None:
        """Ends a call: the buffers are kept for the next one if they have at most `KEPT_BYTES`."""
        if torch.compiler.is_compiling():  # nothing is kept, and sizes may be symbolic
            return
        if sum(buffer.nbytes for buffer in self.buffers.values()) > KEPT_BYTES:
            self.views.clear()
            self.buffers.clear()

    def cached_view(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns what `make` derives from buffers, cached until a buffer is replaced. Creating a view costs as much
        as a small operation."""
        if (made := self.views.get(key)) is not None:
            return made
        if len(self.views) >= MAX_VIEWS:
            self.views.clear()
        make()  # lets the buffers grow first: a view of a buffer that grows later would be stale
        made = self.views[key] = make()
        return made

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of x * y over the last axis; `vecdot` would write the products into new memory."""
        return torch.mul(x, y, out=self("products of a dot", *x.shape)).sum(-1)
