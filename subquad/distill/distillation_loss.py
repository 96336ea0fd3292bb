"""The loss of stage 3, without full logits: cross-entropy plus a divergence from the teacher's distribution.

The loss takes some tokens at a time through both heads and computes loss and gradients in one pass. The largest tensor
that it holds is the gradient of the student's head.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from subquad.config import EndToEndStage
from subquad.data.packing import IGNORE_INDEX
from subquad.distill.lm_head import Head
from subquad.distill.objective import KnownGradients, slices
from subquad.distill.teacher_targets import SparseTargets
from subquad.utils import kl_divergence

CHUNK = 512
"""Tokens whose logits exist at a time: products of matrices with fewer rows are slower (128: by a quarter)."""
PIECE_BYTES = 2**24
"""Size of the part of these logits that is turned into loss and gradients at a time. It stays in the processor's cache,
and its temporary tensors reuse memory of the process (the C library returns blocks over 32 MB to the system)."""


def distillation_loss(
    student: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels: Tensor,
    student_head: Head | None,
    teacher_head: Head | None,
    stage: EndToEndStage,
    chunk: int = CHUNK,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ce_weight` * cross-entropy + `kl_weight` * divergence, means per token that is not ignored.

    Args:
        student: last hidden states `[N, D]`, or logits `[N, vocabulary]` if `student_head` is None.
        teacher: its hidden states or logits; or sparse targets, of the tokens that are not ignored; None if `kl_weight`
            is 0.
        labels: `[N]`, the token that each position predicts (already shifted). -100 is ignored, at no cost.
        stage: weights, divergence and temperature. The temperature divides the logits of both distributions of the
            divergence, which is multiplied by its square, so that the size of its gradient does not change (Hinton et
            al., arXiv 1503.02531).
        chunk: tokens whose logits exist at a time.
        counted: the indices of the labels that are not ignored; None: they are found, which waits for the device.

    Returns:
        The loss and, detached, the cross-entropy and the divergence (0 if `kl_weight` is 0); 0 if all tokens are
        ignored; float32, or float64 for float64 inputs. Gradients reach `student` and its head, if they require them.
        Products of matrices have the dtype of the head or of autocast; all else, and the sums over chunks, are float32.

    Raises:
        ValueError: nothing of the teacher, or another vocabulary.
        RuntimeError: in the backward pass, as `KnownGradients`.
    """
    counted = (labels != IGNORE_INDEX).nonzero().squeeze(1) if counted is None else counted
    labels, count = labels.index_select(0, counted), max(len(counted), 1)
    own, other = _Projection(student.index_select(0, counted), student_head, chunk), None
    with torch.no_grad():
        if stage.kl_weight > 0:
            other = _read_targets(teacher, teacher_head, counted, chunk)
            if isinstance(other, _Projection) and (ours := own.logits.shape[1]) != (theirs := other.logits.shape[1]):
                raise ValueError(
                    f"vocabulary: got {ours} logits per token of the student and {theirs} of the teacher, expected the "
                    "same number; resize the larger head (resize_token_embeddings) or distill from a teacher with this "
                    "tokenizer"
                )
        ce = kl = own.logits.new_zeros(())
        with torch.autocast(student.device.type, enabled=False):
            for tokens in slices(len(labels), chunk):
                x, a, y = own(tokens), None if other is None else other(tokens), labels[tokens]
                for piece in slices(len(x), max(1, PIECE_BYTES // x[:1].nbytes)):
                    sums = _piece_loss_(x[piece], None if a is None else a[piece], y[piece], own, stage)
                    ce, kl = ce + sums[0], kl + sums[1]
                own.add_gradients(tokens, x)
        ce, kl = ce / count, kl / count
        loss = stage.ce_weight * ce + stage.kl_weight * kl
    pairs = zip(own.inputs, own.gradients, strict=True)
    inputs = {x: g.to(x.dtype) for x, g in pairs if x is not None and g is not None}
    return KnownGradients.apply(loss, list(inputs.values()), count, *inputs), ce, kl


def _read_targets(
    teacher: Tensor | SparseTargets | None, head: Head | None, counted: Tensor, chunk: int
) -> Callable[[slice], Tensor | SparseTargets]:
    """What gives the teacher's logits, or sparse targets, of some of the counted tokens."""
    if teacher is None:
        raise ValueError("teacher: got None with a kl_weight above 0, expected its hidden states or logits")
    if isinstance(teacher, SparseTargets):
        return teacher.__getitem__
    return _Projection(teacher.index_select(0, counted), head, chunk)


class _Projection:
    """Computes the logits of some tokens at a time, in one buffer, in float32 or better, and sums up gradients.

    `gradients` are those of `inputs` (hidden states or logits, weight, bias), None where none is required.
    """

    def __init__(self, hidden: Tensor, head: Head | None, chunk: int):
        self.scale, self.softcap = 1.0 if head is None else head.scale, None if head is None else head.softcap
        weight, bias = (None, None) if head is None else (head.weight, head.bias)
        device, dtype = hidden.device.type, (hidden if weight is None else weight).dtype
        if weight is not None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        self.inputs: list[Tensor | None] = [hidden, weight, bias]
        self.hidden, self.weight = hidden.detach().to(dtype), None if weight is None else weight.detach().to(dtype)
        shape = min(chunk, len(hidden)), hidden.shape[1] if weight is None else len(weight)
        self.logits = hidden.new_empty(shape, dtype=torch.promote_types(dtype, torch.float32))
        self.gradients = [
            self.logits.new_zeros(x.shape) if torch.is_grad_enabled() and x is not None and x.requires_grad else None
            for x in self.inputs
        ]

    def __call__(self, tokens: slice) -> Tensor:
        hidden, bias = self.hidden[tokens], self.inputs[2]
        x = self.logits[: len(hidden)]
        if self.weight is None:
            x.copy_(hidden)
        elif x.dtype == self.weight.dtype:
            torch.mm(hidden, self.weight.T, out=x)
        else:
            x.copy_(hidden @ self.weight.T)
        if bias is not None:
            x += bias
        if self.scale != 1:
            x *= self.scale
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x

    def add_gradients(self, tokens: slice, grad: Tensor) -> None:
        """grad: gradient of h W^T + b, `[tokens, vocabulary]`."""
        hidden, weight, bias = self.gradients
        if bias is not None:
            bias += grad.sum(0)
        grad = grad.to(self.hidden.dtype)
        if hidden is not None:
            hidden[tokens] = grad if self.weight is None else grad @ self.weight
        if weight is None:
            return
        if grad.dtype == weight.dtype:
            weight.addmm_(grad.T, self.hidden[tokens])
        else:
            weight += grad.T @ self.hidden[tokens]


def _piece_loss_(
    x: Tensor, teacher: Tensor | SparseTargets | None, labels: Tensor, head: _Projection, stage: EndToEndStage
) -> tuple[Tensor, Tensor]:
    """Returns the sums over tokens of cross-entropy and divergence.

    Overwrites `x`, the student's logits `[tokens, vocabulary]`, with the gradient of their weighted sum with respect to
    h W^T + b, and logits of the teacher with intermediate results.
    """
    temperature, ce_scale = stage.temperature, stage.ce_weight * head.scale
    labels = labels.unsqueeze(1)
    capped = None if head.softcap is None else x / head.softcap
    log_q = torch.log_softmax(x, -1, out=x)
    ce = -log_q.gather(1, labels).sum()
    kl, kl_grad, q = torch.zeros_like(ce), None, None
    if isinstance(teacher, SparseTargets):
        q = log_q.exp()
        values, kl_grad = teacher.divergence(log_q, q)
        kl = values.sum()
    elif teacher is not None:
        log_p = torch.log_softmax(teacher.div_(temperature) if temperature != 1 else teacher, -1, out=teacher)
        if temperature != 1:
            log_q = torch.log_softmax(log_q / temperature, -1)
        q = log_q.exp()
        values, kl_grad = divergence(log_p, log_q, q, stage)
        kl = values.sum() * temperature**2
    torch.mul(x.exp_() if q is None or temperature != 1 else q, ce_scale, out=x)
    x.scatter_add_(1, labels, torch.full_like(labels, -ce_scale, dtype=x.dtype))
    if kl_grad is not None:
        # the logits are divided by the temperature, the divergence is multiplied by its square
        x.add_(kl_grad, alpha=stage.kl_weight * temperature * head.scale)
    if capped is not None:
        x.mul_(capped.square_().neg_().add_(1))
    return ce, kl


def divergence(log_p: Tensor, log_q: Tensor, q: Tensor, stage: EndToEndStage) -> tuple[Tensor, Tensor]:
    """The divergence between teacher, p, and student, q, `[N]`, in nats, and its gradient, `[N, vocabulary]`, with
    respect to the student's logits x, log q = log_softmax(x), in closed form.

    forward: KL(p || q), which is large where the student misses tokens that the teacher predicts.
    reverse: KL(q || p), which is large where the student predicts tokens that the teacher does not.
    jsd: the generalized Jensen-Shannon divergence of GKD (Agarwal et al., arXiv 2306.13649, section 2),
        beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Divided by beta it tends to the forward
        KL as beta goes to 0; divided by 1 - beta it tends to the reverse KL as beta goes to 1.

    A token with probability 0 (a logit of -inf) adds 0 to the KL divergence from the distribution that gives it 0. It
    makes forward KL infinite if the student alone gives it 0, reverse KL if the teacher alone does; jsd stays finite.

    With g = dD/dq the gradient is q (g - <q, g>), in which a constant in g cancels: g is -p / q for the forward KL,
    log(q / p) for the reverse KL, and (1 - beta) log(q / m) for Jensen-Shannon, where the terms of dm/dq cancel.
    """
    beta = stage.jsd_beta
    if stage.divergence == "forward":
        p = log_p.exp()
        return kl_divergence(p, log_p, log_q), q - p
    if stage.divergence == "reverse":
        g = _log_ratio(log_q, log_p)
        value = mean = (q * g).sum(-1, keepdim=True)
    else:
        # not the logarithm of a sum, which is -inf where both probabilities underflow
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        g = _log_ratio(log_q, log_m)
        value = (beta * log_p.exp() * _log_ratio(log_p, log_m) + (1 - beta) * q * g).sum(-1, keepdim=True)
        mean = (q * g.mul_(1 - beta)).sum(-1, keepdim=True)
    return value.squeeze(-1), g.sub_(mean).mul_(q)


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(a / b); 0 where a is 0."""
    return (log_a - log_b).masked_fill_(log_a == -torch.inf, 0)
