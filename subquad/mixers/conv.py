"""The short convolutions of a mixer: on sequences, and in two special cases, one token and rows with padding."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import ops
from subquad.mixers.norms import upcast


def apply_short_convs(
    inputs: dict[str, Tensor],
    weights: Mapping[str, Tensor],
    padding_mask: Tensor | None = None,
    states: tuple[Tensor, ...] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Convolves those of `inputs: [B, T, D]` that have weights `[D, W]`, in place of their entries.

    Args:
        padding_mask: bool `[B, T, 1]`, False at padding.
        states: inputs before the first token, `[B, W - 1, D]` in the order of `weights`; further ones are ignored.

    Returns:
        The new states, in the order of `weights`.
    """
    if weights and states is not None and inputs["q"].shape[1] == 1 and padding_mask is None:
        convolved, new_states = short_conv_step(inputs, weights, states[: len(weights)])
        inputs.update(convolved)
        return tuple(new_states)
    new_states = []
    for index, (name, weight) in enumerate(weights.items()):
        before = None if states is None else states[index]
        if padding_mask is not None:
            inputs[name], after = short_conv_padded(inputs[name], weight, padding_mask, before)
        else:
            inputs[name], after = ops.short_conv(inputs[name], weight, initial_state=before, cu_seqlens=cu_seqlens)
        new_states.append(after)
    return tuple(new_states)


def short_conv_step(
    inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], states: tuple[Tensor, ...]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """`ops.short_conv` of one token, all convolutions in one call, because call overhead dominates decoding.

    From inputs `[B, 1, D]` and weights `[D, W]` by name, and states `[B, W - 1, D]` in the order of `weights`, to the
    outputs `[B, 1, D]` by name and the new states.
    """
    state, x = torch.cat(states, dim=-1), torch.cat([inputs[name] for name in weights], dim=-1)
    window = torch.cat([state, x], dim=1)
    taps = torch.cat(list(weights.values())).T
    y = (upcast(window) * upcast(taps)).sum(1, keepdim=True).to(window.dtype)
    sizes = [inputs[name].shape[-1] for name in weights]
    outputs = dict(zip(weights, y.split(sizes, dim=-1), strict=True))
    return outputs, list(window[:, 1:].split(sizes, dim=-1))


def short_conv_padded(x: Tensor, weight: Tensor, padding_mask: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ops.short_conv` that skips padding: the tokens before padding are the left context of those after it.

    From `x: [B, T, D]`, `weight: [D, W]`, `padding_mask: [B, T, 1]` (False at padding) and `state: [B, W - 1, D]` to
    the output `[B, T, D]`, undefined at padding, and the new state.
    """
    W = weight.shape[1] - 1
    if state is None:
        state = x.new_zeros(x.shape[0], W, x.shape[2])
    mask = F.pad(padding_mask, (0, 0, W, 0), value=True)
    order = mask[..., 0].long().argsort(dim=1, stable=True)  # padding first, then the state, then the tokens
    inputs = torch.cat([state, x], dim=1) * mask
    inputs = inputs.gather(1, order.unsqueeze(-1).expand_as(inputs))
    y, after = ops.short_conv(inputs[:, W:], weight, initial_state=inputs[:, :W].contiguous())
    inverse = (order.argsort(dim=1)[:, W:] - W).clamp_min(0)
    return y.gather(1, inverse.unsqueeze(-1).expand_as(y)), after
