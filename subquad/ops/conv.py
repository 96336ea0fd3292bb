"""Short convolution: causal, one filter of W taps a channel, with a state of the last W - 1 inputs.

    y_t = bias + sum_w weight[:, w] x_{t - (W - 1) + w}          weight[:, W - 1] weighs the current token

It is bound by memory, so that it goes through the sequence in blocks that stay in the cache while all taps read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.ops.engine.functions import OnceDifferentiable, VmapByLoopFunction
from subquad.ops.engine.workspace import Workspace

TILE_NUMBERS = 1 << 16  # numbers


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel over time with its own filter.

    Args:
        x: [B, T, D]; bfloat16 and float16 are computed in float32.
        weight: [D, W], the current token's tap last.
        bias: [D].
        initial_state: [B, W - 1, D] in the dtype of x, the inputs before the first; None is zeros.
        cu_seqlens: [N + 1] boundaries of N documents packed into a batch of one; states are then [N, W - 1, D].
        activation: None or "silu".

    Returns:
        y [B, T, D] in the dtype of x, and the last W - 1 inputs [B, W - 1, D], ready for the next call.
    """
    sequences = check_conv(x, weight, bias, initial_state, cu_seqlens, activation)
    _, T, D = x.shape
    state = x.new_zeros(sequences, weight.shape[1] - 1, D) if initial_state is None else initial_state
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    return ShortConv.apply(x, weight, bias, state, Bounds(bounds), activation == "silu")


class Bounds:
    """Where documents begin and end, [0, T] for none; opaque to `torch.func`, which would take a list apart."""

    def __init__(self, bounds: list[int]) -> None:
        self.bounds = bounds
        self.packed = len(bounds) > 2

    def spans(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.bounds))


class ConvTile(NamedTuple):
    start: int  # token
    end: int
    states: slice  # whose state comes before the first block and after the last
    first: bool
    last: bool


class ShortConv(VmapByLoopFunction):
    """(x, weight, bias, state, bounds, silu) -> (y, last inputs).

    Nothing but the inputs is kept: the argument of the activation is computed again before its derivative.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, bounds: Bounds, silu: bool
    ) -> tuple[Tensor, Tensor]:
        walk = ConvTiles(x, weight, bias, state, bounds)
        y, final = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
        for block in walk.blocks():
            inputs, sums = walk.sums(block)
            y[:, block.start : block.end] = F.silu(sums, inplace=True) if silu else sums
            if block.last:
                final[block.states] = inputs[:, block.end - block.start :]
        return y, final

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.bounds, ctx.silu = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*ShortConvBackward.apply(dy, d_final, *ctx.saved_tensors, ctx.bounds, ctx.silu), None, None)


class ShortConvBackward(OnceDifferentiable):
    """(dy, d_final, x, weight, bias, state, bounds, silu) -> the gradients of x, weight, bias and state."""

    @staticmethod
    def forward(
        dy: Tensor | None,
        d_final: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor,
        bounds: Bounds,
        silu: bool,
    ) -> tuple[Tensor | None, ...]:
        dy = torch.zeros_like(x) if dy is None else dy
        walk, before = ConvTiles(x, weight, bias, state, bounds), state.shape[1]
        dx, d_state = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
        d_taps, d_bias = torch.zeros_like(walk.taps), torch.zeros_like(walk.taps[0])
        carry = walk.work("carry", x.shape[0], before, x.shape[2])
        for block in reversed(list(walk.blocks())):
            inputs, sums = walk.sums(block)
            if block.last:
                carry.zero_() if d_final is None else carry.copy_(d_final[block.states])
            n = block.end - block.start
            d_sums = walk.work("d_sums", *sums.shape).copy_(dy[:, block.start : block.end])
            if silu:
                d_sums = torch.ops.aten.silu_backward(d_sums, sums)
            # Inputs of the block and the `before` ahead of it; the latter are handed to the block before.
            d_inputs = walk.work("d_inputs", *inputs.shape)
            d_inputs[:, :n].zero_()
            d_inputs[:, n:] = carry
            for w, tap in enumerate(walk.taps):
                d_inputs[:, w : w + n].addcmul_(d_sums, tap)
                d_taps[w] += torch.linalg.vecdot(inputs[:, w : w + n], d_sums, dim=1).sum(0)
            d_bias += d_sums.sum((0, 1))
            dx[:, block.start : block.end] = d_inputs[:, before:]
            carry.copy_(d_inputs[:, :before])
            if block.first:
                d_state[block.states] = carry
        return dx, d_taps.mT, None if bias is None else d_bias, d_state


class ConvTiles:
    """The blocks of all documents (or of the batch), and the convolution of one."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, bounds: Bounds) -> None:
        dtype = checks.compute_dtype(x)
        self.x, self.state, self.bounds = x, state, bounds
        self.taps = weight.to(dtype).mT.contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        self.work = Workspace(x, dtype)

    def blocks(self) -> Iterator[ConvTile]:
        B, _, D = self.x.shape
        size = max(32, 2 * self.state.shape[1], TILE_NUMBERS // max(1, B * D))
        for n, (start, end) in enumerate(self.bounds.spans()):
            states = slice(n, n + 1) if self.bounds.packed else slice(0, B)
            # An empty document has one empty block, which hands its state through.
            for at in range(start, max(end, start + 1), size):
                stop = min(at + size, end)
                yield ConvTile(at, stop, states, at == start, stop == end)

    def sums(self, block: ConvTile) -> tuple[Tensor, Tensor]:
        """The block's inputs with those before it [B, W - 1 + n, D], and the convolution before its activation."""
        B, _, D = self.x.shape
        before, n = self.state.shape[1], block.end - block.start
        inputs = self.work("inputs", B, before + n, D)
        inputs[:, before:] = self.x[:, block.start : block.end]
        if block.first:
            inputs[:, :before] = self.state[block.states]
        else:  # a block holds more tokens than a filter, so that these are the document's own
            inputs[:, :before] = self.x[:, block.start - before : block.start]
        sums = self.work("sums", B, n, D)
        torch.mul(inputs[:, before:], self.taps[before], out=sums)
        for w in range(before):
            sums.addcmul_(inputs[:, w : w + n], self.taps[w])
        return inputs, sums if self.bias is None else sums.add_(self.bias)


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> int:
    """Number of sequences that own a state."""
    checks.tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: got shape {list(x.shape)}, expected 3 axes, [batch, time, channels]")
    D = x.shape[-1]
    checks.tensor("weight", weight, like=x)
    if weight.dim() != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [D, W] = [{D}, at least 1]")
    if bias is not None:
        checks.tensor("bias", bias, like=x)
        checks.shape("bias", bias, (D,), axes="[D]")
    sequences = checks.check_cu_seqlens(x, cu_seqlens)
    if initial_state is not None:
        checks.tensor("initial_state", initial_state, like=x, same_dtype=True)
        expected = (sequences, weight.shape[1] - 1, D)
        checks.shape("initial_state", initial_state, expected, axes="[B or documents, W - 1, D]")
    if activation not in (None, "silu"):
        raise ValueError(f'activation: got {activation!r}, expected None or "silu"')
    return sequences
