"""Feature maps phi of queries and keys, per head: a learned linear map W, if an option asks for one, and an activation.

    phi(x) = act(W x)                                    silu, elu1, relu and none; without W, act(x)
    phi(x) = [softmax(W x); softmax(-W x)]               hedgehog; each softmax over the channels of W x
    phi(x) = [1]                                         ones; without W

`hedgehog` is the form of LoLCATs (arXiv 2410.10254; class `SoftmaxDim` of its code, without the floor of 1e-12) of the
map of The Hedgehog (arXiv 2402.04347), which has exponentials and a bias in place of the softmaxes. W `[F, K]` starts
as the identity, so that the features are 2 K in number; LoLCATs' own W has K / 2 rows, `expand_k=0.5`.

With another `expand_k` than 1 every activation has a W, of F = `expand_k` K rows: at first the identity and random
orthogonal matrices below it (below one, the first rows of one such matrix), the same for queries and keys. Where F is a
multiple of K, W^T W = F / K: without an activation the products of queries and keys only change their scale; with one
they are sums over several bases.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_SCALES = 0.5, 1.0, 2.0, 4.0
"""Scales of W that calibration tries: large ones make a softmax sharp and SiLU nearly ReLU."""


@functools.cache
def initial_map(features: int, channels: int) -> Tensor:
    """The initial W `[features, channels]`, float32 on the CPU; always the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        blocks = [torch.eye(channels)] if features >= channels else []
        while sum(map(len, blocks)) < features:
            blocks.append(torch.nn.init.orthogonal_(torch.empty(channels, channels), generator=generator))
        return torch.cat(blocks)[:features]


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation `activation` of queries or keys `[..., F]`, `[..., 2 F]` with hedgehog, `[..., 1]` with ones."""
    if activation == "ones":
        return torch.ones_like(x[..., :1])
    if activation == "hedgehog":
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1).to(x.dtype)  # autocast makes softmax float32
    if activation == "silu":
        return F.silu(x)
    if activation == "elu1":
        return F.elu(x) + 1
    return F.relu(x) if activation == "relu" else x
