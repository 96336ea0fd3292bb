"""Sinks at a constant distance (StreamingLLM, arXiv 2309.17453, section 3.2).

With a rotary embedding, a query at a position from `last = window + sinks - 1` on reads the first tokens of its
document as if it were at position `last`, the last one from which all tokens are seen. So sinks are never further away
than in a text of `last + 1` tokens, and attention to them stays what the teacher has learned.

The scores of sinks are computed apart and passed through the attention implementation in channels of their own: sink s
has the key (0, e_s), any other token (k, 0), and a query is (q, scores of the sinks).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.mixers.norms import upcast
from subquad.mixers.rotary import apply_rotary
from subquad.modeling.masks import DocIdsAndPositions

Rotation = tuple[Tensor, Tensor]
"""cos and sin of a rotary embedding, `[..., R]`."""


@dataclass
class RotaryTokens:
    """The rotary embedding of new tokens: its layout (`mixers.rotary.STYLES`), cos and sin `[1 or B, T, R]`, and the
    position of the first token (None: `positions` has those of all, `[B, T]`, -1 at padding)."""

    style: str
    cos: Tensor
    sin: Tensor
    past_tokens: int = 0
    positions: Tensor | None = None

    def reaches(self, position: int) -> bool:
        """Whether some token may be past `position`."""
        return self.positions is not None or self.past_tokens + self.cos.shape[1] > position + 1

    def at(self, position: int, earlier: Rotation | None) -> Rotation | None:
        """cos and sin at a position of each token's document, `[1 or B, 1 or T, R]`; anything for tokens before it.

        earlier: of documents that passed the position before the new tokens, `[B, 1, R]`.
        """
        (T, R), rotation = self.cos.shape[1:], (self.cos, self.sin)
        if self.positions is None:
            slot = position - self.past_tokens
            return (self.cos[:, slot, None], self.sin[:, slot, None]) if 0 <= slot < T else earlier
        slots = torch.arange(T, device=self.cos.device) - (self.positions - position)  # documents have no gaps
        index = slots.clamp(0, T - 1).unsqueeze(-1).expand(-1, -1, R)
        cos, sin = (x.expand(len(index), -1, -1).gather(1, index) for x in rotation)
        if earlier is None:
            return cos, sin
        is_new = ((slots >= 0) & (self.positions >= position)).unsqueeze(-1)
        return torch.where(is_new, cos, earlier[0]), torch.where(is_new, sin, earlier[1])

    def of_last_tokens(self, rotation: Rotation, B: int) -> Rotation:
        """What later tokens need of the result of `at`: that of each row's last token, `[B, 1, R]`."""
        if self.positions is not None:
            tokens = (self.positions >= 0).sum(1, keepdim=True)  # padding follows them
            index = (tokens - 1).clamp_min(0).unsqueeze(-1).expand(-1, -1, self.cos.shape[-1])
            rotation = rotation[0].gather(1, index), rotation[1].gather(1, index)
        cos, sin = (x.expand(B, -1, -1).clone(memory_format=torch.contiguous_format) for x in rotation)
        return cos, sin

    def distance(self, rotation: Rotation) -> Rotation:
        """cos and sin of the rotation from `rotation` to the new tokens, `[1 or B, T, R]`."""
        new_cos, new_sin, cos, sin = (upcast(x) for x in (self.cos, self.sin, *rotation))
        size = new_cos.square() + new_sin.square()  # not one where the embedding scales queries and keys
        return (new_cos * cos + new_sin * sin) / size, (new_sin * cos - new_cos * sin) / size

    def with_moved_sinks(self, keys: Tensor, sinks: int, rotation: Rotation) -> Tensor:
        """Keys `[B, G, S, K]`, the first `sinks` as the one new token, after position `last`, sees them; `rotation` is
        `at(last)`."""
        moved = apply_rotary(keys[:, :, :sinks].transpose(1, 2), *self.distance(rotation), self.style)
        return torch.cat((moved.transpose(1, 2), keys[:, :, sinks:]), 2)

    def moved(self, queries: Tensor, last: int, rotation: Rotation) -> Tensor:
        """Queries `[B, H, T, K]` rotated from positions after `last` back to it; `rotation` is `at(last)`."""
        far = self.distance(rotation)
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.past_tokens, self.past_tokens + queries.shape[2], device=queries.device)[None]
        late = (positions > last).unsqueeze(-1)
        cos, sin = torch.where(late, far[0], 1.0), torch.where(late, -far[1], 0.0)
        return apply_rotary(queries.transpose(1, 2), cos, sin, self.style).transpose(1, 2)


def with_sink_channels(
    q: Tensor, moved: Tensor, k: Tensor, v: Tensor, sinks: int, layout: DocIdsAndPositions | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, H, T, K + sinks]` and keys `[B, G, S, K + sinks]` with the scores of sinks in the last channels, and
    values, with as many zeros where their channels were as many as those of keys (fast kernels ask for that).

    moved: the queries as sinks see them. layout: documents and positions of all slots, `[1 or B, S]`; None: one
    document, whose first tokens are in the first slots.
    """
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    sinks = min(sinks, S)
    grouped = moved.unflatten(1, (G, H // G))
    if layout is None:
        scores = grouped @ k[:, :, None, :sinks].mT
        positions = torch.arange(S, device=q.device)[None]
    else:
        docs, positions = layout
        index = first_slots(docs, torch.arange(S - T, S, device=q.device), sinks)  # [1 or B, T, sinks]
        index = index.expand(B, -1, -1).flatten(1)[:, None, :, None].expand(-1, G, -1, K)
        own = k.gather(2, index).unflatten(2, (T, sinks))  # [B, G, T, sinks, K]
        scores = torch.einsum("bghtk,bgtsk->bghts", grouped, own)
    is_sink = (positions.unsqueeze(-1) == torch.arange(sinks, device=q.device)).to(k.dtype)  # [1 or B, S, sinks]
    k = k * (1 - is_sink.sum(-1, keepdim=True).unsqueeze(1))
    k = torch.cat((k, is_sink.unsqueeze(1).expand(B, G, -1, -1)), -1)
    v = F.pad(v, (0, sinks)) if v.shape[-1] == K else v
    return torch.cat((q, scores.flatten(1, 2)), -1), k, v


def first_slots(docs: Tensor, slots: Tensor, count: int) -> Tensor:
    """The slots of the first `count` tokens of the documents that are in `slots: [n]`: `[1 or B, n, count]`.

    docs: `[1 or B, S]`.
    """
    indices = torch.arange(docs.shape[1], device=docs.device)
    begins = indices.where(docs != F.pad(docs, (1, 0))[:, :-1], 0).cummax(1).values
    return (begins[:, slots, None] + torch.arange(count, device=docs.device)).clamp_max(docs.shape[1] - 1)
