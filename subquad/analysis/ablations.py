"""Ablations: a model's score with a part removed, frozen or limited.

No weight is written to. Parts are replaced within a context and restored on exit, also after an exception.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.half_life import mean_log_decays
from subquad.analysis.layer_access import LayerAccess
from subquad.evaluate.results import Result
from subquad.mixers import Mixer
from subquad.mixers.gate_init import inverse_logsigmoid
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.utils import UserError, eval_mode

logger = logging.getLogger(__name__)

Score = Callable[[PreTrainedModel, Tensor], float]
BYPASS_SHARE = 0.9
"""Share of the score that a hybrid keeps without its mixers, above which a warning is logged."""

_ABSENT = object()


# ---------------------------------------------------------------------- scores


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """The mean next-token loss on `rows: [N, T]` of token ids, in nats."""
    total = 0.0
    for ids in rows.to(model.device).split(max(1, 4096 // rows.shape[1])):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()


def ablation_results(
    model: PreTrainedModel,
    rows: Tensor,
    score: Score = mean_loss,
    metric: str = "loss",
    window: int = 64,
) -> list[Result]:
    """A model's score on texts `rows: [N, T]` of token ids, intact and under each ablation that applies to it.

    Tasks: `intact`; `without_layer` (the mixing output of one layer is zero; the result names the layer);
    `without_mixers` and `without_attention` (of a hybrid); `window_<n>` (attention with a larger window is limited to
    `window` tokens); `without_short_conv`; `frozen_gate` and `frozen_decay` (at their means over all tokens of `rows`);
    `without_mixing` (all mixing outputs are zero).

    Metrics: the score, and `share` = (score - `without_mixing`) / (`intact` - `without_mixing`): 1 if the part is not
    needed, 0 if nothing is left without it. A warning is logged if a hybrid keeps more than `BYPASS_SHARE` without its
    mixers: it bypasses them (arXiv 2510.05901).

    Args:
        model: a student, or a transformer, of which only layers can be removed.
        score: a function of model and `rows`; higher or lower may be better.
        metric: the name of the score.
    """
    access = LayerAccess(model)
    with eval_mode(model):
        intact = score(model, rows)
        with zero_output(access.mixing_modules):
            nothing = score(model, rows)
        found: list[tuple[str, int | None, float]] = [("intact", None, intact)]
        for name, layer, ablation in available_ablations(access, rows, window):
            with ablation:
                found.append((name, layer, score(model, rows)))
        found.append(("without_mixing", None, nothing))
    fields: dict[str, Any] = {"n": rows.numel(), "length": rows.shape[1]}
    results = []
    for name, layer, value in found:
        results.append(Result(name, metric, value, layer=layer, **fields))
        if intact == nothing:
            continue
        share = (value - nothing) / (intact - nothing)
        results.append(Result(name, "share", share, layer=layer, **fields))
        if name == "without_mixers" and share > BYPASS_SHARE:
            logger.warning(
                "the hybrid bypasses its mixers: without them it keeps %.0f%% of what mixing contributes "
                "(arXiv 2510.05901)",
                100 * share,
            )
    return results


def available_ablations(access: LayerAccess, rows: Tensor, window: int) -> Iterator[tuple[str, int | None, Any]]:
    """The ablations of a model: name, layer if it is of one layer, context manager."""
    for index, module in enumerate(access.mixing_modules):
        yield "without_layer", index, zero_output([module])
    if access.root is access.model:  # a transformer
        return
    mixer_layers = [layer for layer in access.mixer_layers if isinstance(layer, MixerLayer)]
    attention_layers = [layer for layer in access.mixer_layers if isinstance(layer, AttentionLayer)]
    mixers = [layer.mixer for layer in mixer_layers]
    if mixer_layers and attention_layers:
        yield "without_mixers", None, zero_output(mixer_layers)
        yield "without_attention", None, zero_output(attention_layers)
    wide = [layer for layer in attention_layers if layer.window is None or layer.window > window]
    if wide:
        yield f"window_{window}", None, limited_window(wide, window)
    if any(mixer.conv_weights() for mixer in mixers):
        yield "without_short_conv", None, without_short_conv(mixers)
    if any(mixer.options.output_gate != "none" for mixer in mixers):
        yield "frozen_gate", None, frozen_gates(access.model, rows)
    if any(mean is not None for mean in mean_log_decays(access.model, rows[:1])):
        yield "frozen_decay", None, frozen_decays(access.model, rows)


# ---------------------------------------------------------------------- ablations


@contextmanager
def zero_output(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Replaces the output of each of `modules` (mixer layers, attention) by zeros."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    hooks = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def limited_window(layers: Iterable[AttentionLayer], window: int) -> Iterator[None]:
    """Limits attention to the last `window` tokens, itself included, and its sinks."""
    if window < 1:
        raise UserError(f"window: got {window}, expected at least 1 token")
    before = [(layer, layer.window) for layer in layers]
    try:
        for layer, own in before:
            layer.window = window if own is None else min(own, window)
        yield
    finally:
        for layer, own in before:
            layer.window = own


@contextmanager
def without_short_conv(mixers: Iterable[Mixer]) -> Iterator[None]:
    """Replaces the weights of short convolutions by the identity."""
    weights = [(mixer, name, weight) for mixer in mixers for name, weight in mixer.conv_weights().items()]
    try:
        for mixer, name, weight in weights:
            identity = torch.zeros_like(weight)
            identity[:, -1] = 1.0
            mixer._parameters[f"{name}_conv"] = nn.Parameter(identity, requires_grad=False)
        yield
    finally:
        for mixer, name, weight in weights:
            mixer._parameters[f"{name}_conv"] = weight


@contextmanager
def frozen_gates(model: PreTrainedModel, rows: Tensor) -> Iterator[None]:
    """Replaces each output gate of a student by its mean over all tokens of `rows: [N, T]`, per channel."""
    means = mean_gates(model, rows)
    with ExitStack() as stack:
        for mixer, mean in means:
            stack.enter_context(method_replaced(mixer, "output_gate", _constant_gate(mean)))
        yield


@torch.no_grad()
def mean_gates(model: PreTrainedModel, rows: Tensor) -> list[tuple[Mixer, Tensor]]:
    """The mixers of a student that have an output gate, each with the gate's mean over all tokens, `[H, V]`."""
    access = LayerAccess(model)
    sums: dict[int, Tensor] = {}
    with eval_mode(model):
        for ids in rows.split(1):
            for index, recorded in enumerate(access.record(access.mixing_modules, ids)):
                layer = access.mixer_layers[index]
                gate = layer.mixer.output_gate(recorded.hidden_states) if isinstance(layer, MixerLayer) else None
                if gate is not None:
                    sums[index] = sums.get(index, 0.0) + gate.double().sum((0, 1))
    means = []
    for index, total in sums.items():
        layer = access.mixer_layers[index]
        assert isinstance(layer, MixerLayer)
        means.append((layer.mixer, (total / rows.numel()).to(layer.mixer.o_proj.weight.dtype)))
    return means


@contextmanager
def frozen_decays(model: PreTrainedModel, rows: Tensor) -> Iterator[None]:
    """Replaces each log decay of a student by its mean over all tokens of `rows: [N, T]`.

    Where the written key depends on the decay (MetaLA, HGRN2), the key keeps its own value.
    """
    means = mean_log_decays(model, rows)
    with ExitStack() as stack:
        for layer, mean in zip(LayerAccess(model).mixer_layers, means, strict=True):
            if isinstance(layer, MixerLayer) and mean is not None:
                stack.enter_context(method_replaced(layer.mixer, "gates", _constant_decay(layer.mixer.gates, mean)))
        yield


def _constant_gate(mean: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: mean.expand(*x.shape[:2], -1, -1)


def _constant_decay(gates: Callable[..., dict[str, Tensor]], mean: Tensor) -> Callable[..., dict[str, Tensor]]:
    def constant(x: Tensor, op_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = gates(x, op_inputs)
        name = "forget_gate" if "forget_gate" in values else "log_decay"
        value = inverse_logsigmoid(mean) if name == "forget_gate" else mean
        return {**values, name: value.to(values[name].dtype).expand_as(values[name])}

    return constant


@contextmanager
def method_replaced(module: nn.Module, name: str, method: Callable) -> Iterator[None]:
    """Replaces `module.name` by `method`."""
    before = module.__dict__.get(name, _ABSENT)
    module.__dict__[name] = method
    try:
        yield
    finally:
        if before is _ABSENT:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
