"""The student's own attention mask: built from what a caller gives, and read by the layers.

It is a tensor `[B, 1, 1, S]` over the S tokens seen so far, or over the last of them. With padding only it is bool,
False at padding. With several documents a row it is int64: the number of each token's document, 0 at padding. It is
`[B, 1, 1, 0]` where all tokens are real and each row is one document, and uint8, 0 at padding, where one new token a
row is real and padding is in the past.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.packing import PackedDocuments

DocIdsAndPositions = tuple[Tensor, Tensor]
"""Two tensors `[B, S]`: each token's document, 0 at padding; its position in the document, -1 at padding."""


def is_own_mask(mask: Tensor) -> bool:
    """Whether a mask is what `prepare_mask_and_positions` returned, and not one of `transformers`."""
    return mask.dim() == 4 and mask.shape[1:3] == (1, 1) and not mask.is_floating_point()


def doc_ids_and_positions(mask: Tensor | None, B: int, S: int, device: torch.device) -> DocIdsAndPositions:
    """Reads the mask `[B, 1, 1, S]`; None or an empty one means one document a row without padding."""
    if mask is None or not mask.shape[-1]:
        return torch.ones(B, S, dtype=torch.long, device=device), torch.arange(S, device=device).expand(B, S)
    doc_ids = mask[:, 0, 0].long()
    real_tokens = (doc_ids != 0).cumsum(1)
    # Padding inside a document does not end it, and padding before its first token is not part of it.
    last_doc = doc_ids.cummax(1).values
    starts = last_doc != F.pad(last_doc, (1, 0))[:, :-1]
    first = torch.where(starts, real_tokens - 1, 0).cummax(1).values
    return doc_ids, (real_tokens - 1 - first).masked_fill(doc_ids == 0, -1)


def new_documents(mask: Tensor, T: int) -> Tensor | PackedDocuments | None:
    """What a mixer reads of the mask `[B, 1, 1, S]` for the last T tokens; packed documents are located once for all
    layers that get the same mask."""
    if not mask.shape[-1] or mask.dtype == torch.uint8:
        return None
    doc_ids = mask[:, 0, 0, -T:]
    if doc_ids.dtype == torch.bool or torch.compiler.is_compiling():
        return doc_ids
    if not hasattr(mask, "subquad_documents"):
        mask.subquad_documents = PackedDocuments(doc_ids)  # type: ignore[attr-defined]
    return mask.subquad_documents  # type: ignore[attr-defined]


def visible_keys(
    queries: DocIdsAndPositions,
    keys: DocIdsAndPositions,
    window: int | Tensor | None = None,
    sinks: int = 0,
    limit: int | None = None,
) -> Tensor:
    """`[..., T, S]`, True where a query sees a key: in the same document, not after it, and less than `limit` tokens
    away; with a window, less than `window` tokens away or among the first `sinks` tokens.

    queries, keys: documents and positions, `[..., T]` and `[..., S]`. window: a number or a tensor that broadcasts.
    """
    (q_docs, q_positions), (k_docs, k_positions) = queries, keys
    distance = q_positions.unsqueeze(-1) - k_positions.unsqueeze(-2)
    visible = (q_docs.unsqueeze(-1) == k_docs.unsqueeze(-2)) & (k_docs != 0).unsqueeze(-2) & (distance >= 0)
    if limit is not None:
        visible &= distance < limit
    if window is not None:
        visible = visible & ((distance < window) | (k_positions < sinks).unsqueeze(-2))
    return visible


@functools.cache
def numbers_of_heads(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A number for each head, `[H, 1, 1]`; made once, since a copy waits for the device."""
    return torch.tensor(numbers, device=device)[:, None, None]


def additive_mask(
    queries: DocIdsAndPositions,
    keys: DocIdsAndPositions,
    window: int | Tensor | None,
    sinks: int,
    limit: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """`[B, 1 or H, T, S]` for documents and positions `[B, T]` and `[B, 1 or H, S]` or `[B, S]`, to be added to the
    scores; the last T keys are those of the queries. window: a number, or one a head, `[H, 1, 1]`."""
    q_docs, q_positions, k_docs, k_positions = (x.unsqueeze(1) if x.dim() == 2 else x for x in (*queries, *keys))
    visible = visible_keys((q_docs, q_positions), (k_docs, k_positions), window, sinks, limit)
    return to_additive(visible | padding_sees_itself(q_docs, visible.shape[-1]), dtype)


def padding_sees_itself(query_docs: Tensor, S: int) -> Tensor:
    """`[..., T, S]`, True where a query at padding meets its own key, the T last of S, so that its softmax is over at
    least one key; query_docs: `[..., T]`."""
    T, device = query_docs.shape[-1], query_docs.device
    itself = torch.arange(S, device=device) == torch.arange(S - T, S, device=device).unsqueeze(-1)
    return itself & (query_docs == 0).unsqueeze(-1)


def to_additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, else the lowest number of `dtype`."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def prepare_mask_and_positions(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_tokens: int = 0,
    cu_seqlens: Tensor | None = None,
    max_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The student's mask and explicit positions `[B, T]`, from the arguments of `forward`; `tokens: [B, T, ...]`.

    Without past tokens, a position of 0 that is not the first of its row starts a new document. Values of tensors are
    read at most once, all together, since reading waits for the device.

    Raises:
        ValueError: wrong shapes or boundaries, or a position that is not below `max_positions`.
    """
    (B, T), device = tokens.shape[:2], tokens.device
    checks_positions = max_positions is not None and (position_ids is not None or past_tokens + T > max_positions)
    facts: dict[str, Tensor] = {}
    mask = starts = None
    if attention_mask is not None:
        mask = check_attention_mask(attention_mask, B, T, past_tokens).bool()
        facts["padded"], facts["padded_now"] = ~mask.all(), ~mask[:, -T:].all()
    if past_tokens == 0 and position_ids is not None:
        starts = position_ids.expand(B, T)[:, 1:] == 0
        if mask is not None:  # neither padding nor the first token after it starts another document
            starts = starts & mask[:, 1:] & (mask[:, :-1].cumsum(1) > 0)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(device)
        facts["first_offset"], facts["last_offset"] = cu_seqlens[0], cu_seqlens[-1]
        bounds, positions = read_offsets(cu_seqlens, B, T)
        starts = bounds[:, 1:] if starts is None else starts | bounds[:, 1:]
        position_ids = positions if position_ids is None else position_ids
    if position_ids is None:
        unpadded = torch.arange(past_tokens, past_tokens + T, device=device)
        position_ids = unpadded if mask is None else (mask.cumsum(1) - 1).clamp_min(0)[:, -T:]
    position_ids = position_ids.expand(B, T)
    if starts is not None:
        facts["documents"] = starts.any()
    if checks_positions:
        facts["last_position"] = position_ids.max()
    known = dict(zip(facts, torch.stack([x.long() for x in facts.values()]).tolist(), strict=True)) if facts else {}
    if cu_seqlens is not None and (B, past_tokens, known["first_offset"], known["last_offset"]) != (1, 0, 0, T):
        raise ValueError(
            f"cu_seq_lens_q: got {cu_seqlens.tolist()} for {B} rows of {T} tokens after {past_tokens}; expected one "
            f"row, an empty cache, and offsets from 0 to {T}"
        )
    if max_positions is not None and known.get("last_position", 0) >= max_positions:
        raise ValueError(
            f"position_ids: got {known['last_position']}, expected less than {max_positions}, the teacher's number of "
            f"learned positions; use at most {max_positions} tokens a row, prompt and continuation together"
        )
    if starts is not None and known["documents"]:
        doc_ids = F.pad(starts.cumsum(1), (1, 0)) + 1
        mask = doc_ids if mask is None else doc_ids.masked_fill(~mask, 0)
    elif mask is None or not known["padded"]:
        mask = torch.empty(B, 0, dtype=torch.bool, device=device)
    elif T == 1 and not known["padded_now"]:
        mask = mask.to(torch.uint8)
    return mask[:, None, None, :], position_ids


def read_offsets(cu_seqlens: Tensor, B: int, T: int) -> tuple[Tensor, Tensor]:
    """Whether a document starts at each token, and each token's position in its document, `[B, T]`."""
    starts = torch.zeros(B, T + 1, dtype=torch.bool, device=cu_seqlens.device)
    starts[:, cu_seqlens.clamp(0, T).long()] = True
    indices = torch.arange(T, device=cu_seqlens.device)
    return starts[:, :T], indices - indices.where(starts[:, :T], 0).cummax(1).values


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
