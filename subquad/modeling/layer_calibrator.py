"""The error of a mixer in place of one layer's attention, and the search for its calibrated parameters."""

from typing import Any

import torch
from torch import Tensor

from subquad.mixers import Mixer
from subquad.mixers.base import CalibrationGrid
from subquad.mixers.norms import head_norm
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.discovery import AttentionInfo


class LayerCalibrator:
    """Measures the error of a mixer in place of one layer's attention, on the activations of the teacher."""

    params: dict[str, Tensor]
    """What was chosen of the mixer's `CALIBRATED_PARAMS`, `[G]`."""
    given: frozenset[str] = frozenset()
    """The `CALIBRATED_PARAMS` that stay as they are."""
    scale: Tensor | None = None
    """Of the output norm, `[H, V]`; None without one."""

    def __init__(self, mixer: Mixer, info: AttentionInfo, activations: LayerActivations):
        self.mixer = mixer
        self.known: dict[tuple[Any, ...], Tensor] = {}
        self.x, self.position_embeddings = activations.hidden_states, activations.position_embeddings
        H, V = mixer.spec.num_heads, mixer.spec.value_dim
        assert activations.head_outputs is not None
        self.target = activations.head_outputs.float().unflatten(-1, (H, V))
        output, _ = info.expanded_weights("o")
        output = output.float().unflatten(-1, (H, V)).transpose(0, 1)  # [H, D, V]
        self.error_weight = output.mT @ output
        """`[H, V, V]`: an error e of a head is a squared error e^T W e of the layer's output."""

    def errors_and_scale(self) -> tuple[Tensor, Tensor]:
        """The squared error in the layer's output of the query heads of each state, `[G]`, and the least-squares scale
        of each head's channels, `[H, V]`, at which it is taken."""
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
        return self.squared_errors(self.target - scale * o), scale

    def squared_errors(self, error: Tensor) -> Tensor:
        """The squared error in the layer's output of the query heads of each state, `[G]`, given that of the heads'
        outputs, `[B, T, H, V]`."""
        error = error.flatten(0, 1)
        of_heads = torch.einsum("thv,hvw,thw->h", error, self.error_weight, error)
        return of_heads.view(self.mixer.num_states, -1).sum(-1)

    @property
    def grid(self) -> CalibrationGrid:
        return tuple((name, values) for name, values in self.mixer.CALIBRATED_PARAMS if name not in self.given)

    def apply(self, params: dict[str, Tensor]) -> None:
        for name, values in params.items():
            getattr(self.mixer, f"set_{name}")(values)

    def search(self, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """From `params`, tries all values of each calibrated parameter, one parameter at a time. Returns the values
        `[G]` that are best for each state, and its error."""
        errors = None if self.grid else self.state_errors(params)
        for name, values in self.grid:
            errors, chosen = None, self.mixer.per_state(values[0])
            for value in values:
                new_errors = self.state_errors({**params, name: self.mixer.per_state(value)})
                errors = torch.full_like(new_errors, torch.inf) if errors is None else errors
                chosen = torch.where(new_errors < errors, value, chosen)
                errors = torch.minimum(errors, new_errors)
            params = {**params, name: chosen}
        assert errors is not None
        return params, errors

    def state_errors(self, params: dict[str, Tensor]) -> Tensor:
        """The squared error of each state with these parameters, `[G]`; those of other states do not change it. It
        is not measured twice."""
        given = {name: values.tolist() for name, values in params.items()}
        states = range(self.mixer.num_states)
        keys = [(self.mixer.options, g, *((name, values[g]) for name, values in given.items())) for g in states]
        if not self.known.keys() >= set(keys):
            self.apply(params)
            self.known.update(zip(keys, self.errors_and_scale()[0], strict=True))
        return torch.stack([self.known[key] for key in keys])
