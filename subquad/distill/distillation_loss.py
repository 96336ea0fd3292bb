"""The loss of stage 3 on logits: cross-entropy plus a divergence from the teacher's distribution.

This is the definition. `fused_loss.py` computes the same from hidden states without full logits. Losses are means per
token that is not ignored, so that they do not depend on batch size, length or accumulation.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.evaluate.perplexity import kl_divergence

CHUNK = 1024
"""Tokens whose logits are held in float32 at a time."""

Divergence = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class LossOptions:
    """The loss is `ce_weight` * cross-entropy + `kl_weight` * divergence.

    Raises:
        ValueError: an unknown divergence, or a beta or temperature out of range.
    """

    ce_weight: float = 1.0
    kl_weight: float = 1.0
    temperature: float = 1.0
    """Divides the logits of both distributions of the divergence, which is multiplied by its square, so that the size
    of its gradient does not change (Hinton et al., arXiv 1503.02531)."""
    divergence: Divergence = "forward"
    beta: float = 0.5
    """Weight of the teacher in the mixture of `jsd`."""

    def __post_init__(self) -> None:
        if self.divergence not in ("forward", "reverse", "jsd"):
            raise ValueError(f"divergence: got {self.divergence!r}, expected 'forward', 'reverse' or 'jsd'")
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise ValueError(f"beta: got {self.beta}, expected a number between 0 and 1; the limits are KL divergences")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a number above 0")


class LogProbs(NamedTuple):
    """Probabilities of the teacher, p, and of the student, q, and their logarithms, each `[N, vocabulary]`."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor

    @classmethod
    def of(cls, log_p: Tensor, log_q: Tensor) -> "LogProbs":
        return cls(log_p.exp(), log_q.exp(), log_p, log_q)


def divergence_per_token(probs: LogProbs, divergence: Divergence, beta: float) -> Tensor:
    """The divergence between teacher and student, `[N]`, in nats.

    forward: KL(p || q), which is large where the student misses tokens that the teacher predicts.
    reverse: KL(q || p), which is large where the student predicts tokens that the teacher does not.
    jsd: the generalized Jensen-Shannon divergence of GKD (Agarwal et al., arXiv 2306.13649, section 2),
        beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Divided by beta it tends to the forward
        KL as beta goes to 0; divided by 1 - beta it tends to the reverse KL as beta goes to 1.
    """
    p, q, log_p, log_q = probs
    if divergence == "forward":
        return kl_divergence(p, log_p, log_q)
    if divergence == "reverse":
        return kl_divergence(q, log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def divergence_grad(probs: LogProbs, divergence: Divergence, beta: float) -> Tensor:
    """Gradient of `divergence_per_token` with respect to the student's logits x, log q = log_softmax(x), in closed
    form, `[N, vocabulary]`.

    With g = dD/dq the gradient is q (g - <q, g>), in which a constant in g cancels: g is -p / q for the forward KL,
    log(q / p) for the reverse KL, and (1 - beta) log(q / m) for Jensen-Shannon, where the terms of dm/dq cancel.
    """
    p, q, log_p, log_q = probs
    if divergence == "forward":
        return q - p
    if divergence == "reverse":
        g = log_q - log_p
    else:
        g = (log_q - _log_mixture(log_p, log_q, beta)).mul_(1 - beta)
    return g.sub_((q * g).sum(-1, keepdim=True)).mul_(q)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    # not the logarithm of a sum, which is -inf where both probabilities underflow
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(
            f"vocabulary: got {student} logits per token of the student and {teacher} of the teacher, expected the "
            "same number; resize the larger head (resize_token_embeddings) or distill from a teacher with this "
            "tokenizer"
        )


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the loss of next-token predictions.

    Args:
        student_logits: `[B, T, vocabulary]`.
        teacher_logits: `[B, T, vocabulary]`, or None if `kl_weight` is 0.
        labels: `[B, T]`, the input tokens: position t predicts label t + 1. -100 is ignored.

    Returns:
        The weighted sum, the cross-entropy and the divergence (0 if `kl_weight` is 0), means per token. Float32 copies
        of the logits exist for CHUNK tokens at a time, in the forward and the backward pass.

    Raises:
        ValueError: no logits of the teacher, or logits of another vocabulary.
    """
    if options.kl_weight == 0:
        teacher_logits = None
    elif teacher_logits is None:
        raise ValueError("teacher_logits: got None with a kl_weight above 0, expected the teacher's logits")
    else:
        check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    student = student_logits[:, :-1].flatten(0, 1)
    teacher = None if teacher_logits is None else teacher_logits[:, :-1].flatten(0, 1)
    target = labels[:, 1:].flatten()
    count = (target != -100).sum().clamp_min(1)
    ce = kl = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for start in range(0, len(target), CHUNK):
        chunk = slice(start, start + CHUNK)
        inputs = student[chunk], None if teacher is None else teacher[chunk], target[chunk]
        chunk_ce, chunk_kl = checkpoint(_chunk_loss, *inputs, options, use_reentrant=False)
        ce, kl = ce + chunk_ce, kl + chunk_kl
    ce, kl = ce / count, kl / count
    return options.ce_weight * ce + options.kl_weight * kl, ce, kl


def _chunk_loss(student: Tensor, teacher: Tensor | None, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Sums of cross-entropy and divergence over the tokens that are not ignored."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student = student.to(dtype)
    ce = F.cross_entropy(student, target, reduction="sum", ignore_index=-100)
    if teacher is None:
        return ce, torch.zeros_like(ce)
    log_p = F.log_softmax(teacher.to(dtype) / options.temperature, dim=-1)
    log_q = F.log_softmax(student / options.temperature, dim=-1)
    divergence = divergence_per_token(LogProbs.of(log_p, log_q), options.divergence, options.beta)
    return ce, (divergence * (target != -100)).sum() * options.temperature**2
