"""What a student is taught by: the distance of matrices and of outputs, and cross-entropy with KL divergence.

Every loss is a mean, per token or per matrix row, so that it does not change with batch size, length or accumulation.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Tokens whose logits are held in float32 at a time."""


def matrix_distance(matrix: Tensor, target: Tensor, scale_is_free: bool) -> Tensor:
    """Squared Frobenius distance a row between `matrix` and `target`, `[B, H, T, T]`; the mean over batch, heads, rows.

    scale_is_free: a norm follows the core, so that a head's scale has no meaning; the matrix is first scaled by
        <M, A> / <M, M>, the least-squares scale of each sequence and head (zero where M is against A everywhere).
    """
    matrix, target = matrix.float(), target.float()
    if scale_is_free:
        overlap = (matrix * target).sum((-2, -1), keepdim=True)
        power = matrix.square().sum((-2, -1), keepdim=True)
        matrix = matrix * (overlap / power.clamp_min(torch.finfo(power.dtype).tiny)).clamp_min(0)
    return (matrix - target).square().sum(-1).mean()


def output_distance(output: Tensor, target: Tensor, power: Tensor) -> Tensor:
    """Squared distance a token between `output` and `target`, `[B, T, D]`, over `power`, the mean square of the
    teacher's outputs in this layer: 1 is a student that says nothing."""
    return (output.float() - target.float()).square().sum(-1).mean() / power


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce_weight * CE + kl_weight * KL(teacher || student) of next-token predictions, means per token.

    student_logits, teacher_logits: `[B, T, vocabulary]`; labels: `[B, T]`, the same tokens that were fed: position t
        predicts label t + 1. -100 is ignored.
    temperature: softens both distributions; the KL is multiplied by its square (Hinton et al., 1503.02531), so that
        its gradient keeps its size.

    Returns the weighted sum, the cross-entropy and the KL. Float32 copies exist of CHUNK tokens at a time, in forward
    and in backward.
    """
    student = student_logits[:, :-1].flatten(0, 1)
    teacher = teacher_logits[:, :-1].flatten(0, 1)
    target = labels[:, 1:].flatten()
    count = (target != -100).sum().clamp_min(1)
    ce = kl = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(target), CHUNK):
        part = slice(start, start + CHUNK)
        ce_part, kl_part = checkpoint(
            _chunk_loss, student[part], teacher[part], target[part], temperature, use_reentrant=False
        )
        ce, kl = ce + ce_part, kl + kl_part
    ce, kl = ce / count, kl / count
    return ce_weight * ce + kl_weight * kl, ce, kl


def _chunk_loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student = student.float()
    ce = F.cross_entropy(student, target, reduction="sum", ignore_index=-100)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return ce, (divergence * (target != -100)).sum() * temperature**2


def layerwise(losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean of independent losses, one a layer, of which only one layer's graph is alive at a time.

    `losses[i]()` depends on `parameters[i]` alone. Each is differentiated as soon as it is known; the result hands the
    gradients on when it is differentiated itself, so that whatever wraps the model (accumulation, DDP, a gradient
    scaler) sees an ordinary loss. Returns it and the values of the layers, `[layers]`.
    """
    flat = [p for group in parameters for p in group if p.requires_grad]
    differentiate = torch.is_grad_enabled() and bool(flat)
    values, gradients = [], []
    for loss, group in zip(losses, parameters, strict=True):
        learning = [p for p in group if p.requires_grad]
        with torch.set_grad_enabled(differentiate and bool(learning)):
            value = loss()
        if differentiate and learning:
            parts = torch.autograd.grad(value, learning, allow_unused=True)
            gradients += [None if g is None else g / len(losses) for g in parts]
        values.append(value.detach())
    per_layer = torch.stack(values)
    if not differentiate:
        return per_layer.mean(), per_layer
    return _Known.apply(per_layer.mean(), gradients, *flat), per_layer


class _Known(torch.autograd.Function):
    """A value whose gradients with respect to `parameters` are known already."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, *[None if g is None else g * grad.to(g.dtype) for g in ctx.gradients]
