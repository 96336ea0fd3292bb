"""Reads the weights around attention in a decoder from one forward pass; no architecture is known by name.

One structure is supported, that of Llama, Qwen and Mistral: RMS norms, pre-norm layers that add attention and then a
SiLU-gated MLP to the residual stream, and a linear head after a last norm. Constant factors (Granite's multipliers) are
measured and folded into the weights that follow them. Anything else raises an `ExportError` that names it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.modeling.attention.activations import layer_path, record_modules
from subquad.modeling.attention.discovery import norm_epsilon
from subquad.modeling.attention.tracing import random_tokens, same_values
from subquad.modeling.export_target import ExportError
from subquad.utils import eval_mode

TOLERANCE = 1e-4
"""Relative error up to which two computations count as the same in float32."""


class DecoderLayerWeights(NamedTuple):
    """The weights of one layer without its attention: norms `[hidden]`, the factor on the output of attention, and the
    MLP's matrices, `[intermediate, hidden]` and `[hidden, intermediate]`."""

    norm: Tensor
    attention_factor: float
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class DecoderWeights(NamedTuple):
    """The weights of a decoder without its attention: embedding and head `[vocabulary, hidden]` (None if tied), layers,
    the last norm `[hidden]`, and the epsilon of all norms."""

    embedding: Tensor
    layers: list[DecoderLayerWeights]
    norm: Tensor
    head: Tensor | None
    eps: float


@torch.no_grad()
def read_decoder(model: PreTrainedModel, paths: Sequence[str]) -> DecoderWeights:
    """The weights of `model`; `paths` are those of its attention modules, or of the mixers in their place, by layer.

    Raises:
        ExportError: `model` has a part that Llama's architecture does not have.
    """
    with eval_mode(model), record_modules(model.modules()) as recorded:
        logits = model(input_ids=random_tokens(model), use_cache=False).logits
    return DecoderReader(model, {module: found.tensors for module, found in recorded.items()}).read(paths, logits)


class DecoderReader:
    """Identifies the parts of one model by their recorded inputs and outputs."""

    def __init__(self, model: PreTrainedModel, io: dict[nn.Module, tuple[Tensor, Tensor]]):
        self.model, self.io = model, io
        config = getattr(model.config, "base_config", model.config).get_text_config()
        values = vars(config).values()
        known = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
        self.known_factors = [1.0, *known, *(1 / v for v in known), *(v**0.5 for v in known)]
        self.activation = getattr(config, "hidden_act", None)
        self.eps: set[float] = set()

    def read(self, paths: Sequence[str], logits: Tensor) -> DecoderWeights:
        layers = [self.model.get_submodule(layer_path(path)) for path in paths]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        attentions = map(self.model.get_submodule, paths)
        layer_weights = [self.read_layer(i, *pair) for i, pair in enumerate(zip(layers, attentions, strict=True))]
        if head not in self.io or embedding not in self.io:
            raise ExportError("its embeddings or its head are not used as modules")
        if has_bias(head):
            raise ExportError("its head has a bias")
        norm, norm_weight = self.find_norm(self.io[layers[-1]][1], "after the last layer")
        head_input, head_output = self.io[head]
        embedding_factor = self.require_factor(
            self.io[layers[0]][0], self.io[embedding][1], "its first layer's input is not a multiple of its embeddings"
        )
        head_factor = self.require_factor(
            head_input, self.io[norm][1], "its head's input is not a multiple of the last norm's output"
        ) * self.require_factor(
            logits, head_output, "its logits are not a multiple of its head's output (such as a soft cap)"
        )
        weight: Tensor = embedding.weight.detach()  # type: ignore[union-attr, operator, assignment]
        head_weight: Tensor = head.weight.detach()  # type: ignore[union-attr, operator, assignment]
        tied = embedding_factor == head_factor == 1.0 and head_weight.data_ptr() == weight.data_ptr()
        if len(self.eps) != 1:
            raise ExportError(f"its norms have different epsilons ({', '.join(map(str, sorted(self.eps)))})")
        head_weights = None if tied else head_weight * head_factor
        return DecoderWeights(weight * embedding_factor, layer_weights, norm_weight, head_weights, self.eps.pop())

    def read_layer(self, index: int, layer: nn.Module, attention: nn.Module) -> DecoderLayerWeights:
        name = f"layer {index}"
        if layer not in self.io or attention not in self.io:
            raise ExportError(f"{name} or its attention does not map hidden states to hidden states")
        x, y = self.io[layer]
        attention_input, attention_output = self.io[attention]
        norm, norm_weight = self.find_norm(x, f"in {name}")
        if not same_values(self.io[norm][1], attention_input):
            raise ExportError(f"the attention of {name} does not take the norm of the layer's input")
        outside = set(layer.modules()) - {norm, *attention.modules()}
        for module, (residual, normed) in self.io.items():
            if module not in outside or not residual.shape == normed.shape == x.shape:
                continue
            factor = self.find_factor(residual - x, attention_output, residual)
            mlp_norm = self.norm_weight(module) if factor else None
            if factor and mlp_norm is not None:
                return DecoderLayerWeights(norm_weight, factor, mlp_norm, *self.read_mlp(name, layer, module, y))
        raise ExportError(
            f"{name} has more between its attention and its MLP than a residual sum and a norm (such as a norm after "
            "attention, or MLP and attention in parallel)"
        )

    def read_mlp(self, name: str, layer: nn.Module, norm: nn.Module, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of the MLP that takes the output of `norm`, in a layer with output `y`."""
        residual, x = self.io[norm]
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear) and m in self.io]
        projections = [m for m in linears if same_values(self.io[m][0], x)]
        halves = [(m.weight.detach(), self.io[m][1]) for m in projections]
        if len(halves) == 1 and len(halves[0][0]) % 2 == 0:  # gate and up in one projection
            halves = list(zip(halves[0][0].chunk(2), halves[0][1].chunk(2, dim=-1), strict=True))
        for down in linears:
            down_input, down_output = self.io[down]
            factor = None if down_output.shape != y.shape else self.find_factor(y - residual, down_output, y)
            if not factor or len(halves) != 2:
                continue
            for (gate, g), (up, u) in (halves, halves[::-1]):
                if g.shape == down_input.shape and all_close(F.silu(g) * u, down_input):
                    if any(has_bias(part) for part in (*projections, down)):
                        raise ExportError(f"the MLP of {name} has biases")
                    return gate, up, down.weight.detach() * factor
        known = self.activation in (None, "silu", "swish")
        activation = "" if known else f" (hidden_act is {self.activation!r})"
        raise ExportError(f"the MLP of {name} is not down(silu(gate x) * up x){activation}, or a norm follows it")

    def find_norm(self, x: Tensor, where: str) -> tuple[nn.Module, Tensor]:
        """The RMS norm whose input is `x`, and its weight."""
        for module, (norm_input, output) in self.io.items():
            if norm_input.shape == output.shape and same_values(norm_input, x):
                weight = self.norm_weight(module)
                if weight is not None:
                    return module, weight
        raise ExportError(f"there is no RMS norm {where}")

    def norm_weight(self, module: nn.Module) -> Tensor | None:
        """The factor of each channel in an RMS norm (Gemma's store it minus one), whose epsilon is noted; None if
        `module` is not one."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or has_bias(module):
            return None
        eps, (x, y) = norm_epsilon(module), self.io[module]
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        for candidate in (weight.detach(), weight.detach() + 1):
            if all_close(normed * candidate.float(), y):
                self.eps.add(eps)
                return candidate
        return None

    def find_factor(self, target: Tensor, source: Tensor, magnitude: Tensor) -> float | None:
        """c with `target` = c `source`; None if there is none. If a number of the configuration is c up to rounding,
        that number.

        magnitude: the tensor whose rounding errors `target` has, where `target` is a difference.
        """
        if target.shape != source.shape:
            return None
        t, s = target.double(), source.double()
        c = float((t * s).sum() / s.square().sum().clamp_min(1e-300))
        tolerance = TOLERANCE * dtype_tolerance(target)
        if bool(((t - c * s).abs() > tolerance * (magnitude.double().abs() + (c * s).abs().mean())).any()):
            return None
        nearest = min(self.known_factors, key=lambda known: abs(known - c))
        return nearest if abs(nearest - c) < tolerance * abs(nearest) else c

    def require_factor(self, target: Tensor, source: Tensor, reason: str) -> float:
        c = self.find_factor(target, source, target)
        if c is None:
            raise ExportError(reason)
        return c


def all_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, relative to the largest expected value."""
    tolerance = TOLERANCE * dtype_tolerance(expected) * float(expected.float().abs().max())
    return float((found.float() - expected.float()).abs().max()) <= tolerance


def dtype_tolerance(x: Tensor) -> float:
    """The factor by which tolerances grow in dtypes narrower than float32."""
    return 1.0 if x.dtype in (torch.float32, torch.float64) else 200.0


def has_bias(module: nn.Module) -> bool:
    """Whether `module` has a bias that is not zero everywhere."""
    bias = getattr(module, "bias", None)
    return isinstance(bias, Tensor) and bool(bias.any())
