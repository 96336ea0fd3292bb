"""Short convolutions as mixers meet them beside `ops.short_conv`: with padding anywhere, and of a single token."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import ops
from subquad.mixers.norms import upcast


def convolve_token(flat: dict[str, Tensor], kernels: Mapping[str, Tensor], states: tuple[Tensor, ...]) -> list[Tensor]:
    """`ops.short_conv` of one token, all convolutions as one: changes `flat: [B, 1, D]` by name, returns their states
    `[B, W - 1, D]`. While decoding, a call costs more than what it computes."""
    before, now = torch.cat(states, dim=-1), torch.cat([flat[name] for name in kernels], dim=-1)
    window = torch.cat([before, now], dim=1)
    taps = torch.cat(list(kernels.values())).T
    mixed = (upcast(window) * upcast(taps)).sum(1, keepdim=True).to(window.dtype)
    sizes = [flat[name].shape[-1] for name in kernels]
    flat.update(zip(kernels, mixed.split(sizes, dim=-1), strict=True))
    return list(window[:, 1:].split(sizes, dim=-1))


def convolve_past_padding(
    x: Tensor, kernel: Tensor, padding_mask: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.short_conv` as if padding did not exist: it is moved in front of the state, so that the first token behind
    it sees the last tokens before it. `x: [B, T, D]`, `keep: [B, T, 1]`; what comes out at padding has no meaning."""
    W = kernel.shape[1] - 1
    if before is None:
        before = x.new_zeros(x.shape[0], W, x.shape[2])
    kept = F.pad(padding_mask[..., 0], (W, 0), value=True)
    order = kept.long().argsort(dim=1, stable=True)
    inputs = torch.cat([before, x], dim=1) * F.pad(padding_mask, (0, 0, W, 0), value=True)
    inputs = inputs.gather(1, order.unsqueeze(-1).expand_as(inputs))
    y, after = ops.short_conv(inputs[:, W:], kernel, initial_state=inputs[:, :W].contiguous())
    back = (order.argsort(dim=1)[:, W:] - W).clamp_min(0)
    return y.gather(1, back.unsqueeze(-1).expand_as(y)), after
