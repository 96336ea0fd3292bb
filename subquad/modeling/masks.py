"""Which token sees which, from our mask `[B, 1, 1, S]` (see `layers.py`): documents, places, windows, sinks."""

import torch
from torch import Tensor

DocIdsAndPositions = tuple[Tensor, Tensor]
"""Of each token, `[B, S]`: the number of its document, 0 at padding; its place in the document, -1 at padding."""


def doc_ids_and_positions(mask: Tensor | None, B: int, S: int, device: torch.device) -> DocIdsAndPositions:
    """From our mask `[B, 1, 1, S]`; None is one document without padding."""
    if mask is None:
        return torch.ones(B, S, dtype=torch.long, device=device), torch.arange(S, device=device).expand(B, S)
    documents = mask[:, 0, 0].long()
    count = (documents != 0).cumsum(1)
    starts = documents != torch.nn.functional.pad(documents, (1, 0), value=-1)[:, :-1]
    # padding does not end a document, and what stands before its first token is not in it
    number = documents.cummax(1).values
    starts = starts & (documents != 0) & (number != torch.nn.functional.pad(number, (1, 0), value=0)[:, :-1])
    first = torch.where(starts, count - 1, 0).cummax(1).values
    return documents, (count - 1 - first).masked_fill(documents == 0, -1)


def additive_mask(
    queries: DocIdsAndPositions, keys: DocIdsAndPositions, window: int | None, sinks: int, dtype: torch.dtype
) -> Tensor:
    """`[B, 1, T, S]`, added to the scores: 0 where a query may see a key, else the lowest number."""
    (q_document, q_place), (k_document, k_place) = queries, keys
    distance = q_place.unsqueeze(-1) - k_place.unsqueeze(-2)
    allowed = (q_document.unsqueeze(-1) == k_document.unsqueeze(-2)) & (k_document != 0).unsqueeze(-2)
    allowed &= distance >= 0
    if window is not None:
        allowed &= (distance < window) | (k_place < sinks).unsqueeze(-2)
    # a query at padding sees itself, so that its softmax has something to sum
    T, S = allowed.shape[-2:]
    own = torch.arange(S, device=allowed.device) == torch.arange(S - T, S, device=allowed.device).unsqueeze(-1)
    allowed = (allowed | (own & (q_document == 0).unsqueeze(-1))).unsqueeze(1)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
