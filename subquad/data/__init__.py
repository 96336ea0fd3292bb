"""Text for training and evaluation: from sources to documents, and from documents to rows of token ids."""

from subquad.data.corpora import check_data, documents
from subquad.data.packing import PackedDataset, spread_rows, token_rows
from subquad.data.streaming import StreamedDataset, StreamedRows

__all__ = ["PackedDataset", "StreamedDataset", "StreamedRows", "check_data", "documents", "spread_rows", "token_rows"]
