"""Text for training and measurement: sources to documents, documents to rows of tokens."""

from subquad.data.corpora import check_corpus, documents
from subquad.data.packing import RowRange, TokenRows, token_rows

__all__ = ["RowRange", "TokenRows", "check_corpus", "documents", "token_rows"]
