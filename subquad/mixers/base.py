"""What every token mixer shares: projections, short convolutions, activations, masking, output norm, gate, and the
three ways to run (on a sequence, from a state, as a mixing matrix).

A mixer is a row of the table in docs/mixers.md: it sets its options' defaults and says what its gates are. It knows
nothing of `transformers`: it maps `x: [B, T, hidden]` to `y: [B, T, hidden]`.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad import ops
from subquad.mixers.conv import convolve_past_padding, convolve_token
from subquad.mixers.norms import head_norm, qk_norm
from subquad.mixers.options import MixerOptions
from subquad.mixers.rotary import rotate
from subquad.mixers.spec import AttentionSpec
from subquad.utils import UserError

State = tuple[Tensor, ...]
CalibrationGrid = tuple[tuple[str, tuple[float, ...]], ...]
HALF_LIVES = 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0
LONGEST_HALF_LIVES = HALF_LIVES[3:]
GATE_BIAS_INIT = {"swish": 1.2784645427610738, "sigmoid": 0.0}
"""Gate kinds, and the pre-activation at which a fresh gate stands: swish(1.278...) = 1; sigmoid(0) = 1/2, whose
gradient is largest and whose factor the output norm takes back."""


PAD_VALUES = {"k": 0.0, "v": 0.0, "log_decay": 0.0, "beta": 0.0, "input_gate": -30.0, "forget_gate": 1e4}
"""What each argument of a core is at padding: nothing is written and nothing decays. The log-sigmoid of 1e4 is 0, and
with k = v = 0 the input gate moves only mLSTM's stabiliser, on which its output does not depend."""


def half_life_decay(half_life: Tensor) -> Tensor:
    """Log decay a token at which a memory halves in `half_life` tokens, in float64."""
    return -math.log(2.0) / half_life.double()


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0, in the dtype of y, which should be float64."""
    return y + torch.log(-torch.expm1(-y))


class Mixer(nn.Module):
    """Base of all mixers.

    A subclass defines `Options`, `gates` (what goes to the op beside q, k, v) and, where it has parts of its own,
    `build` and `reset_gates`. `op` names the core: "linear" (`ops.chunk`), "normalized" or "mlstm".
    """

    name: ClassVar[str]
    Options: ClassVar[type[MixerOptions]] = MixerOptions
    has_key_projection: ClassVar[bool] = True
    gate_before_norm: ClassVar[bool] = False
    norm_eps: float = 1e-8
    """Of the output norm: see `head_norm`."""
    CALIBRATED_PARAMS: CalibrationGrid = ()
    """What fresh gates can be set to, head by head, and the values that calibration tries: `half_life` is set by
    `set_half_life(values: [H])`."""
    VALUE_PATH_PARAMS: ClassVar[frozenset[str]] = frozenset(
        {"v_proj", "v_conv", "o_proj", "o_norm", "g_proj", "augmentation"}
    )
    """Parts that the mixing matrix does not depend on."""

    def __init__(self, spec: AttentionSpec, **options: Any):
        super().__init__()
        self.spec = spec
        self.options = self.Options.from_dict(options)
        self.has_biases: bool = getattr(self.options, "biases", True)
        H, K, V, D = spec.num_heads, spec.head_dim, spec.value_dim, spec.hidden_size
        qkv_bias, output_bias = spec.qkv_bias and self.has_biases, spec.output_bias and self.has_biases
        self.q_proj = nn.Linear(D, H * K, bias=qkv_bias)
        if self.has_key_projection:
            self.k_proj = nn.Linear(D, H * K, bias=qkv_bias)
        self.v_proj = nn.Linear(D, H * V, bias=qkv_bias)
        self.o_proj = nn.Linear(H * V, D, bias=output_bias)
        if self.options.short_conv:
            self.q_conv = nn.Parameter(torch.empty(H * K, self.options.short_conv))
            if self.has_key_projection:
                self.k_conv = nn.Parameter(torch.empty(H * K, self.options.short_conv))
            self.v_conv = nn.Parameter(torch.empty(H * V, self.options.short_conv))
        if self.options.qk_norm:
            if spec.qk_norm is None:
                raise UserError("qk_norm: the teacher has no norm of queries and keys, or none that can be kept")
            for part in ("q", "k") if self.has_key_projection else ("q",):
                setattr(self, f"{part}_norm", nn.Parameter(torch.empty(H, K)))
                if spec.qk_norm.startswith("layer"):
                    setattr(self, f"{part}_norm_bias", nn.Parameter(torch.empty(H, K)))
        if self.options.output_norm:
            self.o_norm = nn.Parameter(torch.empty(H, V))
        if self.options.output_gate != "none":
            self.g_proj = nn.Linear(D, H * V, bias=self.has_biases)
        self.build()
        self.reset_parameters()

    # ------------------------------------------------------------------ what a mixer defines

    def build(self) -> None:
        """Creates the parameters of the gates."""

    def reset_gates(self) -> None:
        """Sets them to their neutral start."""

    def per_head(self, value: float) -> Tensor:
        """`[H]`, float64, on the device of the parameters."""
        return torch.full((self.spec.num_heads,), value, dtype=torch.float64, device=self.q_proj.weight.device)

    def gates(self, x: Tensor, op_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the core takes beside `core`'s q, k, v, from `x: [B, T, hidden]`; may also give q, k or v anew.
        Padding is masked afterwards, in one place."""
        return {}

    def value(self, v: Tensor) -> Tensor:
        """Values `[B, T, H, V]` on their way from the convolution into the core."""
        return v

    def op_scale(self) -> float | None:
        """Scale of the core; None is `head_dim ** -0.5`."""
        return None

    def add_skip(self, o: Tensor, core: dict[str, Tensor]) -> Tensor:
        """What is added to the core's output, `[B, T, H, V]`, before norm and gate."""
        return o

    # ------------------------------------------------------------------ the start

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The neutral start: random projections, convolutions as the identity, gates open, norms at one."""
        for projection in self.projections().values():
            nn.init.normal_(projection.weight, std=self.spec.initializer_range)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for kernel in self.conv_weights().values():
            nn.init.zeros_(kernel)
            kernel[:, -1] = 1.0
        for name, parameter in self.qk_norms().items():
            nn.init.constant_(parameter, float(not name.endswith("bias")))
        if self.options.output_gate != "none":
            nn.init.zeros_(self.g_proj.weight)
            if self.has_biases:
                nn.init.constant_(self.g_proj.bias, GATE_BIAS_INIT[self.options.output_gate])
        self.set_output_scale(torch.ones(self.spec.num_heads))
        self.reset_gates()

    @torch.no_grad()
    def set_output_scale(self, rms: Tensor) -> None:
        """Output norms so that head h, gate included, starts at root mean square `rms[h]` (`[H, V]`: by channel)."""
        if self.options.output_norm:
            fresh = 0.5 if self.options.output_gate == "sigmoid" and not self.gate_before_norm else 1.0
            rms = rms if rms.dim() == 2 else rms.unsqueeze(-1)
            self.o_norm.copy_((rms / fresh).to(self.o_norm).expand_as(self.o_norm))

    def init_from_teacher(self, rms: Tensor, x: Tensor) -> None:
        """A fresh mixer in the place of an attention whose heads give values of root mean square `rms: [H]`, and that
        is given tokens such as `x: [tokens, hidden]`."""
        self.set_output_scale(rms)

    def projections(self) -> dict[str, nn.Linear]:
        """The projections that a teacher's attention has too, by its names."""
        found = {"q": self.q_proj, "v": self.v_proj, "o": self.o_proj}
        return {**found, "k": self.k_proj} if self.has_key_projection else found

    def conv_weights(self) -> dict[str, nn.Parameter]:
        """The short convolutions."""
        return {n: getattr(self, f"{n}_conv") for n in ("q", "k", "v") if hasattr(self, f"{n}_conv")}

    def qk_norms(self) -> dict[str, nn.Parameter]:
        """Weights and biases of the teacher's norms of queries and keys, `[H, K]`, by name, where they are kept."""
        names = ("q_norm", "q_norm_bias", "k_norm", "k_norm_bias")
        return {name: getattr(self, name) for name in names if name in self._parameters}

    # ------------------------------------------------------------------ the three ways to run

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        doc_ids: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        """`x: [B, T, hidden]` and the state after the tokens before it, to `y: [B, T, hidden]` and the state after it.

        documents: None, or bool `[B, T]`, False at padding, or integer `[B, T]`: 0 at padding, else the number of the
            document; states do not cross from one document into the next.
        state: what an earlier call returned. A tuple of tensors, each with the batch first.
        """
        if doc_ids is not None and doc_ids.dtype != torch.bool:
            return self._packed(x, position_embeddings, doc_ids, state)
        keep = None if doc_ids is None else doc_ids.unsqueeze(-1)
        core, convs = self.op_inputs(x, position_embeddings, keep, state)
        recurrent = None if state is None else state[len(convs) :]
        o, after = self.run_op(core, recurrent, None)
        return self.output(o, x, core), (*convs, *after)

    def mixer_output(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What norm and gate are given, `[B, T, H, V]`."""
        core, _ = self.op_inputs(x, position_embeddings, None, None)
        return self.add_skip(self.run_op(core, None, None)[0], core)

    def matrix(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The mixing matrix of the core, `[B, H, T, T]`: core output = M v."""
        core, _ = self.op_inputs(x, position_embeddings, None, None)
        return self.mixing_matrix(core)

    def mixing_matrix(self, core: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        """The rows of the mixing matrix, from what the core takes."""
        inputs: dict[str, Any] = {name: t for name, t in core.items() if name != "v"}
        return ops.matrix(**inputs, scale=self.op_scale(), rows=rows)

    def run_op(self, core: dict[str, Any], state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        first = None if not state else state[0]
        if core["q"].shape[1] == 1 and cu_seqlens is None:
            o, after = ops.step(**core, initial_state=first, scale=self.op_scale())
        else:
            o, after = ops.chunk(**core, initial_state=first, scale=self.op_scale(), cu_seqlens=cu_seqlens)
        return o, (after,)

    def _packed(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, doc_ids: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """Rows that hold several documents each, run as one long row of documents without their padding: what comes
        out there is zero. The state after a row is that of its last document."""
        if state is not None:
            raise ValueError("packed documents cannot be continued from a state; run them without a cache")
        B, T = doc_ids.shape
        real = doc_ids != 0
        real[:, 0] |= ~real.any(1)  # a row of padding alone counts as one token, so that it too has a state
        place = real.flatten().nonzero().flatten()
        number, row = doc_ids.flatten()[place], place // T
        starts = torch.ones_like(place, dtype=torch.bool)
        starts[1:] = (number[1:] != number[:-1]) | (row[1:] != row[:-1])
        begin = starts.nonzero().flatten()
        cu_seqlens = torch.cat([begin, begin.new_tensor([len(place)])])

        def packed(t: Tensor) -> Tensor:
            return t.expand(B, T, -1).reshape(1, B * T, -1)[:, place]

        if position_embeddings is not None:
            position_embeddings = packed(position_embeddings[0]), packed(position_embeddings[1])
        x = packed(x)
        core, convs = self.op_inputs(x, position_embeddings, None, None, cu_seqlens)
        o, after = self.run_op(core, None, cu_seqlens)
        y = self.output(o, x, core)[0]
        y = y.new_zeros(B * T, y.shape[-1]).index_copy(0, place, y).view(B, T, -1)
        last = starts.cumsum(0)[real.sum(1).cumsum(0) - 1] - 1
        return y, tuple(t[last] for t in (*convs, *after))

    # ------------------------------------------------------------------ into the core and out of it

    def op_inputs(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        padding_mask: Tensor | None,
        state: State | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """Everything that the core takes, by the names of the op's arguments, and the convolutions' states."""
        H = self.spec.num_heads
        flat = {name: p(x) for name, p in self.projections().items() if name != "o"}
        kernels = self.conv_weights()
        convs: list[Tensor] = []
        if kernels and state is not None and x.shape[1] == 1 and padding_mask is None:
            convs = convolve_token(flat, kernels, state[: len(kernels)])
            kernels = {}
        for name, kernel in kernels.items():
            before = None if state is None else state[len(convs)]
            if padding_mask is not None:
                flat[name], after = convolve_past_padding(flat[name], kernel, padding_mask, before)
            else:
                flat[name], after = ops.short_conv(flat[name], kernel, initial_state=before, cu_seqlens=cu_seqlens)
            convs.append(after)
        core = {name: t.unflatten(-1, (H, -1)) for name, t in flat.items()}
        core["v"] = self.value(core["v"])
        for name in ("q", "k"):
            if name in core:
                if self.options.qk_norm:
                    norm = getattr(self, f"{name}_norm"), getattr(self, f"{name}_norm_bias", None)
                    core[name] = qk_norm(core[name], self.spec.qk_norm or "", self.spec.qk_norm_eps, *norm)
                core[name] = self.feature_map(core[name], position_embeddings)
        core.update(self.gates(x, core))
        if padding_mask is not None:
            for name in PAD_VALUES.keys() & core.keys():
                hidden = ~padding_mask.view(*padding_mask.shape[:2], *[1] * (core[name].dim() - 2))
                core[name] = core[name].masked_fill(hidden, PAD_VALUES[name])
        return core, tuple(convs)

    def feature_map(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rotary embedding and activation of queries or keys, `[B, T, H, K]`."""
        if self.options.rotary and self.spec.rotary is not None and position_embeddings is not None:
            x = rotate(x, *position_embeddings, self.spec.rotary)
        return activate(x, self.options.qk_activation)

    def output(self, o: Tensor, x: Tensor, core: dict[str, Tensor]) -> Tensor:
        """From the core's output `[B, T, H, V]` to the block's output `[B, T, hidden]`: norm, gate, projection."""
        o = self.add_skip(o, core)
        gate = self.gate(x)
        if gate is not None and self.gate_before_norm:
            o = o * gate
        if self.options.output_norm:
            o = head_norm(o, self.o_norm, self.norm_eps)
        if gate is not None and not self.gate_before_norm:
            o = o * gate
        return self.o_proj(o.flatten(-2))

    def gate(self, x: Tensor) -> Tensor | None:
        if self.options.output_gate == "none":
            return None
        g = self.g_proj(x).unflatten(-1, (self.spec.num_heads, -1))
        return F.silu(g) if self.options.output_gate == "swish" else torch.sigmoid(g)


def activate(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "elu1":
        return F.elu(x) + 1
    return F.relu(x) if kind == "relu" else x
