"""The student's own attention mask: built from what a caller gives, and read by the layers.

It is a tensor `[B, 1, 1, S]` over the S tokens seen so far, or over the last of them. With padding only it is bool,
False at padding. With several documents a row it is integer: the number of each token's document, 0 at padding. It is
`[B, 1, 1, 0]` where all tokens are real and each row is one document.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DocIdsAndPositions = tuple[Tensor, Tensor]
"""Two tensors `[B, S]`: each token's document, 0 at padding; its position in the document, -1 at padding."""


def doc_ids_and_positions(mask: Tensor | None, B: int, S: int, device: torch.device) -> DocIdsAndPositions:
    """Reads the mask `[B, 1, 1, S]`; None means one document a row without padding."""
    if mask is None:
        return torch.ones(B, S, dtype=torch.long, device=device), torch.arange(S, device=device).expand(B, S)
    doc_ids = mask[:, 0, 0].long()
    real_tokens = (doc_ids != 0).cumsum(1)
    starts = doc_ids != F.pad(doc_ids, (1, 0), value=-1)[:, :-1]
    # Padding inside a document does not end it, and padding before its first token is not part of it.
    last_doc = doc_ids.cummax(1).values
    starts = starts & (doc_ids != 0) & (last_doc != F.pad(last_doc, (1, 0), value=0)[:, :-1])
    first = torch.where(starts, real_tokens - 1, 0).cummax(1).values
    return doc_ids, (real_tokens - 1 - first).masked_fill(doc_ids == 0, -1)


def additive_mask(
    queries: DocIdsAndPositions, keys: DocIdsAndPositions, window: int | None, sinks: int, dtype: torch.dtype
) -> Tensor:
    """`[B, 1, T, S]`, to be added to the scores: 0 where a query sees a key, else the lowest number of `dtype`."""
    (q_docs, q_positions), (k_docs, k_positions) = queries, keys
    distance = q_positions.unsqueeze(-1) - k_positions.unsqueeze(-2)
    allowed = (q_docs.unsqueeze(-1) == k_docs.unsqueeze(-2)) & (k_docs != 0).unsqueeze(-2)
    allowed &= distance >= 0
    if window is not None:
        allowed &= (distance < window) | (k_positions < sinks).unsqueeze(-2)
    # A query at padding sees itself, so that its softmax is over at least one key.
    T, S = allowed.shape[-2:]
    itself = torch.arange(S, device=allowed.device) == torch.arange(S - T, S, device=allowed.device).unsqueeze(-1)
    allowed = (allowed | (itself & (q_docs == 0).unsqueeze(-1))).unsqueeze(1)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def prepare_mask_and_positions(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    B: int,
    T: int,
    past_tokens: int,
    device: torch.device,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The student's mask and explicit positions `[B, T]`, from the arguments of `forward`.

    Without past tokens, a position of 0 that is not the first of its row starts a new document.
    """
    if attention_mask is not None:
        attention_mask = check_attention_mask(attention_mask, B, T, past_tokens)
    doc_starts = None
    if cu_seqlens is not None:
        doc_starts = read_cu_seqlens(cu_seqlens, B, T, past_tokens, device)
        if position_ids is None:
            positions = torch.arange(T, device=device)
            first = torch.cat([doc_starts.new_zeros(1), doc_starts])
            position_ids = (positions - first[torch.searchsorted(doc_starts, positions, right=True)]).unsqueeze(0)
    padded = attention_mask is not None and not bool(attention_mask.all())
    if position_ids is None:
        if padded:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -T:]  # type: ignore[union-attr]
        else:
            position_ids = torch.arange(past_tokens, past_tokens + T, device=device).expand(B, T)
    position_ids = position_ids.expand(B, T)
    mask = attention_mask.bool() if padded else torch.empty(B, 0, dtype=torch.bool, device=device)  # type: ignore[union-attr]
    if past_tokens == 0:
        starts = position_ids[:, 1:] == 0
        if padded:  # neither padding nor the first token after it starts another document
            starts = starts & mask[:, 1:] & (mask[:, :-1].cumsum(1) > 0)
        if doc_starts is not None:
            starts[:, doc_starts - 1] = True
        if bool(starts.any()):
            doc_ids = torch.ones_like(position_ids)
            doc_ids[:, 1:] += starts.cumsum(1)
            mask = doc_ids.masked_fill(~mask, 0) if padded else doc_ids
    return mask[:, None, None, :], position_ids


def check_attention_mask(attention_mask: Tensor, B: int, T: int, past_tokens: int) -> Tensor:
    """The mask `[B, past_tokens + T]`; one of the new tokens alone gets ones for the tokens before them."""
    if attention_mask.dim() == 4:
        raise ValueError("attention_mask: got 4 dimensions, expected [batch, tokens]")
    if attention_mask.shape == (B, past_tokens + T):
        return attention_mask
    if attention_mask.shape != (B, T):
        raise ValueError(
            f"attention_mask: got {list(attention_mask.shape)}, expected {[B, past_tokens + T]} (all tokens so far)"
        )
    return torch.cat([attention_mask.new_ones(B, past_tokens), attention_mask], dim=1)


def read_cu_seqlens(cu_seqlens: Tensor, B: int, T: int, past_tokens: int, device: torch.device) -> Tensor:
    """Where the documents of one row of T tokens start, without the first."""
    if B != 1 or past_tokens or int(cu_seqlens[0]) or int(cu_seqlens[-1]) != T:
        raise ValueError(
            f"cu_seq_lens_q: got {cu_seqlens.tolist()} for {B} rows of {T} tokens after {past_tokens}; expected one "
            f"row, an empty cache, and offsets from 0 to {T}"
        )
    return cu_seqlens[(cu_seqlens > 0) & (cu_seqlens < T)].long().to(device)
