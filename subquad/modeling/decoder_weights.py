"""Reads what stands around attention in a decoder by watching it run, and knows no model family by name.

One form is read: layers that add attention and then a gated MLP to what they are given, each behind an RMS norm, and a
head behind a last norm, as in Llama, Qwen and Mistral. Factors on the way (Granite's) are found and folded into the
weights behind them. Whatever else there is, is refused with what was found.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.modeling.attention.activations import layer_path
from subquad.modeling.attention.discovery import random_tokens
from subquad.modeling.attention.scores import hidden_states_of
from subquad.modeling.attention.tracing import same_values
from subquad.utils import UserError

TOLERANCE = 1e-4
"""Error, over the size of the values, below which two ways to compute something are the same in float32."""


@dataclass(frozen=True)
class DecoderLayerWeights:
    """One layer without its attention: weights of its norms `[hidden]`, what attention's output is multiplied with, and
    the MLP's matrices."""

    norm: Tensor
    attention_factor: float
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class DecoderWeights:
    """A decoder without its attentions: embedding and head `[vocabulary, hidden]` (None where it is the embedding), its
    layers, the weight of its last norm, and the epsilon of every norm."""

    embedding: Tensor
    layers: list[DecoderLayerWeights]
    norm: Tensor
    head: Tensor | None
    eps: float


ModuleIO = dict[nn.Module, tuple[Tensor, Tensor]]
"""What each module took and gave."""


@torch.no_grad()
def read_decoder(model: PreTrainedModel, paths: Sequence[str]) -> DecoderWeights:
    """Reads `model`; `paths` name, layer by layer, its attention or what stands in its place.

    Raises:
        UserError: something in it that models of Llama's kind do not have.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with record_io(model) as seen:
            logits = model(input_ids=random_tokens(model), use_cache=False).logits
    finally:
        for module, training in modes:
            module.training = training
    return DecoderReader(model, seen).read([model.get_submodule(path) for path in paths], paths, logits)


@contextmanager
def record_io(model: nn.Module) -> Iterator[ModuleIO]:
    """What the modules of `model` take and give while it lasts, as far as it is one tensor of hidden states."""
    seen: ModuleIO = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = output[0] if isinstance(output, tuple) else output
        taken = hidden_states_of(args, kwargs) if args or "hidden_states" in kwargs else None
        if isinstance(taken, Tensor) and isinstance(given, Tensor):
            seen[module] = taken, given

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in model.modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class ExportError(UserError):
    """Something that no target of an export has."""

    def __init__(self, reason: str):
        super().__init__(f"this model cannot be exported: {reason}")


class DecoderReader:
    """Reads the parts of one model from what they took and gave."""

    def __init__(self, model: PreTrainedModel, seen: ModuleIO):
        self.model, self.io = model, seen
        config = getattr(model.config, "base_config", model.config).get_text_config()
        values = vars(config).values()
        known = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
        self.known_factors = [1.0, *known, *(1 / v for v in known), *(v**0.5 for v in known)]
        self.activation = getattr(config, "hidden_act", None)
        self.eps: set[float] = set()

    def read(self, attentions: Sequence[nn.Module], paths: Sequence[str], logits: Tensor) -> DecoderWeights:
        layers = [self.model.get_submodule(layer_path(path)) for path in paths]
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        found = [self.read_layer(i, *pair) for i, pair in enumerate(zip(layers, attentions, strict=True))]
        first, last = self.io[layers[0]][0], self.io[layers[-1]][1]
        embedded = self.require_factor(first, self.io[table][1], first, "embeddings reach the first layer changed")
        norm = self.find_norm(last, "behind the last layer")
        if head not in self.io or table not in self.io:
            raise ExportError("its embeddings or its head are not used as modules")
        into_head, from_head = self.io[head]
        if has_bias(head):
            raise ExportError("its head has a bias")
        before = self.require_factor(
            into_head, self.io[norm][1], into_head, "something stands between last norm and head"
        )
        behind = (
            self.require_factor(logits, from_head, logits, "its logits are not what its head gives (a cap?)") * before
        )
        weight: Tensor = table.weight.detach()  # type: ignore[union-attr, operator, assignment]
        own: Tensor = head.weight.detach()  # type: ignore[union-attr, operator, assignment]
        tied = embedded == behind == 1.0 and own.data_ptr() == weight.data_ptr()
        last_weight = self.norm_weight(norm, "the last norm")
        if len(self.eps) != 1:
            raise ExportError(f"its norms have different epsilons ({', '.join(map(str, sorted(self.eps)))})")
        return DecoderWeights(weight * embedded, found, last_weight, None if tied else own * behind, self.eps.pop())

    def read_layer(self, index: int, layer: nn.Module, attention: nn.Module) -> DecoderLayerWeights:
        where = f"layer {index}"
        if layer not in self.io or attention not in self.io:
            raise ExportError(f"{where} does not take hidden states and give them")
        x, y = self.io[layer]
        taken, a = self.io[attention]
        norm = self.find_norm(x, f"of {where}")
        if not same_values(self.io[norm][1], taken):
            raise ExportError(f"attention of {where} is not given the norm of what the layer is given")
        inside = set(attention.modules())
        for module in layer.modules():
            m, normed = self.io.get(module, (None, None))
            if module in inside or m is None or module is norm or normed is None or m.shape != x.shape:
                continue
            by = self.find_factor(m - x, a, m)
            if by is not None and by != 0 and normed.shape == x.shape and self.is_norm(module):
                return self.read_mlp(where, layer, module, m, y, (self.norm_weight(norm, where), by))
        raise ExportError(
            f"{where} has more between its attention and its MLP than a sum and a norm (a second norm behind "
            "attention, or MLP and attention side by side)"
        )

    def read_mlp(
        self, where: str, layer: nn.Module, norm: nn.Module, m: Tensor, y: Tensor, before: tuple[Tensor, float]
    ) -> DecoderLayerWeights:
        x = self.io[norm][1]
        linears = [p for p in layer.modules() if isinstance(p, nn.Linear) and p in self.io]
        into = [p for p in linears if same_values(self.io[p][0], x)]
        halves = [(*half,) for p in into for half in self.gate_and_up(p, len(into) == 1)]
        for down in linears:
            u, f = self.io[down]
            by = None if f.shape != y.shape else self.find_factor(y - m, f, y)
            if by is None or by == 0 or len(halves) != 2:
                continue
            for (gate, g), (up, p) in (halves, halves[::-1]):
                if g.shape == u.shape and all_close(F.silu(g) * p, u):
                    if any(has_bias(part) for part in (*into, down)):
                        raise ExportError(f"the MLP of {where} has biases")
                    down_weight = down.weight.detach() * by
                    return DecoderLayerWeights(*before, self.norm_weight(norm, where), gate, up, down_weight)
        kind = self.activation
        told = "" if kind in (None, "silu", "swish") else f" (hidden_act is {kind!r})"
        raise ExportError(f"the MLP of {where} is not down(silu(gate x) * up x){told}, or a norm stands behind it")

    def gate_and_up(self, projection: nn.Linear, fused: bool) -> list[tuple[Tensor, Tensor]]:
        """Weight and output of a projection into the MLP; of its two halves where one makes both."""
        weight, given = projection.weight.detach(), self.io[projection][1]
        if not fused or len(weight) % 2:
            return [(weight, given)]
        return list(zip(weight.chunk(2), given.chunk(2, dim=-1), strict=True))

    def find_norm(self, x: Tensor, where: str) -> nn.Module:
        """The norm that is given `x`."""
        for module, (taken, given) in self.io.items():
            if taken.shape == given.shape and same_values(taken, x) and self.is_norm(module):
                return module
        raise ExportError(f"there is no RMS norm {where}")

    def is_norm(self, module: nn.Module) -> bool:
        return self.effective_weight(module) is not None

    def effective_weight(self, module: nn.Module) -> Tensor | None:
        """What a norm multiplies each channel with (some hold one less); None where it is no RMS norm."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or has_bias(module):
            return None
        x, y = self.io[module]
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon(module))
        for candidate in (weight.detach(), weight.detach() + 1):
            if all_close(normed * candidate.float(), y):
                return candidate
        return None

    def norm_weight(self, module: nn.Module, where: str) -> Tensor:
        weight = self.effective_weight(module)
        if weight is None:
            raise ExportError(f"the norm of {where} is no RMS norm")
        self.eps.add(epsilon(module))
        return weight

    def find_factor(self, wanted: Tensor, of: Tensor, beside: Tensor) -> float | None:
        """c with `wanted` = c `of`, up to what rounding leaves of a difference as large as `beside`; None if there is
        none. A c that the configuration knows is taken from there."""
        if wanted.shape != of.shape:
            return None
        w, o = wanted.double(), of.double()
        c = float((w * o).sum() / o.square().sum().clamp_min(1e-300))
        tolerance = TOLERANCE * dtype_tolerance(wanted)
        if bool(((w - c * o).abs() > tolerance * (beside.double().abs() + (c * o).abs().mean())).any()):
            return None
        nearest = min(self.known_factors, key=lambda known: abs(known - c))
        return nearest if abs(nearest - c) < tolerance * abs(nearest) else c

    def require_factor(self, wanted: Tensor, of: Tensor, beside: Tensor, reason: str) -> float:
        c = self.find_factor(wanted, of, beside)
        if c is None:
            raise ExportError(reason)
        return c


def all_close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to rounding."""
    tolerance = TOLERANCE * dtype_tolerance(wanted) * float(wanted.float().abs().max())
    return float((found.float() - wanted.float()).abs().max()) <= tolerance


def dtype_tolerance(x: Tensor) -> float:
    """How much coarser than float32 a dtype is taken to be."""
    return 1.0 if x.dtype in (torch.float32, torch.float64) else 200.0


def epsilon(norm: nn.Module) -> float:
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    return 1e-6 if eps is None else float(eps)


def has_bias(module: nn.Module) -> bool:
    """Whether a module adds something that is not zero."""
    bias = getattr(module, "bias", None)
    return isinstance(bias, Tensor) and bool(bias.any())
