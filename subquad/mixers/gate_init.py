"""Initial values of gates: half-lives in tokens, the inverse functions that turn a gate's value into its bias, and the
direction that replaces a bias."""

import torch
from torch import Tensor

HALF_LIVES = 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0
"""Half-lives that calibration tries, in tokens."""
FAR_HALF_LIVES = (*HALF_LIVES, 4096.0)
"""The same for memories beside a window."""
LONGEST_HALF_LIVES = HALF_LIVES[3:]
"""The same for mixers whose channels' half-lives are spread from one token to the longest."""
GATE_BIAS_INIT = {"swish": 1.2784645427610738, "sigmoid": 0.0}
"""Initial bias of the output gate: swish(1.278...) = 1. sigmoid(0) = 1/2, where its gradient is largest; the output
norm compensates the factor."""
RIDGE = 0.03
"""Ridge penalty of `fit_bias_direction`, relative to the mean square of a channel."""


def spread_half_lives(longest: Tensor, channels: int) -> Tensor:
    """Half-lives `[G, channels]`, spaced geometrically from one token to `longest: [G]`."""
    return longest.unsqueeze(-1) ** torch.linspace(0, 1, channels).to(longest)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y > 0, in the dtype of y, which should be float64."""
    return y + torch.log(-torch.expm1(-y))


def inverse_logsigmoid(y: Tensor) -> Tensor:
    """x with logsigmoid(x) = y < 0, which is y - log(1 - exp(y)), in the dtype of y, which should be float64."""
    return y - torch.log(-torch.expm1(y))


def fit_bias_direction(x: Tensor) -> Tensor:
    """u `[D]` with x . u close to 1 for all tokens `x: [n, D]`, by ridge regression; u replaces a bias.

    The fit is close because normalized hidden states have means far from zero.
    """
    x = x.double()
    tall = x.shape[0] > x.shape[1]
    gram = x.T @ x if tall else x @ x.T
    gram.diagonal().add_(RIDGE * len(x) * x.square().mean())
    u = torch.linalg.solve(gram, x.sum(0)) if tall else x.T @ torch.linalg.solve(gram, x.new_ones(len(x)))
    return u.float()
