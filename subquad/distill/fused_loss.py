"""The loss of stage 3 from hidden states, without full logits; its definition is in `distillation_loss.py`.

The loss takes some tokens at a time through both heads and computes loss and gradients in one pass. The largest tensor
that it holds is the gradient of the student's head.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.distill.distillation_loss import (
    LogProbs,
    LossOptions,
    check_vocabularies,
    divergence_grad,
    divergence_per_token,
)
from subquad.distill.lm_head import Head

CHUNK = 512
"""Tokens whose logits exist at a time: products of matrices with fewer rows are slower (128: by a quarter)."""
PIECE_BYTES = 2**24
"""Size of the part of these logits that is turned into loss and gradients at a time. It stays in the processor's cache,
and its temporary tensors reuse memory of the process (the C library returns blocks over 32 MB to the system)."""


def fused_distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    student_head: Head,
    teacher_head: Head | None,
    options: LossOptions,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `distillation_loss` of the logits of two heads.

    Args:
        student_hidden: `[N, D]`.
        teacher_hidden: `[N, D of the teacher]`, or None, as its head, if `kl_weight` is 0.
        labels: `[N]`, the token that each position predicts (already shifted). -100 is ignored, at no cost.
        chunk: tokens whose logits exist at a time.

    Returns:
        The weighted sum and, detached, the cross-entropy and the divergence (0 if `kl_weight` is 0): means per token
        that is not ignored, 0 without such a token; float32, or float64 for float64 inputs. Gradients reach the
        student's hidden states and its head, if they require them. They are computed here; the backward pass only
        scales them. Products of matrices have the dtype of the head or of autocast; all else, and the sums over
        chunks, are float32.

    Raises:
        ValueError: as `distillation_loss`.
        RuntimeError: in the backward pass, with `create_graph`, and when it runs a second time (`retain_graph`), since
            the first gives the gradients away without a copy.
    """
    if options.kl_weight == 0:
        teacher_hidden = teacher_head = None
    elif teacher_hidden is None or teacher_head is None:
        raise ValueError("teacher_hidden, teacher_head: got None with a kl_weight above 0, expected the teacher's")
    else:
        check_vocabularies(len(student_head.weight), len(teacher_head.weight))
    counted = (labels != -100).nonzero().squeeze(1)
    hidden = student_hidden.index_select(0, counted)
    inputs = [x for x in (hidden, student_head.weight, student_head.bias) if x is not None]
    # inside a Function, autograd does not tell whether any gradient is required
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.detach().index_select(0, counted)
    constants = _Constants(
        student_head, teacher_head, teacher_hidden, labels.index_select(0, counted), options, chunk, needs_grad
    )
    return _FusedLoss.apply(hidden, student_head.weight, student_head.bias, constants)


class _Constants(NamedTuple):
    """Inputs of the loss that get no gradient. `teacher_hidden` and `labels` are those of tokens that count."""

    student_head: Head
    teacher_head: Head | None
    teacher_hidden: Tensor | None
    labels: Tensor
    options: LossOptions
    chunk: int
    needs_grad: bool


class _FusedLoss(torch.autograd.Function):
    """Computes loss and gradients in one pass over the tokens; the backward pass scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: _Constants
    ) -> tuple[Tensor, Tensor, Tensor]:
        student_head, teacher_head, teacher_hidden, labels, options, chunk, needs_grad = constants
        student = _Projection(hidden, student_head._replace(weight=weight, bias=bias), chunk)
        teacher = None
        if teacher_hidden is not None and teacher_head is not None:
            teacher = _Projection(teacher_hidden, teacher_head, chunk)
        gradients = _Gradients(student, [needs_grad and needed for needed in ctx.needs_input_grad[:3]])
        ce = kl = torch.zeros((), dtype=student.logits.dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for tokens in _slices(len(labels), chunk):
                x, a, y = student(tokens), None if teacher is None else teacher(tokens), labels[tokens]
                for piece in _slices(len(x), max(1, PIECE_BYTES // x[:1].nbytes)):
                    sums = _piece_loss_(x[piece], None if a is None else a[piece], y[piece], student_head, options)
                    ce, kl = ce + sums[0], kl + sums[1]
                gradients.add(tokens, x)
        ctx.count = max(len(labels), 1)
        ctx.gradients = gradients.take(hidden, weight, bias)
        ce, kl = ce / ctx.count, kl / ctx.count
        ctx.mark_non_differentiable(ce, kl)
        return options.ce_weight * ce + options.kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # autograd would take the gradients for constants
            raise RuntimeError("the fused loss has no second derivative (create_graph=True); use distillation_loss")
        if ctx.gradients is None:
            raise RuntimeError("the fused loss gives its gradients only once (retain_graph=True); compute it again")
        # the receiver (a parameter's `grad`) may keep them without a copy
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad / ctx.count
        return *(None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients), None


class _Projection:
    """Computes the logits of some tokens at a time, in one buffer, in float32 or better."""

    def __init__(self, hidden: Tensor, head: Head, chunk: int):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        self.hidden, self.head = hidden.to(dtype), head
        self.weight = head.weight.detach().to(dtype)
        shape = min(chunk, len(hidden)), len(self.weight)
        self.logits = hidden.new_empty(shape, dtype=torch.promote_types(dtype, torch.float32))

    def __call__(self, tokens: slice) -> Tensor:
        x = self.logits[: tokens.stop - tokens.start]
        if x.dtype == self.weight.dtype:
            torch.mm(self.hidden[tokens], self.weight.T, out=x)
        else:
            x.copy_(self.hidden[tokens] @ self.weight.T)
        if self.head.bias is not None:
            x += self.head.bias
        if self.head.scale != 1:
            x *= self.head.scale
        if self.head.softcap is not None:
            x.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return x


class _Gradients:
    """Sums over chunks of the gradients of hidden states, weight and bias, as far as they are needed."""

    def __init__(self, student: _Projection, needed: list[bool]):
        self.student = student
        like, bias = student.logits, student.head.bias
        shapes = student.hidden.shape, student.weight.shape, None if bias is None else bias.shape
        self.hidden, self.weight, self.bias = (
            like.new_zeros(shape) if shape is not None and need else None
            for shape, need in zip(shapes, needed, strict=True)
        )

    def add(self, tokens: slice, grad: Tensor) -> None:
        """grad: gradient of h W^T + b, `[tokens, vocabulary]`."""
        if self.bias is not None:
            self.bias += grad.sum(0)
        h, W = self.student.hidden[tokens], self.student.weight
        grad = grad.to(W.dtype)
        if self.hidden is not None:
            self.hidden[tokens] = grad @ W
        if self.weight is None:
            return
        if grad.dtype == self.weight.dtype:
            self.weight.addmm_(grad.T, h)
        else:
            self.weight += grad.T @ h

    def take(self, *inputs: Tensor | None) -> list[Tensor | None]:
        """The three gradients, each in the dtype of its input."""
        sums = self.hidden, self.weight, self.bias
        return [g if g is None or x is None else g.to(x.dtype) for g, x in zip(sums, inputs, strict=True)]


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _piece_loss_(
    x: Tensor, teacher: Tensor | None, labels: Tensor, head: Head, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Returns the sums over tokens of cross-entropy and divergence.

    Overwrites `x`, the student's logits `[tokens, vocabulary]`, with the gradient of their weighted sum with respect to
    h W^T + b, and `teacher`, its logits, with intermediate results.
    """
    temperature, divergence, beta = options.temperature, options.divergence, options.beta
    ce_scale = options.ce_weight * head.scale
    labels = labels.unsqueeze(1)
    capped = None if head.softcap is None else x / head.softcap
    log_q = torch.log_softmax(x, -1, out=x)
    ce = -log_q.gather(1, labels).sum()
    kl, kl_grad, q = torch.zeros_like(ce), None, None
    if teacher is not None:
        log_p = torch.log_softmax(teacher.div_(temperature) if temperature != 1 else teacher, -1, out=teacher)
        probs = LogProbs.of(log_p, log_q if temperature == 1 else torch.log_softmax(log_q / temperature, -1))
        kl = divergence_per_token(probs, divergence, beta).sum() * temperature**2
        kl_grad = divergence_grad(probs, divergence, beta)
        q = probs.q if temperature == 1 else None
    torch.mul(x.exp_() if q is None else q, ce_scale, out=x)
    x.scatter_add_(1, labels, torch.full_like(labels, -ce_scale, dtype=x.dtype))
    if kl_grad is not None:
        # the logits are divided by the temperature, the divergence is multiplied by its square
        x.add_(kl_grad, alpha=options.kl_weight * temperature * head.scale)
    if capped is not None:
        x.mul_(capped.square_().neg_().add_(1))
    return ce, kl
