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
from subquad.utils import eval_mode


@dataclass
class LayerActivations:
    """What one layer, or its attention, was given and what it made of it, in one forward of the teacher."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    heads: Tensor | None = None
    """Input of an attention's output projection, `[B, T, H * V]`."""

    @property
    def hidden_states(self) -> Tensor:
        return self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0]


def layer_path(path: str) -> str:
    """The module of the decoder layer in which the attention at `path` stands: the member of a list of layers."""
    parts = path.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


@contextmanager
def capture_activations(
    modules: Sequence[tuple[nn.Module, nn.Module | None]], on_output: Callable[[int, LayerActivations], None]
) -> Iterator[None]:
    """While it lasts, `each(index, recording)` is called as soon as one of `modules` has run.

    modules: layers or their attentions, each with its output projection where the heads are wanted.
    """
    hooks: list[Any] = []
    for index, (module, projection) in enumerate(modules):
        given: dict[str, Any] = {}

        def before(_module, args, kwargs, given=given):
            given.update(args=args, kwargs=kwargs)

        def projecting(_module, args, given=given):
            given["heads"] = args[0].flatten(2) if args[0].dim() > 3 else args[0]

        def after(_module, _args, output, given=given, index=index):
            output = output[0] if isinstance(output, tuple) else output
            on_output(index, LayerActivations(output=output, **given))
            given.clear()

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if projection is not None:
            hooks.append(projection.register_forward_pre_hook(projecting))
        hooks.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attention_modules(attention_layers: Sequence[AttentionInfo]) -> list[tuple[nn.Module, nn.Module | None]]:
    """The attentions of a model with their output projections, for `listen`."""
    return [(site.module, site.module.get_submodule(site.output_projection)) for site in attention_layers]


@torch.no_grad()
def collect_activations(
    model: PreTrainedModel,
    modules: Sequence[tuple[nn.Module, nn.Module | None]],
    input_ids: Tensor,
    position_ids: Tensor | None = None,
) -> list[LayerActivations]:
    """Runs `model` once on `input_ids: [B, T]`, all tokens real, and records every one of `modules` (see `listen`).
    Positions that restart are documents that do not see each other."""
    heard: dict[int, LayerActivations] = {}
    where = {} if position_ids is None else {"position_ids": position_ids}
    with capture_activations(modules, heard.__setitem__):
        model.base_model(input_ids=input_ids, use_cache=False, **where)
    return [heard[index] for index in range(len(modules))]


MAX_INPUT_TOKENS = 1024
"""Tokens of a layer's input that are kept while its attention is heard."""


class AttentionStats:
    """What is known of one attention at work: the scale of its heads' outputs, and tokens that it was given."""

    def __init__(self, site: AttentionInfo):
        self.spec = site.spec
        self.mean_squares: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def add(self, activations: LayerActivations) -> None:
        assert activations.heads is not None
        heads = activations.heads.float().reshape(-1, self.spec.num_heads, self.spec.value_dim)
        self.mean_squares.append(heads.square().mean(-1))
        if sum(map(len, self.inputs)) < MAX_INPUT_TOKENS:
            self.inputs.append(activations.hidden_states.reshape(-1, self.spec.hidden_size))

    def output_rms(self) -> Tensor:
        """Root mean square of each head's output, `[H]`."""
        return torch.cat(self.mean_squares).mean(0).sqrt()

    def input_tokens(self) -> Tensor:
        """`[tokens, hidden]`, no more than `INPUTS`."""
        return torch.cat(self.inputs)[:MAX_INPUT_TOKENS]


@contextmanager
def collect_attention_stats(
    teacher: PreTrainedModel, attention_layers: list[AttentionInfo]
) -> Iterator[list[AttentionStats]]:
    """Hears the attentions of `sites` while `teacher` works."""
    heard = [AttentionStats(site) for site in attention_layers]
    with (
        eval_mode(teacher),
        torch.no_grad(),
        capture_activations(attention_modules(attention_layers), lambda i, seen: heard[i].add(seen)),
    ):
        yield heard
