"""Calibration: fits the mixers of an untrained student to the teacher's attention, layer by layer, without gradients.

A grid search chooses `qk_activation` and `rotary` for each layer; and for each state the `CALIBRATED_PARAMS` of the
mixer that are not given: half-life, beta and, in students for export, scales before SiLU. The criterion is the squared
error of the layer's output on a few thousand tokens. Then each channel of the output norm gets the least-squares scale

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

from subquad import progress
from subquad.mixers import Mixer
from subquad.modeling.attention.activations import LayerActivations, visit_activations
from subquad.modeling.attention.discovery import AttentionInfo, attention_modules
from subquad.modeling.calibrate_far import FarCalibrator
from subquad.modeling.layer_calibrator import LayerCalibrator
from subquad.modeling.layers import MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.near_far import NearFarLayer
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
        bar.update()  # with the number of layers that were begun
        layer, layer_spec = student.mixer_layers[index], student.config.layer_specs[index]
        if isinstance(layer, MixerLayer):
            calibrator = LayerCalibrator(layer.mixer, attention_layers[index], activations)
            layer_spec.update(calibrate_layer(calibrator, activations, layer_spec))
        elif isinstance(layer, NearFarLayer):
            calibrator = FarCalibrator(layer, attention_layers[index], activations)
            layer_spec.update(calibrate_layer(calibrator, activations, layer_spec))
            calibrator.fit_merge()

    progress.announce(
        "calibrating %d layers: each searches the options that come closest to the teacher's attention on %d tokens",
        len(attention_layers),
        calibration_ids.numel(),
    )
    with progress.bar(len(attention_layers), "calibrating", "layers") as bar:
        visit_activations(teacher, attention_modules(attention_layers), calibrate_one, calibration_ids)


def calibrate_layer(
    calibrator: LayerCalibrator, activations: LayerActivations, layer_spec: dict[str, Any]
) -> dict[str, Any]:
    """Calibrates one untrained mixer in place; returns the options that were chosen, which `layer_spec` did not set."""
    mixer = calibrator.mixer
    mixer.init_from_teacher(calibrator.target.square().mean((0, 1, 3)).sqrt(), calibrator.x)
    given, candidates = mixer.options, []
    calibrator.given = frozenset(layer_spec) | ({"half_life"} if "longest_half_life" in layer_spec else frozenset())
    for options in option_candidates(mixer, activations, layer_spec):
        mixer.options = replace(given, **options)
        candidates.append((options, *calibrator.search({})))
    chosen, params, _ = min(candidates, key=lambda candidate: candidate[2].sum().item())
    mixer.options = replace(given, **chosen)
    if len(calibrator.grid) > 1:  # the best value of one depends on the others
        params, _ = calibrator.search(params)
    calibrator.apply(params)
    calibrator.params = params
    if mixer.options.output_norm:
        calibrator.scale = calibrator.errors_and_scale()[1]
        mixer.set_output_scale(calibrator.scale)
    return chosen


def option_candidates(
    mixer: Mixer, activations: LayerActivations, layer_spec: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every valid combination of the `SEARCHED_OPTIONS` that `layer_spec` does not set."""
    searched = {name: values for name, values in SEARCHED_OPTIONS.items() if name not in layer_spec}
    if mixer.memory_only or mixer.spec.rotary is None or activations.position_embeddings is None:
        searched.pop("rotary", None)
    for values in itertools.product(*searched.values()):
        options = dict(zip(searched, values, strict=True))
        with suppress(UserError):  # some options exclude each other
            replace(mixer.options, **options)
            yield options
