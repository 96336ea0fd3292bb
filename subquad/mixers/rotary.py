"""Rotary position embedding (arXiv 2104.09864) in the layouts that models keep it in."""

import torch
from torch import Tensor

STYLES = ("half", "interleaved", "half-compact", "interleaved-halves", "interleaved-compact")
"""half: channel i turns with channel i + R/2, cos and sin `[.., R]` (Llama). interleaved: channel 2i turns with 2i + 1,
cos and sin repeated pair by pair (Cohere). -compact: cos and sin hold each angle once, `[.., R/2]` (GPT-OSS). -halves:
interleaved channels, but cos and sin as in half (GLM)."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> Tensor:
    """Turns `x: [B, T, H, K]` by `cos, sin: [B, T, R]` (R/2 if compact); channels past R are left as they are."""
    pairing, _, form = style.partition("-")
    if form == "halves":
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    if form:
        cos, sin = (
            torch.cat((t, t), dim=-1) if pairing == "half" else t.repeat_interleave(2, dim=-1) for t in (cos, sin)
        )
    R = cos.shape[-1]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned, rest = x[..., :R], x[..., R:]
    if pairing == "half":
        a, b = turned.chunk(2, dim=-1)
        across = torch.cat((-b, a), dim=-1)
    else:
        across = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    turned = (turned * cos + across * sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
