"""Arguments and results of modules, recorded by hooks while a model runs."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

ModuleAndProjection = tuple[nn.Module, nn.Module | None]
"""A decoder layer or an attention module, and its output projection if its `head_outputs` are needed."""


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The hidden states among the arguments of a decoder layer or an attention module; the input of another module."""
    return kwargs.get("hidden_states", next(iter((*args, *kwargs.values())), None))


@dataclass
class LayerActivations:
    """Arguments and result of one decoder layer, of its attention or of another module, in one forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    head_outputs: Tensor | None = None
    """Input of the attention's output projection, `[B, T, H * V]`."""

    @property
    def hidden_states(self) -> Tensor:
        return hidden_states_of(self.args, self.kwargs)

    @property
    def output(self) -> Tensor:
        return self.result[0] if isinstance(self.result, tuple) else self.result

    @property
    def position_embeddings(self) -> tuple[Tensor, Tensor] | None:
        return self.kwargs.get("position_embeddings")

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Input and output."""
        return self.hidden_states, self.output


@contextmanager
def record_modules(
    modules: Iterable[nn.Module], running: list[nn.Module] | None = None
) -> Iterator[dict[nn.Module, LayerActivations]]:
    """Yields the activations of those of `modules` that have run inside this context and map a tensor to a tensor;
    `running` holds those that have not returned yet, the innermost last."""
    recorded: dict[nn.Module, LayerActivations] = {}
    running = [] if running is None else running

    def leave(module, args, kwargs, result):
        running.pop()
        activations = LayerActivations(args, kwargs, result)
        if all(isinstance(x, Tensor) for x in activations.tensors):
            recorded[module] = activations

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(lambda module, args: running.append(module)))
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        yield recorded


@contextmanager
def capture_activations(
    modules: Sequence[ModuleAndProjection], on_output: Callable[[int, LayerActivations], None]
) -> Iterator[None]:
    """Inside this context, `on_output(index, activations)` is called each time one of `modules` has run, unless
    `on_output` itself runs it."""
    head_outputs: dict[int, Tensor] = {}
    in_callback = False

    def before_projection(index, _module, args):
        if not in_callback:
            head_outputs[index] = args[0].flatten(2) if args[0].dim() > 3 else args[0]

    def after(index, _module, args, kwargs, result):
        nonlocal in_callback
        if in_callback:
            return
        in_callback = True
        try:
            on_output(index, LayerActivations(args, kwargs, result, head_outputs.pop(index, None)))
        finally:
            in_callback = False

    with ExitStack() as hooks:
        for index, (module, projection) in enumerate(modules):
            hooks.enter_context(module.register_forward_hook(partial(after, index), with_kwargs=True))
            if projection is not None:
                hooks.enter_context(projection.register_forward_pre_hook(partial(before_projection, index)))
        yield


@torch.no_grad()
def visit_activations(
    model: PreTrainedModel,
    modules: Sequence[ModuleAndProjection],
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
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False, **positions)


def layer_path(path: str) -> str:
    """The path of the decoder layer that contains the attention at `path`: `model.layers.3` of
    `model.layers.3.self_attn`."""
    *_, number = re.finditer(r"\.\d+(?=\.|$)", path)
    return path[: number.end()]
