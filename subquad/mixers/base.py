"""`Mixer`, the base of all token mixers: projections, short convolutions, feature map, output norm and gate.

A mixer maps `x: [B, T, hidden]` to `y: [B, T, hidden]` without any knowledge of `transformers`. It runs on a sequence,
continues from a state, or returns its mixing matrix.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from subquad import ops
from subquad.mixers.conv import apply_short_convs
from subquad.mixers.feature_maps import FEATURE_SCALES, activate, initial_map
from subquad.mixers.gate_init import GATE_BIAS_INIT
from subquad.mixers.norms import head_norm, qk_norm
from subquad.mixers.options import AttentionSpec, DecayOptions, MixerOptions
from subquad.mixers.packing import PackedDocuments
from subquad.mixers.rotary import apply_rotary
from subquad.mixers.states import State, loaded, stored
from subquad.ops.checks import Inputs
from subquad.ops.recurrence import unchecked_step
from subquad.utils import UserError

CalibrationGrid = tuple[tuple[str, tuple[float, ...]], ...]

PAD_VALUES = {"k": 0.0, "v": 0.0, "log_decay": 0.0, "beta": 0.0, "input_gate": -30.0, "forget_gate": 1e4}
"""Values of the op's inputs at padding, which then neither writes to the state nor decays it: logsigmoid(1e4) is 0, and
with k = v = 0 the input gate affects only mLSTM's stabilizer, on which the output does not depend."""


class Mixer(nn.Module):
    """Base of all mixers: H query heads read G states, `num_states`; G is H, or with `state_heads="key_value"` the
    number of the teacher's key/value heads. Query head h reads state h // (H / G).

    A subclass defines `Options` and `gates`; where it has parameters of its own also `build_gates`, and `reset_gates`
    or `set_log_decay`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[MixerOptions]] = MixerOptions
    has_key_projection: ClassVar[bool] = True
    gate_before_norm: ClassVar[bool] = False
    normalized_ops: tuple[Callable, Callable] | None = None
    """An operator with a normalizer, and its matrix, in place of `ops.step`, `ops.chunk` and `ops.matrix`."""
    norm_eps: float = 1e-8
    """Epsilon of the output norm; see `head_norm`."""
    feature_dim: int
    """Channels of the queries and keys that the op gets, which are the rows of each state."""
    CALIBRATED_PARAMS: CalibrationGrid = ()
    """Quantities that calibration sets per state, with the values that it tries: "half_life" is set by
    `set_half_life(values: [G])`."""
    VALUE_PATH_PARAMS: ClassVar[frozenset[str]] = frozenset(
        {"v_proj", "v_conv", "o_proj", "o_norm", "g_proj", "self_augmentation"}
    )
    """Modules and parameters on which the mixing matrix does not depend."""

    def __init__(self, spec: AttentionSpec, memory_only: bool = False, **options: Any):
        """
        Args:
            spec: the attention that the mixer replaces.
            memory_only: without projections and skips, for queries, keys and values that attention computes
                (`subquad.modeling.near_far`).
            options: of `Options`.
        """
        super().__init__()
        self.spec, self.memory_only = spec, memory_only
        self.options = self.Options.from_dict(options)
        self.has_biases: bool = getattr(self.options, "biases", True)
        H, K, V, D = spec.num_heads, spec.head_dim, spec.value_dim, spec.hidden_size
        G = self.num_states = H if self.options.state_heads == "query" else spec.num_kv_heads
        qkv_bias, output_bias = spec.qkv_bias and self.has_biases, spec.output_bias and self.has_biases
        if not memory_only:
            self.q_proj = nn.Linear(D, H * K, bias=qkv_bias)
            if self.has_key_projection:
                self.k_proj = nn.Linear(D, G * K, bias=qkv_bias)
            self.v_proj = nn.Linear(D, G * V, bias=qkv_bias)
            self.o_proj = nn.Linear(H * V, D, bias=output_bias)
        if width := self.options.short_conv:
            self.q_conv = nn.Parameter(torch.empty(H * K, width))
            if self.has_key_projection:
                self.k_conv = nn.Parameter(torch.empty(G * K, width))
            self.v_conv = nn.Parameter(torch.empty(G * V, width))
        if self.options.qk_norm:
            if spec.qk_norm is None:
                raise UserError("qk_norm: got True, expected False: the teacher has no supported norm of q and k")
            for name, heads in {"q": H, "k": G}.items() if self.has_key_projection else [("q", H)]:
                setattr(self, f"{name}_norm", nn.Parameter(torch.empty(heads, K)))
                if spec.qk_norm.startswith("layer"):
                    setattr(self, f"{name}_norm_bias", nn.Parameter(torch.empty(heads, K)))
        self.build_feature_maps(H, G, K)
        if self.options.output_norm:
            self.o_norm = nn.Parameter(torch.empty(H, V))
        if self.options.output_gate != "none":
            self.g_proj = nn.Linear(D, H * V, bias=self.has_biases)
        shared = {name for name, _ in self.named_parameters()}
        self.build_gates()
        self.gate_names = [name for name, _ in self.named_parameters() if name not in shared]
        self.reset_parameters()

    def build_feature_maps(self, H: int, G: int, K: int) -> None:
        """Creates the learned maps of H queries and G keys of K channels, if the options ask for them."""
        if self.options.qk_activation == "ones":
            self.feature_dim = 1
            return
        features = round(self.options.expand_k * K)
        if features < 1 or not math.isclose(features, self.options.expand_k * K):
            expected = f"expected a multiple of 1/{K}, for whole channels of heads of {K}"
            raise UserError(f"expand_k: got {self.options.expand_k}, {expected}")
        hedgehog = self.options.qk_activation == "hedgehog"
        self.feature_dim = features * (2 if hedgehog else 1)
        if hedgehog or features != K:
            self.q_map = nn.Parameter(torch.empty(H, features, K))
            if self.has_key_projection:
                self.k_map = nn.Parameter(torch.empty(G, features, K))
            self.CALIBRATED_PARAMS = (("feature_scale", FEATURE_SCALES), *self.CALIBRATED_PARAMS)

    # ------------------------------------------------------------------ defined by each mixer

    def build_gates(self) -> None:
        """Creates the parameters of the gates."""

    def reset_gates(self) -> None:
        """Initializes the parameters of the gates: zero, but for the decay if `half_life` is an option."""
        for name in self.gate_names:
            nn.init.zeros_(self.get_parameter(name))
        if isinstance(self.options, DecayOptions):
            shortest = self.per_state(self.options.half_life)
            ratio = (self.options.longest_half_life or self.options.half_life) / self.options.half_life
            self.set_half_life(shortest * ratio ** torch.linspace(0, 1, self.num_states).to(shortest))

    def set_half_life(self, half_life: Tensor) -> None:
        """Sets the decay of each state to a half-life of `half_life: [G]` tokens where its projection is zero."""
        self.set_log_decay(-math.log(2.0) / half_life.double())

    def set_log_decay(self, log_decay: Tensor) -> None:
        """Sets the bias of each state to that `log_decay: [G]`, float64, where the projection is zero."""
        raise NotImplementedError

    def gates(self, x: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns further inputs of the op, such as `log_decay`, computed from `x: [B, T, hidden]`.

        `inputs` holds q, k and v; the returned dict may replace them. Padding is masked afterwards.
        """
        return {}

    def value_map(self, v: Tensor) -> Tensor:
        """Activation of the values `[B, T, G, V]` after their convolution."""
        return v

    def add_skip(self, o: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Adds the mixer's skip connection to the op's output `[B, T, H, V]`, before norm and gate."""
        return o

    # ------------------------------------------------------------------ initialization

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Default initialization: random projections, identity convolutions, open gates, norm weights of one."""
        for projection in self.projections().values():
            nn.init.normal_(projection.weight, std=self.spec.initializer_range)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for weight in self.conv_weights().values():
            nn.init.zeros_(weight)
            weight[:, -1] = 1.0
        for name, parameter in self.qk_norms().items():
            nn.init.constant_(parameter, float(not name.endswith("bias")))
        if self.feature_maps():
            self.set_feature_scale(self.per_state(1.0))
        if self.options.output_gate != "none":
            nn.init.zeros_(self.g_proj.weight)
            if self.has_biases:
                nn.init.constant_(self.g_proj.bias, GATE_BIAS_INIT[self.options.output_gate])
        self.set_output_scale(torch.ones(self.spec.num_heads))
        self.reset_gates()

    @torch.no_grad()
    def set_output_scale(self, rms: Tensor) -> None:
        """Sets the output norm so that head h, gate included, has the root mean square `rms[h]`.

        rms: `[H]`, or `[H, V]` for one value per channel.
        """
        if self.options.output_norm:
            gate = 0.5 if self.options.output_gate == "sigmoid" and not self.gate_before_norm else 1.0
            rms = rms if rms.dim() == 2 else rms.unsqueeze(-1)
            self.o_norm.copy_((rms / gate).to(self.o_norm).expand_as(self.o_norm))

    def init_from_teacher(self, rms: Tensor, x: Tensor) -> None:
        """Initializes the mixer from statistics of the attention that it replaces.

        Args:
            rms: root mean square of the output of each attention head, `[H]`.
            x: inputs of the attention, `[tokens, hidden]`.
        """
        self.set_output_scale(rms)

    def per_state(self, value: float) -> Tensor:
        """`value` for each state, `[G]`, in float64, on the device of the parameters."""
        device = next((p.device for p in self.parameters()), None)
        return torch.full((self.num_states,), value, dtype=torch.float64, device=device)

    def for_queries(self, x: Tensor) -> Tensor:
        """`x: [B, T, G, ...]` for each query head, `[B, T, H, ...]`."""
        queries = self.spec.num_heads // self.num_states
        return x if queries == 1 else x.repeat_interleave(queries, 2)

    @torch.no_grad()
    def set_feature_scale(self, scale: Tensor) -> None:
        """Sets the learned maps of q and k of each state to their initial values times `scale: [G]`."""
        _, features, channels = self.q_map.shape
        initial = initial_map(features, channels).to(self.q_map)
        for weight in self.feature_maps().values():
            of_heads = scale.to(initial).repeat_interleave(len(weight) // self.num_states)
            weight.copy_(of_heads[:, None, None] * initial)

    def projections(self) -> dict[str, nn.Linear]:
        """The projections that a teacher's attention also has: q, k (unless the mixer has none), v and o; none with
        `memory_only`."""
        if self.memory_only:
            return {}
        found = {"q": self.q_proj, "v": self.v_proj, "o": self.o_proj}
        return {**found, "k": self.k_proj} if self.has_key_projection else found

    def conv_weights(self) -> dict[str, nn.Parameter]:
        """Weights of the short convolutions, `[D, W]`, of q, k and v."""
        names = [name for name in ("q", "k", "v") if f"{name}_conv" in self._parameters]
        return {name: getattr(self, f"{name}_conv") for name in names}

    def feature_maps(self) -> dict[str, nn.Parameter]:
        """Learned maps of q `[H, F, K]` and k `[G, F, K]`; empty if the options ask for none."""
        return {n: getattr(self, f"{n}_map") for n in ("q", "k") if f"{n}_map" in self._parameters}

    def qk_norms(self) -> dict[str, nn.Parameter]:
        """Weights and biases of the teacher's norms of q `[H, K]` and k `[G, K]`; empty without `options.qk_norm`."""
        names = ("q_norm", "q_norm_bias", "k_norm", "k_norm_bias")
        return {name: getattr(self, name) for name in names if name in self._parameters}

    # ------------------------------------------------------------------ running

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        doc_ids: Tensor | PackedDocuments | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        """Runs the mixer on a sequence.

        Args:
            x: `[B, T, hidden]`.
            position_embeddings: cos and sin of the teacher's rotary embedding, `[B, T, R]`.
            doc_ids: None; or a padding mask, bool `[B, T]`, False at padding; or document ids, integer `[B, T]`, 0 at
                padding, or the `PackedDocuments` of such ids. The state is reset where a document begins.
            state: the state after the preceding tokens, as returned by an earlier call.

        Returns:
            `y: [B, T, hidden]`, and the state after the last token: tensors with the batch as their first dimension.
            With document ids y is zero at padding, and the state is that of each row's last document.

        Raises:
            ValueError: document ids together with a state.
        """
        if torch.compiler.is_compiling() and state is not None and doc_ids is None and x.shape[1] == 1:
            return _shared_step(self, x, position_embeddings, state)
        return self.run(x, position_embeddings, doc_ids, state)

    def run(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        doc_ids: Tensor | PackedDocuments | None,
        state: State | None,
    ) -> tuple[Tensor, State]:
        """What `forward` computes."""
        documents = padding_mask = cu_seqlens = None
        if isinstance(doc_ids, Tensor) and doc_ids.dtype == torch.bool:
            padding_mask = doc_ids.unsqueeze(-1)
        elif doc_ids is not None:
            documents = doc_ids if isinstance(doc_ids, PackedDocuments) else PackedDocuments(doc_ids)
            if state is not None:
                raise ValueError("doc_ids: packed documents cannot continue from a state; call the mixer without one")
            x, cu_seqlens = documents.pack(x), documents.cu_seqlens
            if position_embeddings is not None:
                position_embeddings = documents.pack(position_embeddings[0]), documents.pack(position_embeddings[1])
        inputs, conv_states = self.op_inputs(x, position_embeddings, padding_mask, state, cu_seqlens)
        before = loaded(None if state is None else state[len(conv_states) :], inputs["q"])
        o, op_state = self.run_op(inputs, before, cu_seqlens)
        y, states = self.output(o, x, inputs), (*conv_states, *stored(op_state, self.options.state_dtype))
        if documents is None:
            return y, states
        return documents.unpack(y), tuple(state[documents.last_documents] for state in states)

    def pre_norm_output(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The output before norm and gate, skip connection included, `[B, T, H, V]`."""
        inputs, _ = self.op_inputs(x, position_embeddings)
        return self.add_skip(self.run_op(inputs)[0], inputs)

    def mixing_matrix(self, inputs: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        """The mixing matrix M of the op, `[B, H, T, T]`, or the given rows of it: the op's output is M v."""
        without_v: dict[str, Any] = {name: t for name, t in inputs.items() if name != "v"}
        return (self.normalized_ops[1] if self.normalized_ops else ops.matrix)(**without_v, rows=rows)

    def run_op(
        self, inputs: dict[str, Any], state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The op's output `[B, T, H, V]` and its new state."""
        one_token = inputs["q"].shape[1] == 1 and cu_seqlens is None
        if self.normalized_ops:
            form = "step" if one_token else "chunk"
            return self.normalized_ops[0](**inputs, initial_state=state or None, form=form, cu_seqlens=cu_seqlens)
        initial_state = state[0] if state else None
        if one_token:
            o, new_state = unchecked_step(Inputs(**inputs, initial_state=initial_state))
        else:
            o, new_state = ops.chunk(**inputs, initial_state=initial_state, cu_seqlens=cu_seqlens)
        return o, (new_state,)

    # ------------------------------------------------------------------ before and after the op

    def op_inputs(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        padding_mask: Tensor | None = None,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """All inputs of the op by argument name, and the new states of the convolutions.

        padding_mask: bool `[B, T, 1]`, False at padding.
        """
        inputs = {"q": self.q_proj(x), "v": self.v_proj(x)}
        if self.has_key_projection:
            inputs["k"] = self.k_proj(x)
        conv_states = apply_short_convs(inputs, self.conv_weights(), padding_mask, state, cu_seqlens)
        for name, t in inputs.items():
            heads = self.spec.num_heads if name == "q" else self.num_states
            inputs[name] = t.view(*x.shape[:2], heads, t.shape[-1] // heads)  # -1 is ambiguous without tokens
        inputs["v"] = self.value_map(inputs["v"])
        for name in ("q", "k"):
            if name in inputs:
                if self.options.qk_norm:
                    norm = getattr(self, f"{name}_norm"), getattr(self, f"{name}_norm_bias", None)
                    inputs[name] = qk_norm(inputs[name], self.spec.qk_norm or "", self.spec.qk_norm_eps, *norm)
                inputs[name] = self.feature_map(name, inputs[name], position_embeddings)
        inputs.update(self.gates(x, inputs))
        if padding_mask is not None:
            for name in PAD_VALUES.keys() & inputs.keys():
                padding = ~padding_mask.view(*padding_mask.shape[:2], *[1] * (inputs[name].dim() - 2))
                inputs[name] = inputs[name].masked_fill(padding, PAD_VALUES[name])
        return inputs, conv_states

    def feature_map(
        self,
        name: str,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        heads: Tensor | slice | None = None,
    ) -> Tensor:
        """Rotary embedding, learned map and activation (`feature_maps`), `[B, T, H or G, feature_dim]`.

        name: "q" for queries `[B, T, H, K]`, "k" for keys `[B, T, G, K]`. heads: which of the heads x has; None: all.
        """
        if self.options.rotary and self.spec.rotary is not None and position_embeddings is not None:
            x = apply_rotary(x, *position_embeddings, self.spec.rotary)
        if f"{name}_map" in self._parameters:
            weight = getattr(self, f"{name}_map")
            x = torch.einsum("bthk,hfk->bthf", x, weight if heads is None else weight[heads])
        return activate(x, self.options.qk_activation)

    def output(self, o: Tensor, x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """From the op's output `[B, T, H, V]` to the mixer's output `[B, T, hidden]`: norm, gate, projection."""
        o = self.add_skip(o, inputs)
        gate = self.output_gate(x)
        if gate is not None and self.gate_before_norm:
            o = o * gate
        if self.options.output_norm:
            o = head_norm(o, self.o_norm, self.norm_eps)
        if gate is not None and not self.gate_before_norm:
            o = o * gate
        return self.o_proj(o.flatten(-2))

    def output_gate(self, x: Tensor) -> Tensor | None:
        """The output gate `[B, T, H, V]` for `x: [B, T, hidden]`; None without one."""
        if self.options.output_gate == "none":
            return None
        g = self.g_proj(x).view(*x.shape[:2], self.spec.num_heads, self.spec.value_dim)
        return F.silu(g) if self.options.output_gate == "swish" else torch.sigmoid(g)


@torch.compiler.nested_compile_region
def _shared_step(mixer: Mixer, x: Tensor, rotary: tuple[Tensor, Tensor] | None, state: State) -> tuple[Tensor, State]:
    """`Mixer.run` of one token, compiled once for all layers. Results of such a region must not share memory."""
    y, states = mixer.run(x, rotary, None, state)
    return y, tuple(x.clone() for x in states)
