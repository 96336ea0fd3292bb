"""What each part of a model is worth: a score with the part cut off, frozen or reduced, and the model as it was after.

Nothing here writes to a weight: parts are replaced for a while and put back, also when the score fails.
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
BYPASSED = 0.9
"""Share of the score that a hybrid keeps without its mixers, above which they are as good as unused."""

_ABSENT = object()


# ---------------------------------------------------------------------- the scores


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Tensor) -> float:
    """Of every next token of `rows: [N, T]`, in nats."""
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
    """A model's score on texts `rows: [N, T]` with each of its parts taken away.

    Tasks: `intact`; `without_layer`, the mixing of one layer cut off (its output zero; the row names the layer);
    `without_mixers` and `without_attention`, of a hybrid, all of either cut off; `window_<n>`, all kept attention that
    sees more reduced to `window` tokens; `without_short_conv`; `frozen_gate` and `frozen_decay`, at their means over
    all tokens of `rows`; `without_mixing`, all cut off.

    Beside each score, a row `share`: of what mixing tokens is worth (`intact` less `without_mixing`), that which is
    left, whichever way the score counts: 1 is a part that is not needed, 0 one without which nothing is left. A hybrid
    that keeps nearly all of it `without_mixers` bypasses them (arXiv 2510.05901), and a warning says so.

    Args:
        model: a student, or a plain transformer, of which layers can be cut off.
        score: of a model on `rows`, by the name `metric`.
    """
    stack = LayerAccess(model)
    with eval_mode(model):
        intact = score(model, rows)
        with cut(stack.mixing):
            nothing = score(model, rows)
        found = [(name, layer, _scored(model, rows, score, part)) for name, layer, part in parts(stack, rows, window)]
    worth = intact - nothing
    out = []
    for name, layer, value in [("intact", None, intact), *found, ("without_mixing", None, nothing)]:
        out.append(Result(task=name, metric=metric, value=value, layer=layer, n=rows.numel(), length=rows.shape[1]))
        if worth:
            share = (value - nothing) / worth
            out.append(
                Result(task=name, metric="share", value=share, layer=layer, n=rows.numel(), length=rows.shape[1])
            )
            if name == "without_mixers" and share > BYPASSED:
                logger.warning(
                    "the mixers of this hybrid are hardly used: %.0f%% of what mixing is worth stays without them "
                    "(arXiv 2510.05901)",
                    100 * share,
                )
    return out


def _scored(model: PreTrainedModel, rows: Tensor, score: Score, part: Any) -> float:
    with part:
        return score(model, rows)


def parts(stack: LayerAccess, rows: Tensor, window: int) -> Iterator[tuple[str, int | None, Any]]:
    """What the model has that can be taken away: a name, the layer where it is one layer's, a context manager."""
    for index, module in enumerate(stack.mixing):
        yield "without_layer", index, cut([module])
    if stack.root is stack.model:  # a plain transformer
        return
    mixers = [block.mixer for block in stack.mixer_layers if isinstance(block, MixerLayer)]
    kept = [block for block in stack.mixer_layers if isinstance(block, AttentionLayer)]
    if mixers and kept:
        yield "without_mixers", None, cut([b for b in stack.mixer_layers if isinstance(b, MixerLayer)])
        yield "without_attention", None, cut(kept)
    wide = [block for block in kept if block.window is None or block.window > window]
    if wide:
        yield f"window_{window}", None, windowed(wide, window)
    if any(mixer.conv_weights() for mixer in mixers):
        yield "without_short_conv", None, without_short_conv(mixers)
    if any(mixer.options.output_gate != "none" for mixer in mixers):
        yield "frozen_gate", None, frozen_gates(stack.model, rows)
    if any(mean is not None for mean in mean_log_decays(stack.model, rows[:1])):
        yield "frozen_decay", None, frozen_decays(stack.model, rows)


# ---------------------------------------------------------------------- the ablations


@contextmanager
def cut(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The output of each of `modules`, mixers' blocks or attention, is zero."""

    def silent(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    hooks = [module.register_forward_hook(silent) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def windowed(blocks: Iterable[AttentionLayer], window: int) -> Iterator[None]:
    """Kept attention sees at most the last `window` tokens, itself included, and its sinks."""
    if window < 1:
        raise UserError(f"window: got {window}, expected at least 1 token")
    before = [(block, block.window) for block in blocks]
    try:
        for block, own in before:
            block.window = window if own is None else min(own, window)
        yield
    finally:
        for block, own in before:
            block.window = own


@contextmanager
def without_short_conv(mixers: Iterable[Mixer]) -> Iterator[None]:
    """Short convolutions pass on each token as it is: their kernels are the identity."""
    kernels = [(mixer, name, kernel) for mixer in mixers for name, kernel in mixer.conv_weights().items()]
    try:
        for mixer, name, kernel in kernels:
            identity = torch.zeros_like(kernel)
            identity[:, -1] = 1.0
            mixer._parameters[f"{name}_conv"] = nn.Parameter(identity, requires_grad=False)
        yield
    finally:
        for mixer, name, kernel in kernels:
            mixer._parameters[f"{name}_conv"] = kernel


@contextmanager
def frozen_gates(model: PreTrainedModel, rows: Tensor) -> Iterator[None]:
    """Each output gate of a student stands at its mean over all tokens of `rows: [N, T]`, channel by channel."""
    means = mean_gates(model, rows)
    with ExitStack() as undo:
        for mixer, mean in means:
            undo.enter_context(replaced(mixer, "output_gate", lambda x, mean=mean: mean.expand(*x.shape[:2], -1, -1)))
        yield


@torch.no_grad()
def mean_gates(model: PreTrainedModel, rows: Tensor) -> list[tuple[Mixer, Tensor]]:
    """The mixers of a student that have an output gate, with its mean over all tokens, `[H, V]`."""
    stack = LayerAccess(model)
    sums: dict[int, Tensor] = {}
    with eval_mode(model):
        for ids in rows.split(1):
            for index, recording in enumerate(stack.record(stack.mixing, ids)):
                block = stack.mixer_layers[index]
                gate = block.mixer.output_gate(recording.hidden_states) if isinstance(block, MixerLayer) else None
                if gate is not None:
                    sums[index] = sums.get(index, 0.0) + gate.double().sum((0, 1))
    found = []
    for index, total in sums.items():
        block = stack.mixer_layers[index]
        assert isinstance(block, MixerLayer)
        found.append((block.mixer, (total / rows.numel()).to(block.mixer.o_proj.weight.dtype)))
    return found


@contextmanager
def frozen_decays(model: PreTrainedModel, rows: Tensor) -> Iterator[None]:
    """Each decay of a student stands at the exponential of its mean log over all tokens of `rows: [N, T]`. Where what
    a token writes is tied to what it forgets (MetaLA, HGRN2), only what it forgets is frozen."""
    means = mean_log_decays(model, rows)
    with ExitStack() as undo:
        for block, mean in zip(LayerAccess(model).mixer_layers, means, strict=True):
            if isinstance(block, MixerLayer) and mean is not None:
                undo.enter_context(replaced(block.mixer, "gates", _steady(block.mixer.gates, mean)))
        yield


def _steady(gates: Callable[..., dict[str, Tensor]], mean: Tensor) -> Callable[..., dict[str, Tensor]]:
    def steady(x: Tensor, core: dict[str, Tensor]) -> dict[str, Tensor]:
        found = gates(x, core)
        name = "forget_gate" if "forget_gate" in found else "log_decay"
        value = inverse_logsigmoid(mean) if name == "forget_gate" else mean
        return {**found, name: value.to(found[name].dtype).expand_as(found[name])}

    return steady


@contextmanager
def replaced(module: nn.Module, name: str, method: Callable) -> Iterator[None]:
    """`module.name` is `method` for a while."""
    before = module.__dict__.get(name, _ABSENT)
    module.__dict__[name] = method
    try:
        yield
    finally:
        if before is _ABSENT:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
