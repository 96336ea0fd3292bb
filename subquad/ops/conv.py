"""Short causal depthwise convolution: one filter of W taps for each channel, with a state of the last W - 1 inputs.

    y_t = bias + sum_w weight[:, w] x_{t - (W - 1) + w}          weight[:, W - 1] is the tap of the current token

Memory bandwidth limits it, so that on a CPU it goes through the sequence in tiles that stay in the cache while all taps
read them. On other devices it is `torch.nn.functional.conv1d`; without an initial state it is the kernel of `fla` where
that computes CUDA tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import fla
from subquad.ops.checks import Shapes, check_cu_seqlens, compute_dtype
from subquad.ops.engine.functions import OnceDifferentiable, VmapByLoopFunction
from subquad.ops.engine.workspace import Workspace

TILE_ELEMENTS = 1 << 16
"""Elements of x in a tile: 256 KB in float32, so that a tile stays in the CPU cache."""


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolves every channel over time with its own filter.

    Args:
        x: [B, T, D]; bfloat16 and float16 are computed in float32.
        weight: [D, W], the tap of the current token last.
        bias: [D].
        initial_state: [B, W - 1, D] in the dtype of x, the inputs before the first; None is zeros.
        cu_seqlens: [N + 1] boundaries of N documents packed into a batch of one; states are then [N, W - 1, D].
        activation: None or "silu".

    Returns:
        y [B, T, D] in the dtype of x, and the last W - 1 inputs [B, W - 1, D], the `initial_state` of the next call.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; an unknown activation.
    """
    shapes = Shapes()
    shapes.check("x", x, "BTD")
    shapes.check("weight", weight, "DW")
    if weight.shape[1] < 1:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [D, W] with W of at least 1")
    if bias is not None:
        shapes.check("bias", bias, "D")
    shapes.sizes |= {"N": check_cu_seqlens(x, cu_seqlens), "P": weight.shape[1] - 1}
    N, P, D = (shapes.sizes[letter] for letter in "NPD")
    if activation not in (None, "silu"):
        raise ValueError(f'activation: got {activation!r}, expected None or "silu"')
    if initial_state is None:
        if (found := fla.run_short_conv(x, weight, bias, cu_seqlens, activation)) is not None:
            return found
        initial_state = x.new_zeros(N, P, D)
    shapes.check("initial_state", initial_state, "NPD", dtype=x.dtype)
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    convolve = ShortConv.apply if x.device.type == "cpu" else short_conv_by_conv1d
    return convolve(x, weight, bias, initial_state, ConvSpec(bounds, activation == "silu"))


@dataclass(frozen=True)
class ConvSpec:
    """The arguments of a call that are not tensors. No tuple, which `torch.func` would unpack."""

    bounds: list[int]
    """Boundaries of documents in tokens, [0, T] without documents."""
    silu: bool


def short_conv_by_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, spec: ConvSpec
) -> tuple[Tensor, Tensor]:
    """`ShortConv` as one convolution: each document follows its state in one row."""
    P, dtype, documents = state.shape[1], compute_dtype(x), len(spec.bounds) - 1
    if not x.shape[1]:
        return x.clone(), state.clone()
    if documents == 1:
        inputs = torch.cat([state, x], 1)
    else:
        bounds = torch.tensor(spec.bounds)
        of_token = torch.repeat_interleave(torch.arange(documents), bounds.diff())
        tokens = torch.arange(x.shape[1]) + of_token * P  # where the outputs are, P before the inputs
        ends = bounds[1:, None] + torch.arange(documents)[:, None] * P + torch.arange(P)
        states = bounds[:-1, None] + torch.arange(documents)[:, None] * P + torch.arange(P)
        source = torch.empty(x.shape[1] + documents * P, dtype=torch.long)
        source[tokens + P], source[states] = (
            torch.arange(x.shape[1]),
            x.shape[1] + torch.arange(states.numel()).view(-1, P),
        )
        source, tokens, ends = (i.to(x.device, non_blocking=True) for i in (source, tokens, ends))
        inputs = torch.cat([x, state.reshape(1, -1, x.shape[2])], 1).index_select(1, source)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv1d(inputs.to(dtype).mT, weight.to(dtype).unsqueeze(1), bias, groups=x.shape[2]).mT
    y = y if documents == 1 else y.index_select(1, tokens)
    y = (F.silu(y) if spec.silu else y).to(x.dtype).contiguous()
    return y, inputs[:, x.shape[1] :].contiguous() if documents == 1 else inputs[0, ends]


class ShortConv(VmapByLoopFunction):
    """(x, weight, bias, state, spec) -> (y, last inputs). Saves only its inputs; recomputes the rest."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, spec: ConvSpec) -> tuple[Tensor, Tensor]:
        tiles = ConvTiles(x, weight, bias, state, spec)
        y, final_state = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
        for tile in tiles:
            inputs, sums = tiles.convolve(tile)
            y[:, tile.start : tile.end] = F.silu(sums, inplace=True) if spec.silu else sums
            if tile.last:
                final_state[tile.states] = inputs[:, tile.end - tile.start :]
        tiles.work.release()
        return y, final_state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.spec = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*ShortConvBackward.apply(dy, d_final, *ctx.saved_tensors, ctx.spec), None)


class ShortConvBackward(OnceDifferentiable):
    """(dy, d_final, x, weight, bias, state, spec) -> the gradients of x, weight, bias and state."""

    @staticmethod
    def forward(dy: Tensor | None, d_final: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        x, _, bias, state, spec = args
        dy = torch.zeros_like(x) if dy is None else dy
        tiles, history = ConvTiles(*args), state.shape[1]
        dx, d_state = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
        d_taps, d_bias = torch.zeros_like(tiles.taps), torch.zeros_like(tiles.taps[0])
        carry = tiles.work("carry", x.shape[0], history, x.shape[2])
        for tile in reversed(list(tiles)):
            inputs, sums = tiles.convolve(tile)
            if tile.last:
                carry.zero_() if d_final is None else carry.copy_(d_final[tile.states])
            n = tile.end - tile.start
            d_sums = tiles.work("d_sums", *sums.shape).copy_(dy[:, tile.start : tile.end])
            if spec.silu:
                d_sums = torch.ops.aten.silu_backward(d_sums, sums)
            # The first `history` inputs belong to the previous tile, which receives their gradient by `carry`.
            d_inputs = tiles.work("d_inputs", *inputs.shape)
            d_inputs[:, :n].zero_()
            d_inputs[:, n:] = carry
            for w, tap in enumerate(tiles.taps):
                d_inputs[:, w : w + n].addcmul_(d_sums, tap)
                d_taps[w] += torch.linalg.vecdot(inputs[:, w : w + n], d_sums, dim=1).sum(0)
            d_bias += d_sums.sum((0, 1))
            dx[:, tile.start : tile.end] = d_inputs[:, history:]
            carry.copy_(d_inputs[:, :history])
            if tile.first:
                d_state[tile.states] = carry
        tiles.work.release()
        return dx, d_taps.mT, None if bias is None else d_bias, d_state


class ConvTile(NamedTuple):
    start: int  # token
    end: int
    states: slice  # of the document, or of the whole batch
    first: bool  # in its document
    last: bool


class ConvTiles:
    """The tiles of all documents (or of the batch), and the convolution of one tile."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, spec: ConvSpec) -> None:
        dtype = compute_dtype(x)
        self.x, self.state, self.bounds = x, state, spec.bounds
        self.taps = weight.to(dtype).mT.contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        self.work = Workspace(x, dtype)

    def __iter__(self) -> Iterator[ConvTile]:
        B, _, D = self.x.shape
        size = max(32, 2 * self.state.shape[1], TILE_ELEMENTS // max(1, B * D))
        for document, (start, end) in enumerate(itertools.pairwise(self.bounds)):
            states = slice(document, document + 1) if len(self.bounds) > 2 else slice(0, B)
            # An empty document has one empty tile, which returns its state unchanged.
            for tile_start in range(start, max(end, start + 1), size):
                tile_end = min(tile_start + size, end)
                yield ConvTile(tile_start, tile_end, states, tile_start == start, tile_end == end)

    def convolve(self, tile: ConvTile) -> tuple[Tensor, Tensor]:
        """Returns the tile's inputs and the W - 1 before them [B, W - 1 + n, D], and the sums before the activation."""
        B, _, D = self.x.shape
        history, n = self.state.shape[1], tile.end - tile.start
        inputs = self.work("inputs", B, history + n, D)
        inputs[:, history:] = self.x[:, tile.start : tile.end]
        if tile.first:
            inputs[:, :history] = self.state[tile.states]
        else:  # a tile is longer than a filter: these tokens belong to the same document
            inputs[:, :history] = self.x[:, tile.start - history : tile.start]
        sums = self.work("sums", B, n, D)
        torch.mul(inputs[:, history:], self.taps[history], out=sums)
        for w in range(history):
            sums.addcmul_(inputs[:, w : w + n], self.taps[w])
        return inputs, sums if self.bias is None else sums.add_(self.bias)
