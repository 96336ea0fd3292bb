"""Half-lives of a student's decays.

n tokens after a write, its share of the state is exp(sum of g) with g <= 0 the log decays. The half-life is log 2 over
the mean of -g. Mixers without a decay (linear attention, DeltaNet) and attention layers have none.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.layer_access import LayerAccess
from subquad.mixers.norms import upcast
from subquad.modeling.layers import MixerLayer
from subquad.utils import eval_mode

MAX_HALF_LIFE = 2.0**30
"""Tokens; the half-life of decays that are 1 up to rounding."""


def find_log_decay(op_inputs: dict[str, Tensor]) -> Tensor | None:
    """The log decay among an op's inputs, per head `[B, T, H]` or per channel `[B, T, H, K]`; None if it has none."""
    if "forget_gate" in op_inputs:
        return F.logsigmoid(upcast(op_inputs["forget_gate"]))
    return op_inputs.get("log_decay")


@torch.no_grad()
def mean_log_decays(model: PreTrainedModel, rows: Tensor) -> list[Tensor | None]:
    """The mean log decay of each layer over all tokens of `rows: [N, T]`: `[H]` or `[H, K]`, float64; None without."""
    access = LayerAccess(model)
    sums: list[Tensor | None] = [None] * len(access)
    with eval_mode(model):
        for ids in rows.split(1):
            for index, recorded in enumerate(access.record(access.mixing_modules, ids)):
                layer = access.mixer_layers[index]
                if not isinstance(layer, MixerLayer):
                    continue
                x, positions = recorded.hidden_states, recorded.kwargs.get("position_embeddings")
                log_decay = find_log_decay(layer.mixer.op_inputs(x, positions, None, None)[0])
                if log_decay is not None:
                    total = log_decay.double().sum((0, 1))
                    before = sums[index]
                    sums[index] = total if before is None else before + total
    return [None if total is None else total / rows.numel() for total in sums]


def half_lives(model: PreTrainedModel, rows: Tensor) -> list[Tensor | None]:
    """Half-lives in tokens of each layer on texts `rows: [N, T]`: `[H]`, or `[H, K]` for decays per channel."""
    return [
        None if mean is None else (-math.log(2) / mean.clamp_max(-math.log(2) / MAX_HALF_LIFE))
        for mean in mean_log_decays(model, rows)
    ]
