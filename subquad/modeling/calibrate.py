"""Calibration: fits the mixers of an untrained student to the teacher's attention, layer by layer, without gradients.

A grid search chooses `qk_activation` and `rotary` for each layer; and for each head the `CALIBRATED_PARAMS` of the
mixer: half-life, beta and, in students for export, scales before SiLU. The criterion is the squared error of the
layer's output on a few thousand tokens. Then each channel of the output norm gets the least-squares scale

    w = sum n a / sum n^2

where n is the mixer's normalized output and a the teacher's attention output, both before the output projection. The
candidates are compared at this scale too. (Calibration before training: arXiv 2606.16429.)
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.mixers import Mixer
from subquad.mixers.norms import head_norm
from subquad.modeling.attention.activations import LayerActivations, visit_activations
from subquad.modeling.attention.discovery import AttentionInfo, attention_modules
from subquad.modeling.layers import MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError

SEARCHED_OPTIONS: dict[str, tuple[Any, ...]] = {"qk_activation": ("silu", "relu", "elu1"), "rotary": (False, True)}
"""Options that are chosen for a layer whose `layer_spec` does not set them."""


@torch.no_grad()
def calibrate(
    student: SubquadForCausalLM,
    teacher: PreTrainedModel,
    attention_layers: Sequence[AttentionInfo],
    calibration_ids: Tensor,
) -> None:
    """Calibrates every mixer of an untrained `student` in place, on token ids `[B, T]`.

    The teacher runs once, and the activations of one layer are held at a time. The options that are chosen are added to
    `student.config.layer_specs`.
    """

    def calibrate_one(index: int, activations: LayerActivations) -> None:
        layer, layer_spec = student.mixer_layers[index], student.config.layer_specs[index]
        if isinstance(layer, MixerLayer):
            layer_spec.update(calibrate_layer(layer.mixer, attention_layers[index], activations, layer_spec))

    visit_activations(teacher, attention_modules(attention_layers), calibrate_one, calibration_ids)


def calibrate_layer(
    mixer: Mixer, info: AttentionInfo, activations: LayerActivations, layer_spec: dict[str, Any]
) -> dict[str, Any]:
    """Calibrates one untrained mixer in place; returns the options that were chosen, which `layer_spec` did not set."""
    calibrator = LayerCalibrator(mixer, info, activations)
    mixer.init_from_teacher(calibrator.target.square().mean((0, 1, 3)).sqrt(), calibrator.x)
    given, candidates = mixer.options, []
    for options in option_candidates(mixer, activations, layer_spec):
        mixer.options = replace(given, **options)
        candidates.append((options, *calibrator.search({})))
    chosen, params, _ = min(candidates, key=lambda candidate: candidate[2].sum().item())
    mixer.options = replace(given, **chosen)
    if len(mixer.CALIBRATED_PARAMS) > 1:  # the best value of one depends on the others
        params, _ = calibrator.search(params)
    calibrator.apply(params)
    if mixer.options.output_norm:
        mixer.set_output_scale(calibrator.errors_and_scale()[1])
    return chosen


def option_candidates(
    mixer: Mixer, activations: LayerActivations, layer_spec: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every valid combination of the `SEARCHED_OPTIONS` that `layer_spec` does not set."""
    searched = {name: values for name, values in SEARCHED_OPTIONS.items() if name not in layer_spec}
    if mixer.spec.rotary is None or activations.position_embeddings is None:
        searched.pop("rotary", None)
    for values in itertools.product(*searched.values()):
        options = dict(zip(searched, values, strict=True))
        with suppress(UserError):  # some options exclude each other
            replace(mixer.options, **options)
            yield options


class LayerCalibrator:
    """Measures the error of a mixer in place of one layer's attention, on the activations of the teacher."""

    def __init__(self, mixer: Mixer, info: AttentionInfo, activations: LayerActivations):
        self.mixer = mixer
        self.x, self.position_embeddings = activations.hidden_states, activations.position_embeddings
        H, V = mixer.spec.num_heads, mixer.spec.value_dim
        assert activations.head_outputs is not None
        self.target = activations.head_outputs.float().unflatten(-1, (H, V))
        output, _ = info.expanded_weights("o")
        output = output.float().unflatten(-1, (H, V)).transpose(0, 1)  # [H, D, V]
        self.error_weight = output.mT @ output
        """`[H, V, V]`: an error e of a head is a squared error e^T W e of the layer's output."""

    def errors_and_scale(self) -> tuple[Tensor, Tensor]:
        """Each head's squared error in the layer's output, `[H]`, and the least-squares scale of its channels,
        `[H, V]`, at which it is taken."""
        o = self.mixer.pre_norm_output(self.x, self.position_embeddings).float()
        scale = o.new_ones(o.shape[2:])
        if self.mixer.options.output_norm:
            # A swish gate without a bias starts near one, but not at one: it belongs to the output.
            has_gate = self.mixer.options.output_gate == "swish" and not self.mixer.has_biases
            gate = self.mixer.output_gate(self.x) if has_gate else None
            if gate is not None and self.mixer.gate_before_norm:
                o = o * gate
            o = head_norm(o, 1.0, self.mixer.norm_eps)
            if gate is not None and not self.mixer.gate_before_norm:
                o = o * gate
            scale = (o * self.target).sum((0, 1)) / o.square().sum((0, 1)).clamp_min(1e-12)
        error = (self.target - scale * o).flatten(0, 1)  # [tokens, H, V]
        return torch.einsum("thv,hvw,thw->h", error, self.error_weight, error), scale

    def apply(self, params: dict[str, Tensor]) -> None:
        for name, values in params.items():
            getattr(self.mixer, f"set_{name}")(values)

    def search(self, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """From `params`, tries all values of each calibrated parameter, one parameter at a time. Returns the values
        `[H]` that are best for each head, and each head's error."""
        errors, _ = self.errors_and_scale()
        for name, values in self.mixer.CALIBRATED_PARAMS:
            self.apply(params)
            errors, chosen = torch.full_like(errors, torch.inf), self.mixer.per_head(values[0])
            for value in values:
                self.apply({name: self.mixer.per_head(value)})
                new_errors, _ = self.errors_and_scale()
                chosen = torch.where(new_errors < errors, value, chosen)
                errors = torch.minimum(errors, new_errors)
            params = {**params, name: chosen}
        return params, errors
