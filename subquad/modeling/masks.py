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


def prepare_mask_and_positions(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    B: int,
    T: int,
    seen: int,
    device: torch.device,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Our 4D mask (see `layers.py`) and explicit positions `[B, T]`, from what a caller gave."""
    if attention_mask is not None and attention_mask.dim() == 4:
        raise ValueError("attention_mask: got 4 axes, expected [batch, tokens]; a mixer has no place for a T x T mask")
    if attention_mask is not None and attention_mask.shape != (B, seen + T):
        if attention_mask.shape != (B, T):
            raise ValueError(
                f"attention_mask: got {list(attention_mask.shape)}, expected {[B, seen + T]} (all tokens seen so far)"
            )
        attention_mask = torch.cat([attention_mask.new_ones(B, seen), attention_mask], dim=1)
    begins = None
    if cu_seqlens is not None:
        if B != 1 or seen or int(cu_seqlens[0]) or int(cu_seqlens[-1]) != T:
            raise ValueError(
                f"cu_seq_lens_q: got {cu_seqlens.tolist()} for {B} rows of {T} tokens after {seen}; expected documents "
                "of one row, from 0 to its length, without a cache that holds anything"
            )
        begins = cu_seqlens[(cu_seqlens > 0) & (cu_seqlens < T)].long().to(device)
        if position_ids is None:
            places = torch.arange(T, device=device)
            first = torch.cat([begins.new_zeros(1), begins])
            position_ids = (places - first[torch.searchsorted(begins, places, right=True)]).unsqueeze(0)
    padded = attention_mask is not None and not bool(attention_mask.all())
    if position_ids is None:
        if padded:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -T:]  # type: ignore[union-attr]
        else:
            position_ids = torch.arange(seen, seen + T, device=device).expand(B, T)
    position_ids = position_ids.expand(B, T)
    mask = attention_mask.bool() if padded else torch.empty(B, 0, dtype=torch.bool, device=device)  # type: ignore[union-attr]
    if seen == 0:
        starts = position_ids[:, 1:] == 0
        if padded:  # neither padding nor the first token behind it starts another document
            starts = starts & mask[:, 1:] & (mask[:, :-1].cumsum(1) > 0)
        if begins is not None:
            starts[:, begins - 1] = True
        if bool(starts.any()):
            documents = torch.ones_like(position_ids)
            documents[:, 1:] += starts.cumsum(1)
            mask = documents.masked_fill(~mask, 0) if padded else documents
    return mask[:, None, None, :], position_ids
