"""The mixing matrix of a layer with near and far parts.

    (1 - m) P_near + m M_far                P_near + M_far with the merge `add`

P_near are the attention probabilities, M_far is the matrix of the memory's op, its columns moved from the time at which
a token is written to the token. Where the memory's output is normed, the rows of M_far are divided by the root mean
square of what is read, and multiplied by that of the norm's weights of the head: a matrix cannot hold a weight per
channel of the values.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import ops
from subquad.mixers.norms import upcast
from subquad.modeling.attention.activations import hidden_states_of
from subquad.modeling.attention.banded import Implementation, Slots
from subquad.modeling.far_call import FarCall
from subquad.modeling.merge import TINY

if TYPE_CHECKING:
    from subquad.modeling.near_far import NearFarLayer


class GroupMatrix(NamedTuple):
    """The far part of one group of heads. heads: indices of its query heads. inputs: of the op, without v. scale: of
    the rows of its matrix, `[B, h, T, 1]`. delay: tokens between a token and its writing. share: m, `[B, h, T, 1]`;
    None with the merge `add`."""

    heads: Tensor
    inputs: dict[str, Tensor]
    scale: Tensor
    delay: int
    share: Tensor | None


class MatrixCall(FarCall):
    """Keeps what the matrices of the groups are computed from; leaves the near part as it is."""

    def begin(self, query: Tensor, key: Tensor, value: Tensor, order: Tensor | None) -> None:
        super().begin(query, key, value, order)
        self.groups: list[GroupMatrix] = []

    def run_op(
        self, inputs: dict[str, Any], states: tuple[Tensor, ...] | None, slots: Slots
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        self.inputs = {name: x for name, x in inputs.items() if name != "v"}
        inputs["v"] = inputs["v"].detach()  # stage 1 trains no values
        return super().run_op(inputs, states, slots)

    def __call__(self, index: int, slots: Slots, runner: Implementation, near: Tensor, lse: Any) -> Tensor:
        mixer, merge, group = self.layer.mixer, self.layer.merge, slots.group
        heads = group.queries(near.shape[2] // len(group.kv_heads), near.device)
        o, z = self.read(index, slots, runner.heads)
        scale = torch.ones_like(upcast(o[..., 0])) if z is None else 1 / z.clamp_min(TINY)
        if mixer.options.output_norm:
            weights = upcast(mixer.o_norm.detach()[heads]).square().mean(-1).sqrt()
            scale = scale * weights * torch.rsqrt(upcast(o).square().mean(-1) + mixer.norm_eps)
        m = None
        if merge.kind != "add":
            m = merge.share(near, z, *self.merge_inputs(slots, runner), lse, runner.heads).mT.unsqueeze(-1)
        delay = 0 if self.layer.memory == "all" else group.window or 0
        self.groups.append(GroupMatrix(heads, self.inputs, scale.mT.unsqueeze(-1), delay, m))
        return near


class NearFarMatrix:
    """Gives rows of the mixing matrix, `[B, H, rows, T]`, for the arguments of `forward` without padding and cache,
    where each row of the batch is one document; differentiable.

    probabilities: gives those of the near part.
    """

    def __init__(self, layer: "NearFarLayer", probabilities: Any, args: tuple, kwargs: dict[str, Any]):
        self.layer, self.near = layer, probabilities
        x = hidden_states_of(args, kwargs)
        self.call = MatrixCall(layer, x, None, None)
        self.call.groups, self.call.gates = [], {}
        if layer.has_memory:
            given = {name: value for name, value in kwargs.items() if name != "attention_mask"}
            layer.forward_local(None, args, given, None, self.call)

    def __call__(self, rows: slice = slice(None)) -> Tensor:
        P = self.near(rows)
        share = None if self.layer.merge.kind == "add" else self.share(rows).to(P.dtype)
        M = self.far(rows).to(P.dtype)
        return P + M if share is None else (1 - share) * P + share * M

    def outside(self, rows: slice = slice(None)) -> Tensor:
        """The memory's part of the rows, m M_far, in the columns `outside_columns`, `[B, H, rows, T]`."""
        M = self.far(rows)
        M = M if self.layer.merge.kind == "add" else self.share(rows).to(M.dtype) * M
        return M.masked_fill(~self.outside_columns(rows), 0)

    def outside_columns(self, rows: slice = slice(None)) -> Tensor:
        """Where a token has left the window of a row, and is in the head's memory; bool `[H, rows, T]`."""
        tokens, layer = torch.arange(self.call.x.shape[1], device=self.call.x.device), self.layer
        distance = tokens[rows, None] - tokens
        outside = distance.new_zeros(layer.spec.num_heads, *distance.shape, dtype=torch.bool)
        for group in layer.head_groups:
            if group.memory:
                heads = group.queries(layer.spec.num_heads // layer.spec.num_kv_heads, tokens.device)
                assert group.window is not None
                outside[heads] = (distance >= group.window) & (tokens >= group.sinks)
        return outside

    def values(self) -> Tensor | None:
        """As of `AttentionProbabilities`."""
        return self.near.values()

    def share(self, rows: slice = slice(None)) -> Tensor:
        """m, `[B, H, rows, 1]`; 0 for heads without a memory. Not with the merge `add`."""
        parts = [(group.heads, group.share[:, :, rows]) for group in self.call.groups if group.share is not None]
        return self.scatter(parts, rows, 1)

    def far(self, rows: slice = slice(None)) -> Tensor:
        """The matrix of what the memory reads, `[B, H, rows, T]`; zero for heads without a memory."""
        parts = []
        for group in self.call.groups:
            if self.layer.merge.has_normalizer:  # in place of a normalizer of the mixer's own
                inputs: dict[str, Any] = group.inputs
                M = ops.matrix(**inputs, rows=rows)
            else:
                M = self.layer.mixer.mixing_matrix(group.inputs, rows)
            parts.append((group.heads, F.pad(M[..., group.delay :], (0, group.delay)) * group.scale[:, :, rows]))
        return self.scatter(parts, rows, None)

    def scatter(self, parts: list[tuple[Tensor, Tensor]], rows: slice, width: int | None) -> Tensor:
        """The parts `[B, h, rows, width]` of some heads as one of all heads, zero elsewhere."""
        B, T, _ = self.call.x.shape
        length = len(range(*rows.indices(T)))
        out = self.call.x.new_zeros(B, self.layer.spec.num_heads, length, T if width is None else width)
        for heads, part in parts:
            out = out.index_copy(1, heads, part.to(out.dtype))
        return out
