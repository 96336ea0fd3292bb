"""Inputs and outputs of layers and their attention, captured by hooks while a model runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.attention.tracing import hidden_states_of
from subquad.utils import eval_mode

MAX_INPUT_TOKENS = 1024
"""Tokens of each layer's input that `AttentionStats` keeps."""


@dataclass
class LayerActivations:
    """Arguments and output of one decoder layer, or of its attention, in one forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    head_outputs: Tensor | None = None
    """Input of the attention's output projection, `[B, T, H * V]`."""

    @property
    def hidden_states(self) -> Tensor:
        return hidden_states_of(self.args, self.kwargs)


def layer_path(path: str) -> str:
    """The path of the decoder layer that contains the attention at `path`: `model.layers.3` of
    `model.layers.3.self_attn`."""
    parts = path.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


@contextmanager
def capture_activations(
    modules: Sequence[tuple[nn.Module, nn.Module | None]], on_output: Callable[[int, LayerActivations], None]
) -> Iterator[None]:
    """Inside this context, `on_output(index, activations)` is called each time one of `modules` has run, unless
    `on_output` itself runs it.

    modules: decoder layers or attention modules, each with its output projection if `head_outputs` are needed.
    """
    hooks: list[Any] = []
    in_callback = False
    for index, (module, projection) in enumerate(modules):
        captured: dict[str, Any] = {}

        def before(_module, args, kwargs, captured=captured):
            if not in_callback:
                captured.update(args=args, kwargs=kwargs)

        def before_projection(_module, args, captured=captured):
            if not in_callback:
                captured["head_outputs"] = args[0].flatten(2) if args[0].dim() > 3 else args[0]

        def after(_module, _args, output, captured=captured, index=index):
            nonlocal in_callback
            if in_callback:
                return
            activations = LayerActivations(output=output[0] if isinstance(output, tuple) else output, **captured)
            captured.clear()
            in_callback = True
            try:
                on_output(index, activations)
            finally:
                in_callback = False

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if projection is not None:
            hooks.append(projection.register_forward_pre_hook(before_projection))
        hooks.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attention_modules(attention_layers: Sequence[AttentionInfo]) -> list[tuple[nn.Module, nn.Module | None]]:
    """The attention modules with their output projections, as `capture_activations` takes them."""
    return [(info.module, info.module.get_submodule(info.output_projection)) for info in attention_layers]


@torch.no_grad()
def visit_activations(
    model: PreTrainedModel,
    modules: Sequence[tuple[nn.Module, nn.Module | None]],
    on_output: Callable[[int, LayerActivations], None],
    input_ids: Tensor,
    position_ids: Tensor | None = None,
) -> None:
    """Runs `model` once without gradients and calls `on_output` (see `capture_activations`) while it runs, so that the
    activations of one module are held at a time.

    input_ids: `[B, T]`, without padding.
    position_ids: `[B, T]`; positions that restart at 0 separate documents, which do not attend to each other.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    with capture_activations(modules, on_output):
        model.base_model(input_ids=input_ids, use_cache=False, **positions)


class AttentionStats:
    """Statistics of one attention, from which a mixer is initialized: the scale of its heads, and inputs."""

    def __init__(self, info: AttentionInfo):
        self.spec = info.spec
        self.mean_squares: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def add(self, activations: LayerActivations) -> None:
        assert activations.head_outputs is not None
        heads = activations.head_outputs.float().reshape(-1, self.spec.num_heads, self.spec.value_dim)
        self.mean_squares.append(heads.square().mean(-1))
        if sum(map(len, self.inputs)) < MAX_INPUT_TOKENS:
            self.inputs.append(activations.hidden_states.reshape(-1, self.spec.hidden_size))

    def output_rms(self) -> Tensor:
        """Root mean square of each head's output, float32 `[H]`."""
        return torch.cat(self.mean_squares).mean(0).sqrt()

    def input_tokens(self) -> Tensor:
        """Inputs of the attention, `[tokens, hidden]`, at most `MAX_INPUT_TOKENS`."""
        return torch.cat(self.inputs)[:MAX_INPUT_TOKENS]


@contextmanager
def collect_attention_stats(
    teacher: PreTrainedModel, attention_layers: list[AttentionInfo]
) -> Iterator[list[AttentionStats]]:
    """Yields statistics of `attention_layers` that every forward pass of `teacher` inside this context adds to."""
    stats = [AttentionStats(info) for info in attention_layers]
    with (
        eval_mode(teacher),
        torch.no_grad(),
        capture_activations(attention_modules(attention_layers), lambda i, activations: stats[i].add(activations)),
    ):
        yield stats
