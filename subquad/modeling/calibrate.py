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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.mixers import Mixer
from subquad.mixers.norms import head_norm
from subquad.modeling.attention.activations import LayerActivations, attention_modules, capture_activations
from subquad.modeling.attention.discovery import AttentionInfo
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

    with capture_activations(attention_modules(attention_layers), calibrate_one):
        teacher.base_model(input_ids=calibration_ids.to(teacher.device), use_cache=False)


@dataclass
class Candidate:
    """Settings of one layer: its options, the values `[H]` of its calibrated parameters, and each head's error."""

    options: dict[str, Any]
    params: dict[str, Tensor]
    errors: Tensor


def calibrate_layer(
    mixer: Mixer, info: AttentionInfo, activations: LayerActivations, layer_spec: dict[str, Any]
) -> dict[str, Any]:
    """Calibrates one untrained mixer in place; returns the options that were chosen, which `layer_spec` did not set."""
    calibrator = LayerCalibrator(mixer, info, activations)
    mixer.init_from_teacher(calibrator.target.square().mean((0, 1, 3)).sqrt(), calibrator.x)
    given = mixer.options
    candidates = []
    for options in option_candidates(mixer, activations, layer_spec):
        mixer.options = replace(given, **options)
        candidates.append(calibrator.search(Candidate(options, {}, calibrator.errors_and_scale()[0])))
    best = min(candidates, key=lambda c: c.errors.sum().item())
    mixer.options = replace(given, **best.options)
    if len(mixer.CALIBRATED_PARAMS) > 1:  # the best value of one depends on the others
        best = calibrator.search(best)
    calibrator.apply(best.params)
    if mixer.options.output_norm:
        mixer.set_output_scale(calibrator.errors_and_scale()[1])
    return best.options


def option_candidates(
    mixer: Mixer, activations: LayerActivations, layer_spec: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every valid combination of the `SEARCHED_OPTIONS` that `layer_spec` does not set."""
    names = [name for name in SEARCHED_OPTIONS if name not in layer_spec]
    if mixer.spec.rotary is None or activations.kwargs.get("position_embeddings") is None:
        names = [name for name in names if name != "rotary"]
    for values in itertools.product(*(SEARCHED_OPTIONS[name] for name in names)):
        options = dict(zip(names, values, strict=True))
        try:
            replace(mixer.options, **options)
        except UserError:  # some options exclude each other
            continue
        yield options


class LayerCalibrator:
    """Measures the error of a mixer in place of one layer's attention, on the activations of the teacher."""

    def __init__(self, mixer: Mixer, info: AttentionInfo, activations: LayerActivations):
        self.mixer = mixer
        self.x, self.position_embeddings = activations.hidden_states, activations.kwargs.get("position_embeddings")
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

    def search(self, start: Candidate) -> Candidate:
        """Tries all values of each calibrated parameter, one parameter at a time; each head keeps its best value."""
        best = Candidate(start.options, dict(start.params), start.errors)
        for name, values in self.mixer.CALIBRATED_PARAMS:
            self.apply(best.params)
            errors, chosen = torch.full_like(best.errors, torch.inf), self.mixer.per_head(values[0])
            for value in values:
                self.apply({name: self.mixer.per_head(value)})
                new_errors, _ = self.errors_and_scale()
                chosen = torch.where(new_errors < errors, value, chosen)
                errors = torch.minimum(errors, new_errors)
            best.params[name], best.errors = chosen, errors
        return best
