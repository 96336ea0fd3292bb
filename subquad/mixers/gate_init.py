"""Initial values of gates: half-lives in tokens, and the inverse functions that turn a gate's value into its bias."""

import torch
from torch import Tensor

HALF_LIVES = 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0
"""Half-lives that calibration tries, in tokens."""
LONGEST_HALF_LIVES = HALF_LIVES[3:]
"""The same for mixers whose channels' half-lives are spread from one token to the longest."""
GATE_BIAS_INIT = {"swish": 1.2784645427610738, "sigmoid": 0.0}
"""Initial bias of the output gate: swish(1.278...) = 1. sigmoid(0) = 1/2, where its gradient is largest; the output
norm compensates the factor."""


def spread_half_lives(longest: Tensor, channels: int) -> Tensor:
    """Half-lives `[H, channels]`, spaced geometrically from one token to `longest: [H]`."""
    return longest.unsqueeze(-1) ** torch.linspace(0, 1, channels).to(longest)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0, in the dtype of y, which should be float64."""
    return y + torch.log(-torch.expm1(-y))


def inverse_logsigmoid(y: Tensor) -> Tensor:
    """x with logsigmoid(x) = y < 0, which is y - log(1 - exp(y)), in the dtype of y, which should be float64."""
    return y - torch.log(-torch.expm1(y))
