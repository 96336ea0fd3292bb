"""Text for training and measurement: sources to documents, documents to rows of tokens."""

from subquad.data.corpora import check_data, documents
from subquad.data.packing import PackedDataset, RowSlice, token_rows

__all__ = ["PackedDataset", "RowSlice", "check_data", "documents", "token_rows"]
