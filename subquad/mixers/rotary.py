"""Rotary position embedding (arXiv 2104.09864) in the layouts of `transformers` models."""

import torch
from torch import Tensor

STYLES = ("half", "interleaved", "half-compact", "interleaved-halves", "interleaved-compact")
"""half: channels i and i + R/2 form a pair; cos and sin are `[..., R]` (Llama). interleaved: channels 2i and 2i + 1
form a pair; cos and sin repeat each angle twice in a row (Cohere). -compact: cos and sin hold each angle once,
`[..., R/2]` (GPT-OSS). -halves: interleaved pairs, but cos and sin as in half (GLM)."""


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> Tensor:
    """Rotates `x: [B, T, H, K]` by `cos, sin: [B, T, R]` (R/2 if compact). Channels from R on stay unchanged."""
    pairing, _, form = style.partition("-")
    if form == "halves":
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    if form:
        cos, sin = (
            torch.cat((t, t), dim=-1) if pairing == "half" else t.repeat_interleave(2, dim=-1) for t in (cos, sin)
        )
    R = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotated, rest = x[..., :R], x[..., R:]
    if pairing == "half":
        a, b = rotated.chunk(2, dim=-1)
        orthogonal = torch.cat((-b, a), dim=-1)
    else:
        orthogonal = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    rotated = (rotated * cos + orthogonal * sin).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
