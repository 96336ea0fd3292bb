"""The layers of a loaded model, teacher or student, as the diagnostics see them: what stands in the place of attention,
the decoder layer around it, what both are given in a run, and one in the place of the other.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.modeling.attention.activations import LayerActivations, capture_activations, layer_path
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.attention.scores import replace_mask
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError


class LayerAccess:
    """The layers of a causal language model whose attention can be read (see `subquad.modeling.attention.discovery`).

    `blocks[i]` says the mixing matrix of layer i, of a plain transformer too: its attention, as a student keeps it. A
    block of a plain transformer stands in the model only while `ours` lasts.

    Raises:
        UserError: a model whose attention cannot be read.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.root: nn.Module = model
        self.paths: list[str]
        self.mixer_layers: Sequence[MixerLayer | AttentionLayer]
        if isinstance(model, SubquadForCausalLM):
            self.root = model.base
            self.paths = [place["path"] for place in model.config.attention_specs]
            self.mixer_layers = model.mixer_layers
        else:
            sites = discover_attention(model)
            self.paths = [site.path for site in sites]
            self.mixer_layers = [AttentionLayer(site.module, site.spec, site.index) for site in sites]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def mixing(self) -> list[nn.Module]:
        """What stands in the place of attention."""
        return [self.root.get_submodule(path) for path in self.paths]

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return [self.root.get_submodule(layer_path(path)) for path in self.paths]

    def run(self, input_ids: Tensor) -> None:
        """`[B, T]`, all tokens real, through every layer."""
        ids = input_ids.to(self.model.device)
        if isinstance(self.model, SubquadForCausalLM):
            self.model.last_hidden_state(ids)
        else:
            self.model.base_model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def record(self, modules: Sequence[nn.Module], input_ids: Tensor) -> list[LayerActivations]:
        """What each of `modules` is given and makes of it, in one run."""
        heard: dict[int, LayerActivations] = {}
        with capture_activations([(module, None) for module in modules], heard.__setitem__):
            self.run(input_ids)
        return [heard[index] for index in range(len(modules))]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While it lasts, `blocks` stand in the model, and its layers take whatever mask they are given for none: all
        tokens are real and of one document."""
        before = self.mixing
        hooks = [layer.register_forward_pre_hook(_without_mask, with_kwargs=True) for layer in self.layers]
        try:
            for path, block in zip(self.paths, self.mixer_layers, strict=True):
                self.root.set_submodule(path, block)
            yield
        finally:
            for path, module in zip(self.paths, before, strict=True):
                self.root.set_submodule(path, module)
            for hook in hooks:
                hook.remove()

    @contextmanager
    def with_layer(self, index: int, other: "LayerAccess") -> Iterator[None]:
        """While it lasts, decoder layer `index` is that of `other`, which must be `ours` meanwhile."""
        path, layer = layer_path(self.paths[index]), self.layers[index]
        try:
            self.root.set_submodule(path, other.layers[index])
            yield
        finally:
            self.root.set_submodule(path, layer)


def _without_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return replace_mask(module, args, kwargs, None)


def run_on(module: nn.Module, recording: LayerActivations) -> Tensor:
    """What `module` makes of what another was given: a block, or a layer of a stack that is `ours`."""
    args, kwargs = replace_mask(module, recording.args, recording.kwargs, None)
    given = module(*args, **kwargs)
    return given[0] if isinstance(given, tuple) else given


def stacks(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[LayerAccess, LayerAccess]:
    """Those of a model and of what it is compared with; UserError where their layers or heads do not correspond."""
    ours, theirs = LayerAccess(student), LayerAccess(teacher)
    if len(ours) != len(theirs):
        raise UserError(f"the student has {len(ours)} layers, the teacher {len(theirs)}; expected the same number")
    for index, (a, b) in enumerate(zip(ours.mixer_layers, theirs.mixer_layers, strict=True)):
        mine, its = (a.spec.num_heads, a.spec.hidden_size), (b.spec.num_heads, b.spec.hidden_size)
        if mine != its:
            raise UserError(
                f"layer {index} has {mine[0]} heads over {mine[1]} channels, the teacher's {its[0]} over {its[1]}; "
                "expected a student of this teacher"
            )
    return ours, theirs
