"""Access to the layers of a loaded model, teacher or student alike: their inputs and outputs, sums over texts and the
results from these, and layers of one model in the place of another's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.evaluate.results import Result
from subquad.mixers import Mixer
from subquad.modeling.attention.activations import LayerActivations, capture_activations, layer_path
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.attention.scores import replace_mask
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.near_far import NearFarLayer
from subquad.utils import UserError, eval_mode

WITH_MIXERS = (MixerLayer, NearFarLayer)
Sums = dict[str, Any]
"""Tensors and numbers by name that can be added."""


@contextmanager
def replaced(replacements: Iterable[tuple[dict[str, Any], Mapping[str, Any]]]) -> Iterator[None]:
    """Replaces entries of dicts: attributes, parameters or submodules of modules."""
    done = []
    try:
        for entries, new in replacements:
            done.append((entries, new, {name: entries[name] for name in new if name in entries}))
            entries.update(new)
        yield
    finally:
        for entries, new, before in reversed(done):
            for name in new.keys() - before.keys():
                del entries[name]
            entries.update(before)


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
        self.mixer_layers: Sequence[MixerLayer | AttentionLayer]
        if isinstance(model, SubquadForCausalLM):
            self.root, self.mixer_layers = model.base, model.mixer_layers
            self.paths = [spec["path"] for spec in model.config.attention_specs]
        else:
            attention = discover_attention(model)
            self.mixer_layers = [AttentionLayer(info.module, info.spec, info.index) for info in attention]
            self.paths = [info.path for info in attention]

    @property
    def mixers(self) -> list[Mixer | None]:
        """None for layers with attention alone."""
        return [layer.mixer if isinstance(layer, WITH_MIXERS) else None for layer in self.mixer_layers]

    @property
    def mixing_modules(self) -> list[nn.Module]:
        """The attention, or the mixer in its place, of each layer."""
        return [self.root.get_submodule(path) for path in self.paths]

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return [self.root.get_submodule(layer_path(path)) for path in self.paths]

    @torch.no_grad()
    def record(self, modules: Sequence[nn.Module], input_ids: Tensor) -> list[LayerActivations]:
        """The inputs and outputs of `modules` in one forward pass on `input_ids: [B, T]` without padding."""
        recorded: dict[int, LayerActivations] = {}
        ids = input_ids.to(self.model.device)
        with capture_activations([(module, None) for module in modules], recorded.__setitem__):
            self.model.base_model(input_ids=ids, use_cache=False)
        return [recorded[index] for index in range(len(modules))]

    def _place(self, path: str, module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        parent, _, name = path.rpartition(".")
        return self.root.get_submodule(parent)._modules, {name: module}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts `mixer_layers` into the model, and ignores attention masks: no padding, one document."""
        with ExitStack() as stack:
            for layer in self.decoder_layers:
                stack.enter_context(layer.register_forward_pre_hook(_without_mask, with_kwargs=True))
            stack.enter_context(replaced(map(self._place, self.paths, self.mixer_layers)))
            yield

    def with_layer(self, index: int, other: "LayerAccess") -> AbstractContextManager:
        """Replaces decoder layer `index` by that of `other`, which must be `installed`."""
        return replaced([self._place(layer_path(self.paths[index]), other.decoder_layers[index])])


def _without_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return replace_mask(module, args, kwargs, None)


def run_on(module: nn.Module, recorded: LayerActivations) -> Tensor:
    """The output of `module`, a mixer layer or an installed decoder layer, on the recorded inputs of another module."""
    args, kwargs = _without_mask(module, recorded.args, recorded.kwargs)
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def layer_access_pair(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[LayerAccess, LayerAccess]:
    """Access to both models. Raises UserError if their numbers of layers, heads or channels differ."""
    pair = LayerAccess(student), LayerAccess(teacher)
    ours, theirs = ([layer.spec for layer in access.mixer_layers] for access in pair)
    if len(ours) != len(theirs):
        raise UserError(f"layers: the student has {len(ours)}, the teacher {len(theirs)}; expected equally many")
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if (a.num_heads, a.hidden_size) != (b.num_heads, b.hidden_size):
            raise UserError(
                f"layer {index}: the student has {a.num_heads} heads and hidden size {a.hidden_size}, the teacher "
                f"{b.num_heads} and {b.hidden_size}; expected a student of this teacher"
            )
    return pair


@torch.no_grad()
def sums_by_layer(
    rows: Tensor, measure: Callable[..., Iterable[Sums]], *recorded: tuple[LayerAccess, Sequence[nn.Module]]
) -> list[Sums]:
    """For each layer the sums of what `measure` yields on all texts `rows: [N, T]`, one text at a time.

    measure: is called with the number of a layer and its activations in each of `recorded`: one module per layer.
    """
    totals: list[Sums] = [{} for _ in recorded[0][1]]
    with ExitStack() as stack:
        for access, _ in recorded:
            stack.enter_context(eval_mode(access.model))
        for ids in rows.split(1):
            by_layer = zip(*(access.record(modules, ids) for access, modules in recorded), strict=True)
            for index, (total, activations) in enumerate(zip(totals, by_layer, strict=True)):
                for sums in measure(index, *activations):
                    total |= {name: total.get(name, 0) + value for name, value in sums.items()}
    return totals


def mean_of_layers(layers: Sequence[Tensor]) -> Tensor:
    """Each layer counts equally, whatever its number of heads."""
    return torch.stack([values.mean() for values in layers]).mean()


def layer_results(
    task: str,
    layers: Sequence[Mapping[str, Tensor]],
    n: int,
    length: int | None = None,
    average: Callable[[list[Tensor]], Tensor] = mean_of_layers,
) -> list[Result]:
    """The results of metrics by layer, each `[H]` or one number: the average over all layers (a result without layer),
    then each layer's average (without head) and its heads. Layers may lack a metric."""
    results = []
    for metric in dict.fromkeys(name for layer in layers for name in layer):
        make = partial(Result, task, metric, n=n, length=length)
        values = {index: layer[metric].double() for index, layer in enumerate(layers) if metric in layer}
        results.append(make(average(list(values.values())).item()))
        for index, value in values.items():
            results.append(make(average([value]).item(), layer=index))
            heads = value.tolist() if value.dim() else []
            results += [make(of_head, layer=index, head=head) for head, of_head in enumerate(heads)]
    return results
