"""Text for training and evaluation: from sources to documents, and from documents to rows of token ids."""

from subquad.data.corpora import check_data, documents
from subquad.data.packing import PackedDataset, RowSlice, token_rows

__all__ = ["PackedDataset", "RowSlice", "check_data", "documents", "token_rows"]
