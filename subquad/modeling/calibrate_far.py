"""Calibration of a memory beside attention to a window: on its own target, with the share that the teacher gives it.

The target is that of `subquad.modeling.outside`. Queries, keys, values and the near part are computed once for all
candidates.
"""

from typing import Any

import torch
from torch import Tensor

from subquad.mixers.base import CalibrationGrid
from subquad.mixers.gate_init import FAR_HALF_LIVES, HALF_LIVES
from subquad.mixers.norms import head_norm
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.attention.banded import Implementation, Slots
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.far_call import FarCall
from subquad.modeling.layer_calibrator import LayerCalibrator
from subquad.modeling.merge import TINY
from subquad.modeling.near_far import NearFarLayer
from subquad.modeling.outside import OutsideRecorder

RIDGE = 1e-2
"""Of the fit of m, relative to the mean square of its inputs."""


class FarRecorder(FarCall, OutsideRecorder):
    """Also keeps what the memory of each group of heads gets, for many calls of `read_all`. q, k and v of the op are
    computed once for each feature map."""

    def begin(self, query: Tensor, key: Tensor, value: Tensor, order: Tensor | None) -> None:
        self.qkv = query, key, value
        self.mapped: dict[int | None, Any] = {}
        self.mapped_version = self.map_version
        FarCall.begin(self, query, key, value, order)
        OutsideRecorder.begin(self, query, key, value, order)
        self.groups: list[tuple[int, Slots, Tensor | None]] = []
        self.relative_lse = torch.zeros_like(self.near_lse)

    def __call__(self, index: int, slots: Slots, runner: Implementation, near: Tensor, lse: Any) -> Tensor:
        self.groups.append((index, slots, runner.heads))
        if self.layer.merge.relative:
            self.relative_lse[:, :, slice(None) if runner.heads is None else runner.heads] = lse(True)
        return OutsideRecorder.__call__(self, index, slots, runner, near, lse)

    def merge_lse(self, relative: bool) -> Tensor:
        """As `lse` of `FarCall.__call__`, of all heads."""
        return self.relative_lse if relative else self.near_lse

    def gate_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        if None not in self.mapped:
            self.mapped[None] = super().gate_inputs(query, key, value)
        return {**self.mapped[None]}

    @property
    def map_version(self) -> tuple:
        """What the feature map depends on, its learned weights by the number of their changes."""
        mixer = self.layer.mixer
        return (mixer.options, *(weight._version for weight in mixer.feature_maps().values()))

    def entries_and_inputs(self, index: int, *args: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        if index not in self.mapped:
            self.mapped[index] = super().entries_and_inputs(index, *args)
        entries, inputs = self.mapped[index]
        return entries, {**inputs}

    def read_all(self) -> tuple[Tensor, Tensor]:
        """What the memory gives, of all heads, `[B, T, H, V]`, with gates computed anew; and its normalizer."""
        if self.map_version != self.mapped_version:
            self.mapped, self.mapped_version = {}, self.map_version
        FarCall.begin(self, *self.qkv, None)
        o, z = torch.zeros_like(self.near), torch.ones_like(self.near_lse)
        for index, slots, heads in self.groups:
            chosen = slice(None) if heads is None else heads
            read, normalizer = self.read(index, slots, heads)
            o[:, :, chosen] = read.float()
            if normalizer is not None:
                z[:, :, chosen] = normalizer.float()
        return o, z


class FarCalibrator(LayerCalibrator):
    """As `LayerCalibrator`, of the memory of one layer on its own target. full_lse: see `OutsideRecorder.known_lse`."""

    def __init__(
        self,
        layer: NearFarLayer,
        info: AttentionInfo,
        activations: LayerActivations,
        full_lse: Tensor | None = None,
    ):
        super().__init__(layer.mixer, info, activations)
        self.layer, self.merge = layer, layer.merge
        self.recorder = FarRecorder(layer, self.x, None, None)
        self.recorder.known_lse = full_lse
        kwargs = {name: value for name, value in activations.kwargs.items() if name != "attention_mask"}
        layer.forward_local(None, activations.args, kwargs, None, self.recorder)
        self.full, self.mass = self.target, self.recorder.mass
        self.share, self.target = self.recorder.target(self.full, self.merge.kind)

    @property
    def grid(self) -> CalibrationGrid:
        """With half-lives for what is older than a window."""
        return tuple((name, FAR_HALF_LIVES if values == HALF_LIVES else values) for name, values in super().grid)

    def errors_and_scale(self) -> tuple[Tensor, Tensor]:
        o, _ = self.recorder.read_all()
        scale = o.new_ones(o.shape[2:])
        if self.mixer.options.output_norm:
            o = head_norm(o, 1.0, self.mixer.norm_eps) * self.share
            scale = (o * self.target).sum((0, 1)) / o.square().sum((0, 1)).clamp_min(1e-12)
        else:
            o = o * self.share
        return self.squared_errors(self.target - scale * o), scale

    def merged(self) -> Tensor:
        """The layer's head outputs, `[B, T, H, V]`."""
        found = self.recorder
        o, z = found.read_all()
        far = found.normed(o, None)
        return self.merge(found.near, far, z, found.logits, found.left, found.merge_lse, None)

    def fit_merge(self) -> None:
        """Fits the share of the memory: `mass` by weighted least squares of logit(m*) on x, lse and 1, `denominator`
        and `lolcats` by the weighted mean of what is missing to logit(m*)."""
        if not (self.merge.kind == "mass" or self.merge.has_normalizer) or not bool(self.recorder.left.any()):
            return
        mass = self.mass.clamp(1e-3, 1 - 1e-3)
        weight = torch.where(self.recorder.left, mass * (1 - mass), 0.0)  # [B, T, H]
        wanted, lse = torch.logit(mass), self.recorder.merge_lse(self.merge.relative)
        if self.merge.has_normalizer:
            _, z = self.recorder.read_all()
            missing = wanted - (z.clamp_min(TINY).log() - lse)
            self.merge.log_scale.copy_((weight * missing).sum((0, 1)) / weight.sum((0, 1)).clamp_min(1e-12))
            return
        x = self.x.flatten(0, 1).double()
        for head in range(self.mixer.spec.num_heads):
            own = weight[..., head].flatten().double()
            if not bool(own.any()):  # the head has no memory
                continue
            columns = [x, lse[..., head].flatten().double()[:, None], torch.ones_like(own)[:, None]]
            inputs = torch.cat(columns, 1)
            gram = inputs.T @ (own[:, None] * inputs)
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            solution = torch.linalg.solve(gram + ridge, inputs.T @ (own * wanted[..., head].flatten().double()))
            self.merge.m_proj.weight[head] = solution[:-2].to(self.merge.m_proj.weight)
            self.merge.lse_weight[head] = solution[-2].to(self.merge.lse_weight)
            self.merge.m_proj.bias[head] = solution[-1].to(self.merge.m_proj.bias)
