"""What stages 1 and 2 measure: the distance of mixing matrices, some rows at a time, and of outputs; and how layers
that learn alone make one loss.

Every loss is a mean, per matrix row or per token, so that it does not change with batch size, length or accumulation.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Rows = Callable[[slice], Tensor]
"""Gives rows of a matrix `[B, H, T, T]`, as `[B, H, rows, T]`."""


def matrix_distance(matrix: Rows, target: Rows, length: int, scale_is_free: bool, rows: int) -> Tensor:
    """Squared Frobenius distance a row between two matrices `[B, H, T, T]`; the mean over batch, heads and rows.

    length: T. rows: so many rows exist at a time; where that is fewer than T, the backward pass computes them again.
    scale_is_free: a norm follows the core, so that a head's scale has no meaning; the matrix is first scaled by
        <M, A> / <M, M>, the least-squares scale of each sequence and head (zero where M is against A everywhere).
        That scale minimises the distance, so that its own gradient is zero: it is a constant.
    """
    blocks = [slice(a, min(a + rows, length)) for a in range(0, length, rows)]
    if len(blocks) == 1:
        M, A = matrix(blocks[0]).float(), target(blocks[0]).float()
        return _squares(M, A, _scale(*_products(M.detach(), A)) if scale_is_free else None) / M[..., 0].numel()
    scale = None
    if scale_is_free:
        with torch.no_grad():
            parts = [_products(matrix(block).float(), target(block).float()) for block in blocks]
        scale = _scale(*(torch.stack(x).sum(0) for x in zip(*parts, strict=True)))

    def distance(block: slice) -> tuple[Tensor, Tensor]:
        M = matrix(block).float()
        return _squares(M, target(block).float(), scale), M.new_tensor(M[..., 0].numel())

    sums = [checkpoint(distance, block, use_reentrant=False) for block in blocks]
    total, count = (torch.stack(x).sum(0) for x in zip(*sums, strict=True))
    return total / count


def _products(M: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """<M, A> and <M, M>, `[B, H, 1, 1]`."""
    return (M * A).sum((-2, -1), keepdim=True), M.square().sum((-2, -1), keepdim=True)


def _scale(overlap: Tensor, power: Tensor) -> Tensor:
    return (overlap / power.clamp_min(torch.finfo(power.dtype).tiny)).clamp_min(0)


def _squares(M: Tensor, A: Tensor, scale: Tensor | None) -> Tensor:
    return (M - A if scale is None else torch.addcmul(-A, M, scale)).square().sum()


def output_distance(output: Tensor, target: Tensor, power: Tensor) -> Tensor:
    """Squared distance a token between `output` and `target`, `[B, T, D]`, over `power`, the mean square of the
    teacher's outputs in this layer: 1 is a student that says nothing."""
    return (output.float() - target.float()).square().sum(-1).mean() / power


def layerwise(losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean of independent losses, one a layer, of which only one layer's graph is alive at a time.

    `losses[i]()` depends on `parameters[i]` alone. Each is differentiated as soon as it is known; the result hands the
    gradients on when it is differentiated itself, so that whatever wraps the model (accumulation, DDP, a gradient
    scaler) sees an ordinary loss. A parameter without influence gets a gradient of zero, for which data-parallel
    wrappers wait. Returns the mean and the values of the layers, `[layers]`.
    """
    flat = [p for group in parameters for p in group if p.requires_grad]
    differentiate = torch.is_grad_enabled() and bool(flat)
    values, gradients = [], []
    for loss, group in zip(losses, parameters, strict=True):
        learning = [p for p in group if p.requires_grad]
        with torch.set_grad_enabled(differentiate and bool(learning)):
            value = loss()
        if differentiate and learning:
            parts = torch.autograd.grad(value, learning, allow_unused=True, materialize_grads=True)
            gradients += [g / len(losses) for g in parts]
        values.append(value.detach())
    per_layer = torch.stack(values)
    if not differentiate:
        return per_layer.mean(), per_layer
    return _PrecomputedGrads.apply(per_layer.mean(), gradients, *flat), per_layer


class _PrecomputedGrads(torch.autograd.Function):
    """A value whose gradients with respect to `parameters` are known already."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, *[g * grad.to(g.dtype) for g in ctx.gradients]
