"""Rows of several documents, joined into one row without padding for ops that take `cu_seqlens`."""

import torch
from torch import Tensor


class PackedDocuments:
    """Where the documents of `doc_ids` (integers `[B, T]`, 0 at padding) lie.

    The N tokens of all documents form one row. A document ends where the id or the row changes. A row without a
    document contributes its first token, so that every row has a state.
    """

    cu_seqlens: Tensor
    """Boundaries of the documents in the packed row, `[documents + 1]`, on the CPU, where each op reads them."""
    last_documents: Tensor
    """Index of each row's last document, `[B]`."""

    def __init__(self, doc_ids: Tensor):
        self.shape = doc_ids.shape
        real = doc_ids != 0
        real[:, 0] |= ~real.any(1)
        self.indices = real.flatten().nonzero().flatten()
        ids, rows = doc_ids.flatten()[self.indices], self.indices // self.shape[1]
        starts = torch.ones_like(self.indices, dtype=torch.bool)
        starts[1:] = (ids[1:] != ids[:-1]) | (rows[1:] != rows[:-1])
        offsets = starts.nonzero().flatten().cpu()
        self.cu_seqlens = torch.cat([offsets, offsets.new_tensor([len(self.indices)])])
        self.last_documents = starts.cumsum(0)[real.sum(1).cumsum(0) - 1] - 1

    def pack(self, x: Tensor) -> Tensor:
        """`[B, T, D]` or `[1, T, D]` to `[1, N, D]`."""
        B, T = self.shape
        return x.expand(B, T, -1).reshape(1, B * T, -1)[:, self.indices]

    def unpack(self, y: Tensor) -> Tensor:
        """`[1, N, D]` to `[B, T, D]`, zero at padding."""
        B, T = self.shape
        return y.new_zeros(B * T, y.shape[-1]).index_copy(0, self.indices, y[0]).view(B, T, -1)
