"""Calibrated initialisation: what the teacher's attention tells of a fresh mixer, set in closed form, layer by layer.

On a few thousand tokens the teacher's attention is watched. Per layer, the activation of queries and keys and whether
they keep their rotary embedding; per head, the half-life of its memory and its write strength: whatever a mixer has of
these is chosen by the error that it leaves in the layer's output. Then each channel of the output norm gets its least-
squares scale,

    w = sum n a / sum n^2        n the mixer's normed output, a the teacher's attention output, before its projection

which also scales the candidates while they are compared. No gradient is taken. (The aim is that of arXiv 2606.16429.)
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
"""Options that are chosen for a layer, where its plan does not say them."""


@torch.no_grad()
def calibrate(
    student: SubquadForCausalLM, teacher: PreTrainedModel, sites: Sequence[AttentionInfo], tokens: Tensor
) -> None:
    """Sets the mixers of a fresh `student` by the teacher's attention on `tokens: [B, T]`; the options chosen go into
    the student's plan. One layer's activations are held at a time."""

    def each(index: int, recording: LayerActivations) -> None:
        block = student.mixer_layers[index]
        if isinstance(block, MixerLayer):
            chosen = calibrate_layer(block.mixer, sites[index], recording, student.config.layer_specs[index])
            student.config.layer_specs[index].update(chosen)

    with capture_activations(attention_modules(sites), each):
        teacher.base_model(input_ids=tokens.to(teacher.device), use_cache=False)


@dataclass
class Candidate:
    """A setting of one layer: its options, the values of its knobs `[H]`, and the error that each head leaves."""

    options: dict[str, Any]
    params: dict[str, Tensor]
    errors: Tensor


def calibrate_layer(
    mixer: Mixer, site: AttentionInfo, recording: LayerActivations, entry: dict[str, Any]
) -> dict[str, Any]:
    """Calibrates one fresh mixer in place; returns the options that were chosen beyond those of its plan's `entry`."""
    scene = LayerCalibrator(mixer, site, recording)
    mixer.init_from_teacher(scene.target.square().mean((0, 1, 3)).sqrt(), scene.x)
    fixed = mixer.options
    candidates = []
    for options in option_candidates(mixer, recording, entry):
        mixer.options = replace(fixed, **options)
        candidates.append(scene.search(Candidate(options, {}, scene.errors()[0]), sweeps=1))
    best = min(candidates, key=lambda c: c.errors.sum().item())
    mixer.options = replace(fixed, **best.options)
    if len(mixer.CALIBRATED_PARAMS) > 1:  # what is best for one depends on the other
        best = scene.search(best, sweeps=1)
    scene.apply(best.params)
    if mixer.options.output_norm:
        mixer.set_output_scale(scene.errors()[1])
    return best.options


def option_candidates(mixer: Mixer, recording: LayerActivations, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the options that the plan leaves open and that this layer can have."""
    open_names = [name for name in SEARCHED_OPTIONS if name not in entry]
    if mixer.spec.rotary is None or recording.kwargs.get("position_embeddings") is None:
        open_names = [name for name in open_names if name != "rotary"]
    for values in itertools.product(*(SEARCHED_OPTIONS[name] for name in open_names)):
        options = dict(zip(open_names, values, strict=True))
        try:
            replace(mixer.options, **options)
        except UserError:  # some options exclude each other
            continue
        yield options


class LayerCalibrator:
    """A mixer in the place of one layer's attention, on the text that the teacher was watched on."""

    def __init__(self, mixer: Mixer, site: AttentionInfo, recording: LayerActivations):
        self.mixer = mixer
        self.x, self.positions = recording.hidden_states, recording.kwargs.get("position_embeddings")
        H, V = mixer.spec.num_heads, mixer.spec.value_dim
        assert recording.heads is not None
        self.target = recording.heads.float().unflatten(-1, (H, V))
        output, _ = site.expanded_weights("o")
        by_head = output.float().unflatten(-1, (H, V)).transpose(0, 1)  # [H, D, V]
        self.metric = by_head.mT @ by_head
        """What an error of a head costs in the layer's output, `[H, V, V]`."""

    def errors(self) -> tuple[Tensor, Tensor]:
        """What each head leaves of the teacher's output behind the projection, squared, `[H]`; and the scale of each
        channel, `[H, V]`."""
        o = self.mixer.pre_norm_output(self.x, self.positions).float()
        scale = o.new_ones(o.shape[2:])
        if self.mixer.options.output_norm:
            # a gate without a bias stands near one, not at it
            bent = self.mixer.options.output_gate == "swish" and not self.mixer.has_biases
            gate = self.mixer.output_gate(self.x) if bent else None
            if gate is not None and self.mixer.gate_before_norm:
                o = o * gate
            o = head_norm(o, 1.0, self.mixer.norm_eps)
            if gate is not None and not self.mixer.gate_before_norm:
                o = o * gate
            scale = (o * self.target).sum((0, 1)) / o.square().sum((0, 1)).clamp_min(1e-12)
        rest = (self.target - scale * o).flatten(0, 1)  # [tokens, H, V]
        return torch.einsum("thv,hvw,thw->h", rest, self.metric, rest), scale

    def apply(self, knobs: dict[str, Tensor]) -> None:
        for name, values in knobs.items():
            getattr(self.mixer, f"set_{name}")(values)

    def search(self, start: Candidate, sweeps: int) -> Candidate:
        """Tries each value of each knob, one knob after the other; every head keeps what is best for it."""
        best = Candidate(start.options, dict(start.params), start.errors)
        for name, values in [knob for _ in range(sweeps) for knob in self.mixer.CALIBRATED_PARAMS]:
            self.apply(best.params)
            errors, chosen = torch.full_like(best.errors, torch.inf), self.mixer.per_head(values[0])
            for value in values:
                self.apply({name: self.mixer.per_head(value)})
                now, _ = self.errors()
                chosen = torch.where(now < errors, value, chosen)
                errors = torch.minimum(errors, now)
            best.params[name], best.errors = chosen, errors
        return best
