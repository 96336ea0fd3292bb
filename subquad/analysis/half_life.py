"""How long the memory of a student's mixers lasts, from their decays: the spectrum of half-lives.

A memory that is multiplied by exp(g_t) at every token is, n tokens later, exp(sum of g) of what it was: its half-life
is log 2 over the mean of -g. Mixers without a decay (linear attention, DeltaNet) and kept attention have none.
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

FOREVER = 2.0**30
"""Half-life in tokens of a decay that is too near one to be told from it."""


def log_decay_of(core: dict[str, Tensor]) -> Tensor | None:
    """The log decay among what a mixer's core takes, `[B, T, H]` or, a channel, `[B, T, H, K]`; None where it has
    none."""
    if "forget_gate" in core:
        return F.logsigmoid(upcast(core["forget_gate"]))
    return core.get("log_decay")


@torch.no_grad()
def mean_log_decays(model: PreTrainedModel, rows: Tensor) -> list[Tensor | None]:
    """Of each layer, over all tokens of `rows: [N, T]`, `[H]` or `[H, K]` in float64; None where it has no decay."""
    stack = LayerAccess(model)
    sums: list[Tensor | None] = [None] * len(stack)
    with eval_mode(model):
        for ids in rows.split(1):
            for index, recording in enumerate(stack.record(stack.mixing, ids)):
                block = stack.mixer_layers[index]
                if not isinstance(block, MixerLayer):
                    continue
                x, positions = recording.hidden_states, recording.kwargs.get("position_embeddings")
                found = log_decay_of(block.mixer.op_inputs(x, positions, None, None)[0])
                if found is not None:
                    total = found.double().sum((0, 1))
                    before = sums[index]
                    sums[index] = total if before is None else before + total
    return [None if total is None else total / rows.numel() for total in sums]


def half_lives(model: PreTrainedModel, rows: Tensor) -> list[Tensor | None]:
    """Of each layer, in tokens, `[H]` or, where each channel has its own, `[H, K]`; on texts `rows: [N, T]`."""
    return [
        None if mean is None else (-math.log(2) / mean.clamp_max(-math.log(2) / FOREVER))
        for mean in mean_log_decays(model, rows)
    ]
