"""Access to the layers of a loaded model, teacher or student alike: mixing modules, decoder layers, their activations,
and layers of one model in the place of another's.
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
    """The layers of a causal language model.

    `mixer_layers[i]` computes the mixing matrix of layer i. For a transformer these are `AttentionLayer`s around its
    attention, which are part of the model only within `installed`.

    Raises:
        UserError: attention that cannot be discovered (`subquad.modeling.attention.discovery`).
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.root: nn.Module = model
        self.paths: list[str]
        self.mixer_layers: Sequence[MixerLayer | AttentionLayer]
        if isinstance(model, SubquadForCausalLM):
            self.root = model.base
            self.paths = [spec["path"] for spec in model.config.attention_specs]
            self.mixer_layers = model.mixer_layers
        else:
            attention = discover_attention(model)
            self.paths = [info.path for info in attention]
            self.mixer_layers = [AttentionLayer(info.module, info.spec, info.index) for info in attention]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def mixing_modules(self) -> list[nn.Module]:
        """The attention, or the mixer in its place, of each layer."""
        return [self.root.get_submodule(path) for path in self.paths]

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return [self.root.get_submodule(layer_path(path)) for path in self.paths]

    def forward(self, input_ids: Tensor) -> None:
        """Runs all layers on `input_ids: [B, T]` without padding."""
        ids = input_ids.to(self.model.device)
        if isinstance(self.model, SubquadForCausalLM):
            self.model.last_hidden_state(ids)
        else:
            self.model.base_model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def record(self, modules: Sequence[nn.Module], input_ids: Tensor) -> list[LayerActivations]:
        """The inputs and outputs of `modules` in one forward pass."""
        recorded: dict[int, LayerActivations] = {}
        with capture_activations([(module, None) for module in modules], recorded.__setitem__):
            self.forward(input_ids)
        return [recorded[index] for index in range(len(modules))]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts `mixer_layers` into the model, and ignores attention masks: no padding, one document."""
        before = self.mixing_modules
        hooks = [layer.register_forward_pre_hook(_without_mask, with_kwargs=True) for layer in self.decoder_layers]
        try:
            for path, layer in zip(self.paths, self.mixer_layers, strict=True):
                self.root.set_submodule(path, layer)
            yield
        finally:
            for path, module in zip(self.paths, before, strict=True):
                self.root.set_submodule(path, module)
            for hook in hooks:
                hook.remove()

    @contextmanager
    def with_layer(self, index: int, other: "LayerAccess") -> Iterator[None]:
        """Replaces decoder layer `index` by that of `other`, which must be `installed`."""
        path, layer = layer_path(self.paths[index]), self.decoder_layers[index]
        try:
            self.root.set_submodule(path, other.decoder_layers[index])
            yield
        finally:
            self.root.set_submodule(path, layer)


def _without_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return replace_mask(module, args, kwargs, None)


def run_on(module: nn.Module, recorded: LayerActivations) -> Tensor:
    """The output of `module`, a mixer layer or an installed decoder layer, on the recorded inputs of another module."""
    args, kwargs = replace_mask(module, recorded.args, recorded.kwargs, None)
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def layer_access_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[LayerAccess, LayerAccess]:
    """Access to both models. Raises UserError if their numbers of layers, heads or channels differ."""
    pair = LayerAccess(student), LayerAccess(teacher)
    if len(pair[0]) != len(pair[1]):
        raise UserError(f"layers: the student has {len(pair[0])}, the teacher {len(pair[1])}; expected equally many")
    for index, (a, b) in enumerate(zip(pair[0].mixer_layers, pair[1].mixer_layers, strict=True)):
        if (a.spec.num_heads, a.spec.hidden_size) != (b.spec.num_heads, b.spec.hidden_size):
            raise UserError(
                f"layer {index}: the student has {a.spec.num_heads} heads and hidden size {a.spec.hidden_size}, the "
                f"teacher {b.spec.num_heads} and {b.spec.hidden_size}; expected a student of this teacher"
            )
    return pair
