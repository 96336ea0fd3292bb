"""The error that a window with a memory causes, beside those of windows alone (`window_errors.py`).

For each layer and a few windows a memory is fitted to all rows of text but the first (`calibrate_far.py`), with one
state a key/value head, and measured on the first. `set_memory` assembles the memory of a layer from those of its heads.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subquad.mixers.options import find_options
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.calibrate import calibrate_layer
from subquad.modeling.calibrate_far import FarCalibrator
from subquad.modeling.layer_types import DEFAULT_MERGE
from subquad.modeling.modeling_subquad import make_mixer_layer
from subquad.modeling.near_far import NearFarLayer
from subquad.modeling.window_errors import detached, mean_ratio, octave_weights


def memory_options(mixer: str) -> dict[str, Any]:
    """Options of the memories that a budget may choose: of mixers whose state is a sum of k v^T it is a sum of values,
    one row."""
    return {"state_heads": "key_value", "qk_activation": "ones" if find_options(mixer).sums_keys else "elu1"}


@dataclass
class FittedMemory:
    """What calibration chose for one layer and window: values `[G]` of the mixer's calibrated parameters, scales
    `[H, V]` of its output norm (None without one), and the parameters of its merge, `[H, ...]`."""

    params: dict[str, Tensor]
    scale: Tensor | None
    merge: dict[str, Tensor]


class MemoryCandidates:
    """Memories of every layer for some windows; `visitor` fits and measures them."""

    def __init__(self, mixer: str, layers: Sequence[AttentionInfo], windows: Sequence[int], sinks: int):
        self.mixer, self.layers, self.windows, self.sinks = mixer, layers, windows, sinks
        self.fitted: dict[tuple[int, int], FittedMemory] = {}
        self.errors: list[Tensor] = []
        """Of each layer |d|^2 / |h|^2 and (g . d)^2, `[2, heads, windows, T]` (see `window_errors`)."""
        self.nbytes: list[list[int]] = []
        """Of each layer, for each window the bytes that a memory of one head adds to the cache."""

    def layer_spec(self, window: Any, memory_heads: Sequence[int]) -> dict[str, Any]:
        near = {"window": window, "sinks": self.sinks, "merge": DEFAULT_MERGE, "memory_heads": list(memory_heads)}
        return {"mixer": self.mixer, **near, **memory_options(self.mixer)}

    def new_layer(self, info: AttentionInfo, window: int) -> NearFarLayer:
        """A layer that shares the weights of the teacher's attention."""
        spec = self.layer_spec(window, range(info.spec.num_kv_heads))
        layer = make_mixer_layer(copy.copy(info.module), info.spec, info.index, spec)
        assert isinstance(layer, NearFarLayer)
        layer.reset_parameters()
        return layer

    def visitor(self, rows: int) -> Callable[[int, int, tuple[LayerActivations, Tensor, Tensor | None]], None]:
        """For `window_errors` on so many rows: fits on all rows but the first, on which it measures."""
        waiting: dict[int, list[LayerActivations]] = {index: [] for index in range(len(self.layers))}

        def visit(row: int, index: int, recorded: tuple[LayerActivations, Tensor, Tensor | None]) -> None:
            activations = without_gradient(recorded[0])
            if row or rows == 1:
                waiting[index].append(activations)
            if row == min(1, rows - 1):
                self.fit(index, joined(waiting.pop(index)))
            if row == 0:
                self.measure(index, activations, *recorded[1:])

        return visit

    def head_errors(self) -> list[Tensor]:
        """The error of each window with a memory, `[heads, windows]` a layer, as of `window_errors`, with a factor c
        of its own."""
        weights = octave_weights(self.errors[0].shape[-1])
        means = [errors.cpu().double() @ (weights / weights.sum()) for errors in self.errors]
        return [(mean_ratio(effect / 2, relative) * relative).sqrt() for relative, effect in means]

    @torch.no_grad()
    def fit(self, index: int, activations: LayerActivations) -> None:
        full_lse = None
        for window in self.windows:
            layer = self.new_layer(self.layers[index], window)
            calibrator = FarCalibrator(layer, self.layers[index], activations, full_lse)
            full_lse = calibrator.recorder.full_lse
            calibrate_layer(calibrator, activations, memory_options(self.mixer))
            calibrator.fit_merge()
            merge = {name: p.clone() for name, p in layer.merge.named_parameters()}
            self.fitted[index, window] = FittedMemory(calibrator.params, calibrator.scale, merge)

    @torch.no_grad()
    def measure(self, index: int, activations: LayerActivations, layer_input: Tensor, gradient: Tensor | None) -> None:
        """Measures layer `index` on one row. layer_input, gradient: `[1, T, hidden]`, the input of the decoder layer,
        and the gradient at the attention's output."""
        assert gradient is not None
        info = self.layers[index]
        G = info.spec.num_kv_heads
        output = info.projection_weights("o")[0].float().unflatten(-1, (G, -1)).transpose(0, 1)
        size = layer_input[0].float().square().sum(-1)
        found, sizes, full_lse = [], [], None
        for window in self.windows:
            layer = self.new_layer(info, window)
            set_memory(layer, [self.fitted[index, window]] * G)
            calibrator = FarCalibrator(layer, info, activations, full_lse)
            full_lse = calibrator.recorder.full_lse
            change = calibrator.merged() - calibrator.full
            change = change[0].flatten(1).unflatten(-1, (G, -1)).transpose(0, 1)  # [G, Q, heads * V]
            change = change @ output.mT  # [G, T, hidden]
            effect = (change * gradient[0].float()).sum(-1)
            found.append(torch.stack((change.square().sum(-1) / size, effect.square())))
            sizes.append(-(-layer.memory_nbytes() // G))
        self.errors.append(torch.stack(found, 2))
        self.nbytes.append(sizes)


def without_gradient(activations: LayerActivations) -> LayerActivations:
    kwargs = {name: detached(value) for name, value in activations.kwargs.items()}
    head_outputs = detached(activations.head_outputs)
    return replace(activations, args=detached(activations.args), kwargs=kwargs, head_outputs=head_outputs)


def joined(rows: Sequence[LayerActivations]) -> LayerActivations:
    """The activations of several passes over one row each, as of a pass over all; arguments of one row stay."""

    def join(values: Sequence[Any]) -> Any:
        tokens = isinstance(values[0], Tensor) and values[0].dim() == 3 and values[0].shape[1] == T
        return torch.cat(values) if tokens else values[0]  # type: ignore[arg-type]

    first, T = rows[0], rows[0].hidden_states.shape[1]
    args = tuple(join(own) for own in zip(*(row.args for row in rows), strict=True))
    kwargs = {name: join([row.kwargs[name] for row in rows]) for name in first.kwargs}
    return replace(first, args=args, kwargs=kwargs, head_outputs=join([row.head_outputs for row in rows]))


def set_memory(layer: NearFarLayer, chosen: Sequence[FittedMemory | None]) -> None:
    """Sets an uninitialized memory to what was fitted for each key/value head; None: the head has no memory."""
    layer.reset_parameters()
    mixer, G = layer.mixer, layer.spec.num_kv_heads
    some = next(found for found in chosen if found is not None)
    own = [some if found is None else found for found in chosen]

    def by_head(values: Sequence[Tensor]) -> Tensor:
        """Of the values of each head, `[G or H, ...]`, its own."""
        return torch.cat([value.unflatten(0, (G, -1))[head] for head, value in enumerate(values)])

    with torch.no_grad():
        for name in some.params:
            getattr(mixer, f"set_{name}")(by_head([found.params[name] for found in own]))
        scales = [found.scale for found in own if found.scale is not None]
        if scales:
            mixer.set_output_scale(by_head(scales))
        for name, parameter in layer.merge.named_parameters():
            parameter.copy_(by_head([found.merge[name] for found in own]))
