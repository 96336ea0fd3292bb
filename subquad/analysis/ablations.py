"""Ablations: a model's score with a part removed, frozen or limited.

No weight is written to. Parts are replaced within a context and restored on exit, also after an exception.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.diagnostics import mean_log_decays, token_means
from subquad.analysis.layer_access import LayerAccess, replaced
from subquad.evaluate.perplexity import token_sums
from subquad.evaluate.results import Result
from subquad.mixers import Mixer
from subquad.mixers.gate_init import inverse_logsigmoid
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.near_far import NearFarLayer
from subquad.utils import UserError, eval_mode

logger = logging.getLogger(__name__)

Score = Callable[[PreTrainedModel, Tensor], float]
BYPASS_SHARE = 0.9
"""Share of the score that a hybrid keeps without its mixers, above which a warning is logged."""


def mean_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """The mean next-token loss on `rows: [N, T]` of token ids, in nats."""
    tokens, loss, *_ = token_sums(model, None, rows.split(max(1, 4096 // rows.shape[1]))).sum(0).tolist()
    return loss / tokens


def ablation_results(
    model: PreTrainedModel, rows: Tensor, score: Score = mean_loss, metric: str = "loss", window: int = 64
) -> list[Result]:
    """A model's score on texts `rows: [N, T]` of token ids, intact and under each ablation that applies to it.

    Tasks: `intact`; `without_layer` (the mixing output of one layer is zero; the result names the layer);
    `without_mixers` and `without_attention` (of a hybrid); `window_<n>` (attention with a larger window is limited to
    `window` tokens; not beside a memory, see `subquad.analysis.near_far`); `without_short_conv`; `frozen_gate` and
    `frozen_decay` (at their means over all tokens of `rows`); `without_mixing` (all mixing outputs are zero).

    Metrics: the score, and `share` = (score - `without_mixing`) / (`intact` - `without_mixing`): 1 if the part is not
    needed, 0 if nothing is left without it. A warning is logged if a hybrid keeps more than `BYPASS_SHARE` without its
    mixers: it bypasses them (arXiv 2510.05901).

    Args:
        model: a student, or a transformer, of which only layers can be removed.
        score: a function of model and `rows`; higher or lower may be better.
        metric: the name of the score.
    """
    access = LayerAccess(model)
    found: list[tuple[str, int | None, float]] = []
    with eval_mode(model):
        for name, layer, ablation in available_ablations(access, rows, window):
            with ablation:
                found.append((name, layer, score(model, rows)))
    intact, nothing = found[0][-1], found[-1][-1]
    results = []
    for name, layer, value in found:
        make = partial(Result, name, layer=layer, n=rows.numel(), length=rows.shape[1])
        results.append(make(metric, value))
        if intact == nothing:
            continue
        share = (value - nothing) / (intact - nothing)
        results.append(make("share", share))
        if name == "without_mixers" and share > BYPASS_SHARE:
            logger.warning(
                "the hybrid bypasses its mixers: without them it keeps %.0f%% of what mixing contributes "
                "(arXiv 2510.05901)",
                100 * share,
            )
    return results


def available_ablations(
    access: LayerAccess, rows: Tensor, window: int
) -> Iterator[tuple[str, int | None, AbstractContextManager]]:
    """The ablations of a model: name, layer if it is of one layer, context. The first removes nothing, the last all."""
    yield "intact", None, ExitStack()
    for index, module in enumerate(access.mixing_modules):
        yield "without_layer", index, zero_output([module])
    if access.root is not access.model:  # a student
        mixers = [mixer for mixer in access.mixers if mixer is not None]
        mixer_layers = [layer for layer in access.mixer_layers if isinstance(layer, MixerLayer)]
        attention_layers = [
            layer
            for layer in access.mixer_layers
            if isinstance(layer, AttentionLayer) and not isinstance(layer, NearFarLayer)
        ]
        if mixer_layers and attention_layers:
            yield "without_mixers", None, zero_output(mixer_layers)
            yield "without_attention", None, zero_output(attention_layers)
        wide = [
            layer for layer in attention_layers if any((g.window or window + 1) > window for g in layer.head_groups)
        ]
        if wide:
            yield f"window_{window}", None, limited_window(wide, window)
        if any(mixer.conv_weights() for mixer in mixers):
            yield "without_short_conv", None, without_short_conv(mixers)
        if any(mixer.options.output_gate != "none" for mixer in mixers):
            yield "frozen_gate", None, frozen_gates(access.model, rows)
        if any(mean is not None for mean in mean_log_decays(access.model, rows[:1])):
            yield "frozen_decay", None, frozen_decays(access.model, rows)
    yield "without_mixing", None, zero_output(access.mixing_modules)


@contextmanager
def zero_output(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Replaces the output of each of `modules` (mixer layers, attention) by zeros."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(hook))
        yield


def limited_window(layers: Iterable[AttentionLayer], window: int) -> AbstractContextManager:
    """Limits attention to the last `window` tokens, itself included, and its sinks."""
    if window < 1:
        raise UserError(f"window: got {window}, expected at least 1 token")
    return replaced(
        (layer.__dict__, {"windows": tuple(min(own or window, window) for own in layer.windows)}) for layer in layers
    )


def without_short_conv(mixers: Iterable[Mixer]) -> AbstractContextManager:
    """Replaces the weights of short convolutions by the identity."""

    def identity(weight: Tensor) -> nn.Parameter:
        last = torch.zeros_like(weight)
        last[:, -1] = 1.0
        return nn.Parameter(last, requires_grad=False)

    return replaced(
        (mixer._parameters, {f"{name}_conv": identity(weight) for name, weight in mixer.conv_weights().items()})
        for mixer in mixers
    )


def frozen_gates(model: PreTrainedModel, rows: Tensor) -> AbstractContextManager:
    """Replaces each output gate of a student by its mean over all tokens of `rows: [N, T]`, per channel."""

    def constant(mean: Tensor, x: Tensor) -> Tensor:
        return mean.expand(*x.shape[:2], -1, -1)

    means = token_means(model, rows, lambda layer, recorded: layer.mixer.output_gate(recorded.hidden_states))
    return replaced(
        (mixer.__dict__, {"output_gate": partial(constant, mean.to(mixer.o_proj.weight.dtype))})
        for mixer, mean in zip(LayerAccess(model).mixers, means, strict=True)
        if mixer is not None and mean is not None
    )


def frozen_decays(model: PreTrainedModel, rows: Tensor) -> AbstractContextManager:
    """Replaces each log decay of a student by its mean over all tokens of `rows: [N, T]`.

    Where the written key depends on the decay (MetaLA, HGRN2), the key keeps its own value.
    """

    def constant(gates: Callable, mean: Tensor, x: Tensor, op_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = gates(x, op_inputs)
        name = "forget_gate" if "forget_gate" in values else "log_decay"
        value = inverse_logsigmoid(mean) if name == "forget_gate" else mean
        return {**values, name: value.to(values[name].dtype).expand_as(values[name])}

    return replaced(
        (mixer.__dict__, {"gates": partial(constant, mixer.gates, mean)})
        for mixer, mean in zip(LayerAccess(model).mixers, mean_log_decays(model, rows), strict=True)
        if mixer is not None and mean is not None
    )
